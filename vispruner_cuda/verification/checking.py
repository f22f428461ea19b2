"""Runs cases on one implementation, under every plan that fits, and compares the results."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypedDict

import torch

from .. import methods
from .cases import COMBINED, EXACT, OPERATORS, Arguments, Case, Operators, cases
from .comparison import Difference, compare
from .expected import Expectations, Expected
from .known_answers import KnownAnswer


class Plans(Protocol):
    """The interface of `vispruner_cuda.plans`."""

    def choices(self) -> dict[str, tuple[str, ...]]: ...
    def current(self) -> dict[str, str]: ...
    def use(self, **stages: str) -> AbstractContextManager[None]: ...


class NoPlans:
    """For an implementation without plans."""

    def choices(self) -> dict[str, tuple[str, ...]]:
        return {}

    def current(self) -> dict[str, str]:
        return {}

    def use(self, **stages: str) -> AbstractContextManager[None]:
        if stages:
            raise ValueError(f"stage {next(iter(stages))!r}: this implementation has no plans")
        return contextlib.nullcontext()


@dataclass(frozen=True)
class Backend:
    """An implementation to verify.

    Attributes:
        name: title of its column in the table.
        operators: takes and returns CPU tensors.
        plans: launch plans that can be selected.
        fixed: plans selected for all of its cases. The plans of the other stages are tried in turn.
        dependent_launches: False for a GPU that is too old for the plan launch=dependent, so that
            it may refuse it.
    """

    name: str
    operators: Operators
    plans: Plans = field(default_factory=NoPlans)
    fixed: Mapping[str, str] = field(default_factory=dict)
    dependent_launches: bool = True


# ------------------------------------------------------------------------------------------ plans
# The operators that a stage is part of; a stage that is not listed may be part of any.
_THROUGH: dict[str, tuple[str, ...]] = {
    "rank": EXACT,
    "gram": ("pairwise_cosine", "dedup", "prune", "prune_varlen"),
    "neighbours": ("dedup", "prune", "prune_varlen"),
    "dedup": ("dedup", "prune", "prune_varlen"),
    "sort": ("dedup", "prune", "prune_varlen"),
    "launch": EXACT,
    "cls_attention": ("cls_attention",),
    "received_attention": ("received_attention",),
}
# Residual tokens up to which these plans of the stage "dedup" fit on every supported GPU, and the
# channels per head and tokens up to which those of the attention scores do.
_ALWAYS_FIT = {"lists_shared": 400, "state_shared": 4500}
_WIDE_HEAD_DIM = {"float32": 180, "float16": 230, "bfloat16": 230}
_SHARED_TOKENS = 11000


# The stages that methods other than the default have.
_OF_OTHER_METHODS = ("rank", "gram", "launch", "cpu")


def _stages(backend: Backend, case: Case) -> dict[str, tuple[str, ...]]:
    """Stages to vary for a case, and their plans."""
    return {
        stage: names
        for stage, names in backend.plans.choices().items()
        if stage not in backend.fixed
        and case.operator in _THROUGH.get(stage, OPERATORS)
        and (case.method == methods.DEFAULT or stage in _OF_OTHER_METHODS)
    }


def settings(backend: Backend, case: Case, combinations: bool = True) -> Iterator[dict[str, str]]:
    """Plans to force for a case: none, then each one that can fit.

    With `combinations`, the cases in COMBINED get every combination of the stages' plans as well.
    """
    yield {}
    stages = {
        stage: [name for name in names if name != "auto" and _can_fit(case, stage, name)]
        for stage, names in _stages(backend, case).items()
    }
    for stage, names in stages.items():
        for name in names:
            yield {stage: name}
    if combinations and case in COMBINED and len(stages) > 1:
        for chosen in itertools.product(*stages.values()):
            yield dict(zip(stages, chosen, strict=True))


def _can_fit(case: Case, stage: str, name: str) -> bool:
    # The plans of the neighbour lists are named after the residual tokens that they can hold.
    holds = name.rpartition("_")[2]
    return stage != "neighbours" or not holds.isdigit() or case.residual <= int(holds)


def _may_refuse(backend: Backend, case: Case, plans: Mapping[str, str]) -> bool:
    """Whether these plans may raise RuntimeError instead of giving a result."""
    if plans.get("launch") == "dependent" and not backend.dependent_launches:
        return True
    if plans.get("received_attention") == "wide":
        return case.channels > _WIDE_HEAD_DIM[case.dtype]
    if plans.get("cls_attention") == "shared":
        return max(case.tokens) > _SHARED_TOKENS
    return case.residual > _ALWAYS_FIT.get(plans.get("dedup", ""), math.inf)


# ---------------------------------------------------------------------------------------- results
class Counts(TypedDict):
    """Counts for one operator, or for the known answers."""

    cases: int
    wrong_cases: int
    runs: int  # calls: several per case, under different plans
    refused: int  # calls under plans that did not fit
    skipped: int  # calls for which the device had too little memory
    differences: list[Difference]  # the first ones
    seconds: float


class Result(TypedDict):
    """The verification of one backend, as plain data."""

    backend: str
    equal: bool  # no difference and no problem
    operators: dict[str, Counts]
    known_answers: Counts
    plans: dict[str, dict[str, int]]  # stage -> plan -> right results
    problems: list[str]
    seconds: float


#: Differences of an operator that a result holds.
MOST_DIFFERENCES = 3

#: After this many failed cases in a row the rest is skipped: the device no longer works.
MOST_ERRORS = 20


def verify(
    backend: Backend,
    of: Iterable[Case] | None = None,
    known: Iterable[KnownAnswer] = (),
    *,
    plans: str = "combined",
    expectations: Expectations | None = None,
    progress: Callable[[int, int, Result], None] | None = None,
) -> Result:
    """Runs the cases, then the known answers, under every plan that fits, and compares.

    Cases run in the order of their sizes: a launch may fail as long as no larger one of the same
    kernel has come before.

    Args:
        backend: the implementation.
        of: cases to compare with the reference, all by default; `select` excludes costly ones.
        known: cases with stored results, compared without the reference.
        plans: "each" runs a case under each plan that fits, one at a time; "combined" also runs
            the cases in COMBINED under all combinations; "turns" runs a case under the default and
            one other plan, the one tried least so far, for slow backends.
        expectations: shared by the backends of a machine.
        progress: called after each case with the numbers of cases done and to do, and the result
            so far, in which "equal" is False.

    Returns:
        Counts and first differences. An exception counts as a difference, unless it is the
        RuntimeError of a selected plan that may not fit.

    Raises:
        ValueError: `plans` has another value.
    """
    if plans not in ("each", "combined", "turns"):
        raise ValueError(f"plans must be each, combined or turns, got {plans!r}")
    verification = _Verification(backend, plans, expectations or Expectations())
    # Inputs and references consist of many small operations. On a busy machine, several threads
    # would spend ten times longer waiting for each other than computing.
    with _threads(1):
        return verification.run(cases() if of is None else list(of), list(known), progress)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sets the number of threads of PyTorch on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Verification:
    def __init__(self, backend: Backend, plans: str, expectations: Expectations) -> None:
        self.backend = backend
        self.plans = plans
        self.tried: Counter[tuple[str, str]] = Counter()
        self.expectations = expectations
        self.errors_in_a_row = 0
        self.threads = torch.get_num_threads()
        self.result: Result = {
            "backend": backend.name,
            "equal": False,
            "operators": {},
            "known_answers": _no_counts(),
            "plans": {},
            "problems": [],
            "seconds": 0.0,
        }

    def run(
        self,
        of: list[Case],
        known: list[KnownAnswer],
        progress: Callable[[int, int, Result], None] | None,
    ) -> Result:
        began = time.perf_counter()
        result = self.result
        todo = [*((case, None) for case in of), *((answer.case, answer) for answer in known)]
        for done, (case, answer) in enumerate(todo, 1):
            start = time.perf_counter()
            arguments = case.arguments()
            if answer:
                counts, want = result["known_answers"], answer.expected(arguments)
            else:
                counts = result["operators"].setdefault(case.operator, _no_counts())
                want = self.expectations.of(case, arguments)
            self._run_case(case, arguments, want, counts)
            counts["seconds"] += time.perf_counter() - start
            if progress:
                progress(done, len(todo), result)
            if self.errors_in_a_row >= MOST_ERRORS:
                result["problems"].append(
                    f"skipped {len(todo) - done} cases after {MOST_ERRORS} failed in a row"
                )
                break
        result["problems"] += [
            f"no right result with {stage}={name}"
            for stage, names in result["plans"].items()
            for name, right in names.items()
            if not right and not self._never_works(stage, name)
        ]
        counted = [*result["operators"].values(), result["known_answers"]]
        result["equal"] = not result["problems"] and not any(c["wrong_cases"] for c in counted)
        result["seconds"] = time.perf_counter() - began
        return result

    def _never_works(self, stage: str, name: str) -> bool:
        return (stage, name) == ("launch", "dependent") and not self.backend.dependent_launches

    def _settings(self, case: Case) -> list[dict[str, str]]:
        default, *forced = settings(self.backend, case, self.plans == "combined")
        if self.plans == "turns" and forced:
            forced = [min(forced, key=lambda plans: max(self.tried[p] for p in plans.items()))]
            self.tried.update(forced[0].items())
        return [default, *forced]

    def _run_case(self, case: Case, arguments: Arguments, want: Expected, counts: Counts) -> None:
        backend, right_before = self.backend, counts["runs"]
        stages = _stages(backend, case)
        for stage, names in stages.items():
            self.result["plans"].setdefault(stage, dict.fromkeys(names, 0))
        wrong = errors = 0
        for plans in self._settings(case):
            try:
                found = self._run_once(case, arguments, want, plans)
            except Exception as error:
                if _out_of_memory(error):
                    counts["skipped"] += 1
                    continue
                if isinstance(error, RuntimeError) and _may_refuse(backend, case, plans):
                    counts["refused"] += 1
                    continue
                found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
                errors += 1
            counts["runs"] += 1
            if found is None:
                for stage in stages:
                    self.result["plans"][stage][plans.get(stage, "auto")] += 1
                continue
            wrong += 1
            if len(counts["differences"]) < MOST_DIFFERENCES:
                forced = {**backend.fixed, **plans}
                where: Difference = {"case": case.data(), "text": str(case), "plans": forced}
                counts["differences"].append({**where, **found})
        counts["cases"] += 1
        counts["wrong_cases"] += wrong > 0
        failed = errors > 0 and errors == counts["runs"] - right_before
        self.errors_in_a_row = self.errors_in_a_row + 1 if failed else 0

    def _run_once(
        self, case: Case, arguments: Arguments, want: Expected, plans: Mapping[str, str]
    ) -> Difference | None:
        forced = {**self.backend.fixed, **plans}
        with self.backend.plans.use(**forced):
            current = self.backend.plans.current()
            for stage, name in forced.items():
                if current.get(stage) != name:
                    return {"error": f"{stage}={name} was forced, {current.get(stage)} is in use"}
            with _threads(self.threads):
                result = case.call(self.backend.operators, arguments)
            return compare(case, result, want)


def _out_of_memory(error: Exception) -> bool:
    # torch's own error loses its type when it passes through the operators of the library.
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error)
    )


def _no_counts() -> Counts:
    return {
        "cases": 0,
        "wrong_cases": 0,
        "runs": 0,
        "refused": 0,
        "skipped": 0,
        "differences": [],
        "seconds": 0.0,
    }
