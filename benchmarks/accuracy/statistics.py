"""Mean accuracies with standard errors that include scenes and training seeds.

Neither the questions about one image nor the answers of one model are independent, so standard
errors are clustered by image and by training seed (two-way: Cameron, Gelbach and Miller, J.
Business & Economic Statistics 29, 2011). A single seed gives no estimate of the spread between
seeds.
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
    """Mean of values with independent clusters and independent seeds.

    For paired differences, pass differences as values.

    Args:
        values: (S, Q) for S seeds, or (Q,) for one.
        clusters: (Q,) image of each question.
    """
    values = np.atleast_2d(values)
    seeds, count = values.shape
    if count == 0:
        return Mean(float("nan"), float("nan"), 0)
    mean = float(values.mean())
    cells = np.stack([np.bincount(clusters, row - mean) for row in values])  # (S, images)
    variance = by_image = float(np.square(cells.sum(0)).sum())
    if seeds > 1:
        by_seed = float(np.square(cells.sum(1)).sum()) * seeds / (seeds - 1)
        variance += by_seed - float(np.square(cells).sum())
    # The combined estimate can be too small, but seeds cannot reduce the error.
    return Mean(mean, float(np.sqrt(max(variance, by_image))) / values.size, count)
