"""Compares settings with the unpruned model, question by question."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..selection import Budget
from .data import Item
from .measuring import Measurement
from .scoring import Scorer, exact_match, score


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, clustered by picture: the questions about a picture are not
    independent.

    Attributes:
        questions, pictures: that it is of.
    """

    mean: float
    error: float
    questions: int
    pictures: int


@dataclass(frozen=True)
class Summary:
    """A setting on all questions.

    Attributes:
        budget: the setting; None is the unpruned model.
        questions: that were measured; pictures: that they are about.
        equal: share of answers equal to the unpruned model's.
        right: mean score of the answers to questions with a known answer, None without any.
        loss: in points (of 100), paired.
        lost: what the loss is of: "right answers"; without them "first choices" of the unpruned
            model's answer; without log-probabilities either, "equal answers".
        log_probability: mean of the unpruned model's answers under this model.
        first_choices: share of their tokens that stay the first choice.
        visual_tokens, cache_bytes, prefill, first_token: medians; times in milliseconds.
            Like the two before, None where a server does not return them.
    """

    budget: Budget | None
    questions: int
    pictures: int
    equal: float
    right: float | None
    loss: Estimate
    lost: str
    log_probability: float | None
    first_choices: float | None
    visual_tokens: float
    cache_bytes: float | None
    prefill: float | None
    first_token: float

    def probability_below(self, tolerance: float) -> float:
        """The probability that the loss is below a tolerance, in points.

        From a normal distribution. If no picture differs, the standard error has no information:
        then from the share of pictures that lose, with a uniform prior (the rule of succession).
        """
        if self.loss.mean == self.loss.error == 0:
            return 1 - (1 - min(tolerance, 100) / 100) ** (self.loss.pictures + 1)
        if self.loss.error == 0:
            return float(self.loss.mean < tolerance)
        return statistics.NormalDist(self.loss.mean, self.loss.error).cdf(tolerance)

    def data(self) -> dict[str, Any]:
        setting = None if self.budget is None else self.budget.arguments
        loss = vars(self.loss)
        if math.isinf(self.loss.error):  # JSON has no infinity
            loss = {**loss, "error": None}
        return {**vars(self), "budget": setting, "loss": loss}


def name_of(budget: Budget | None) -> str:
    if budget is None:
        return "unpruned"
    amount = f"k = {budget.k}" if budget.k is not None else f"{100 * (budget.ratio or 0):g} %"
    others = {name: value for name, value in budget.parameters.items() if name != "method"}
    defaults = Budget(1, method=budget.method).parameters
    changed = [f"{name} {value:g}" for name, value in others.items() if value != defaults[name]]
    method = [] if budget.method == "vispruner" else [budget.method]
    return ", ".join([amount, *method, *changed])


def _known(average: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return average(known) if known else None


def _clustered(values: Sequence[float], clusters: Sequence[str]) -> Estimate:
    count = len(values)
    mean = sum(values) / count
    sums: dict[str, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    groups = len(sums)
    if groups < 2:
        return Estimate(mean, math.inf, count, groups)  # one picture gives no spread
    variance = sum(s * s for s in sums.values()) / count**2 * groups / (groups - 1)
    return Estimate(mean, math.sqrt(variance), count, groups)


def summarize(
    items: Sequence[Item],
    measured: Sequence[tuple[Budget | None, Sequence[Measurement]]],
    scorer: Scorer = exact_match,
) -> list[Summary]:
    """A summary of each setting.

    Args:
        items: the questions.
        measured: settings with a measurement of each item; the first is the unpruned model.
        scorer: of answers, where the items have right ones.

    Raises:
        ScorerError: the scorer cannot be used.
    """
    reference = measured[0][1]
    clusters = [item.picture for item in items]
    answered = [i for i, item in enumerate(items) if item.answer is not None]

    @functools.cache  # equal answers have equal scores, and a scorer may be slow
    def judged(answer: str, right: str) -> float:
        return score(scorer, answer, right)

    def scores(of: Sequence[Measurement]) -> list[float]:
        return [judged(of[i].answer, str(items[i].answer)) for i in answered]

    def kept(of: Sequence[Measurement]) -> list[float]:
        if answered:
            return scores(of)
        if lost == "first choices":
            return [one.first_choices or 0.0 for one in of]
        return [float(one.answer == r.answer) for one, r in zip(of, reference, strict=True)]

    known = all(one.first_choices is not None for _, found in measured for one in found)
    lost = "right answers" if answered else "first choices" if known else "equal answers"
    judged_of = [clusters[i] for i in answered] if answered else clusters
    before = kept(reference)
    summaries = []
    for budget, found in measured:
        after = kept(found)
        losses = [100 * (b - a) for b, a in zip(before, after, strict=True)]
        times = [one.milliseconds for one in found]
        equal = [one.answer == r.answer for one, r in zip(found, reference, strict=True)]
        summaries.append(
            Summary(
                budget,
                len(items),
                len(set(clusters)),
                sum(equal) / len(items),
                statistics.fmean(after) if answered else None,
                _clustered(losses, judged_of),
                lost,
                _known(statistics.fmean, [one.log_probability for one in found]),
                _known(statistics.fmean, [one.first_choices for one in found]),
                statistics.median(one.visual_tokens for one in found),
                _known(statistics.median, [one.cache_bytes for one in found]),
                _known(statistics.median, [t.get("prefill") for t in times]),
                statistics.median(t["first token"] for t in times),
            )
        )
    return summaries


def recommended(summaries: Sequence[Summary], tolerance: float) -> Summary | None:
    """The setting with the fewest visual tokens whose estimated loss is below the tolerance."""
    pruned = [s for s in summaries if s.budget is not None and s.loss.mean < tolerance]
    return min(pruned, key=lambda s: (s.visual_tokens, s.loss.mean), default=None)
