"""Means of right answers with the uncertainty that their scenes bring.

Questions about one image are not independent, so standard errors are clustered by image. All seeds
answer the same questions about the same images: their answers are averaged for each question first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Mean:
    """A mean, its clustered standard error and the number of questions; nan without questions."""

    value: float
    error: float
    count: int

    def percent(self, digits: int = 1) -> str:
        return f"{100 * self.value:.{digits}f} ± {100 * self.error:.{digits}f}"


def clustered_mean(values: NDArray[np.float64], clusters: NDArray[np.int64]) -> Mean:
    """Mean of values, (Q,), whose clusters, (Q,), are independent of each other.

    Paired differences are the same with differences for values.
    """
    count = len(values)
    if count == 0:
        return Mean(float("nan"), float("nan"), 0)
    mean = float(values.mean())
    sums = np.bincount(clusters, values - mean)
    return Mean(mean, float(np.sqrt(np.square(sums).sum())) / count, count)
