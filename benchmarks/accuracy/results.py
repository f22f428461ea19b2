"""The results files of a recipe, for all seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import provenance
from documents import ResultsError, read_json
from numpy.typing import NDArray

from .evaluation import Asked, from_bits, from_lines
from .statistics import Mean, clustered_mean

Filter = Callable[[Asked], bool]


def _load(pattern: str) -> list[dict[str, Any]]:
    paths = provenance.RESULTS.glob(f"{pattern}_seed*.json")
    return sorted((read_json(path) for path in paths), key=lambda data: data["seed"])


def load_analyses(recipe: str) -> list[dict[str, Any]]:
    """results/accuracy_analyses_RECIPE_seed*.json, by seed."""
    return _load(f"accuracy_analyses_{recipe}")


@dataclass(frozen=True)
class Results:
    """Answers of the models of all seeds to the same questions.

    Attributes:
        runs: one results file per seed.
        asked: metadata of each question.
    """

    runs: tuple[dict[str, Any], ...]
    asked: tuple[Asked, ...]

    @staticmethod
    def load(recipe: str, part: str = "") -> Results:
        """results/accuracy_RECIPE_seed*.json, or accuracy_PART_RECIPE_seed*.json.

        Raises:
            ResultsError: there are none, or they contain answers to different questions.
        """
        name = f"accuracy_{part}_{recipe}" if part else f"accuracy_{recipe}"
        runs = _load(name)
        if not runs:
            raise ResultsError(
                f"there is no {name}_seed*.json in {provenance.RESULTS}: restore them, or run "
                "python -m accuracy"
            )
        if any(run["asked"] != runs[0]["asked"] for run in runs):
            raise ResultsError(
                f"{provenance.RESULTS}/{name}_seed*.json contain answers to different questions: "
                "run all seeds with the same --scenes"
            )
        return Results(tuple(runs), tuple(from_lines(runs[0]["asked"])))

    @property
    def seeds(self) -> list[int]:
        return [run["seed"] for run in self.runs]

    def answers(self, stage: str, name: str, run: int | None = None) -> NDArray[np.float64]:
        """(S, Q) correct answers of each seed; "random@8" is the mean of all "random/I@8".

        Args:
            run: index of a single seed; default all.
        """
        rule, _, k = name.partition("@")
        shares = []
        for data in self.runs if run is None else (self.runs[run],):
            found = [
                from_bits(bits, len(self.asked))
                for key, bits in data["checkpoints"][stage]["answers"].items()
                if key == name
                or (rule == "random" and key.startswith("random/") and key.endswith(f"@{k}"))
            ]
            if not found:
                raise KeyError(name)
            shares.append(np.mean(found, 0))
        return np.stack(shares)

    def mean(
        self, stage: str, name: str, where: Filter, minus: str | None = None, run: int | None = None
    ) -> Mean:
        """Accuracy of a rule, or its difference from the rule `minus`, on some questions."""
        values = self.answers(stage, name, run)
        if minus is not None:
            values = values - self.answers(stage, minus, run)
        chosen = np.array([where(asked) for asked in self.asked])
        images = np.array([asked.image for asked in self.asked])
        return clustered_mean(values[:, chosen], images[chosen])
