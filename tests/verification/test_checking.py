"""The verification detects every kind of wrong result and reports its place."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vispruner_cuda import reference
from vispruner_cuda.verification import (
    OPERATORS,
    Backend,
    Case,
    cases,
    machine,
    select,
    settings,
    verify,
)
from vispruner_cuda.verification.checking import MOST_DIFFERENCES, MOST_ERRORS, Result
from vispruner_cuda.verification.known_answers import KnownAnswer

SMALL = {
    "topk": Case("topk", (30, 30), 1, 2, 7),
    "pairwise_cosine": Case("pairwise_cosine", (9, 9), 12, dtype="float16"),
    "dedup": Case("dedup", (40, 40), 12, None, 9),
    "prune": Case("prune", (40, 40), 12, 2, 9, dtype="bfloat16"),
    "prune_varlen": Case("prune_varlen", (40, 0, 13), 12, 2, 9),
    "cls_attention": Case("cls_attention", (40, 40), 16, 2),
    "received_attention": Case("received_attention", (40, 13), 16, 2, dtype="float16"),
}

STAGES = {
    "rank": ("auto", "tokens_8", "tokens_32"),
    "gram": ("auto", "tiles_32", "tiles_64", "tiles_128"),
    "neighbours": ("auto", "warp_576", "warp_1024", "block_4096", "block_16384", "block_32768"),
    "dedup": ("auto", "lists_shared", "state_shared", "workspace"),
    "sort": ("auto", "buckets", "counting"),
    "launch": ("auto", "ordered", "dependent"),
    "cpu": ("auto", "portable"),
}


class CudaPlans:
    """The plans of a CUDA build, which only records the selected ones."""

    def __init__(self) -> None:
        self.forced = dict.fromkeys(STAGES, "auto")

    def choices(self) -> dict[str, tuple[str, ...]]:
        return STAGES

    def current(self) -> dict[str, str]:
        return dict(self.forced)

    @contextlib.contextmanager
    def use(self, **stages: str) -> Iterator[None]:
        before = self.forced
        self.forced = {**before, **stages}
        try:
            yield
        finally:
            self.forced = before


def faulty(name: str, fault: Callable[[Any], Any], when: Callable[[], bool] = lambda: True) -> Any:
    """The operators of the CPU, one of them with a fault in its results."""
    functions = dict(vars(machine.operators("cpu")))
    right = functions[name]

    def wrong(*args: Any, **keywords: Any) -> Any:
        result = right(*args, **keywords)
        return fault(result) if when() else result

    return SimpleNamespace(**{**functions, name: wrong})


def flipped(x: torch.Tensor, at: tuple[int, ...]) -> torch.Tensor:
    """A copy with the lowest bit of one element changed."""
    x = x.clone()
    bits = x if not x.is_floating_point() else x.view({2: torch.int16, 4: torch.int32}[x.itemsize])
    bits[at] ^= 1
    return x


# Operator, output and position of the only wrong bit.
BITS = [
    ("topk", "indices", (1, 3)),
    ("topk", "scores", (0, 6)),
    ("pairwise_cosine", "cosines", (1, 8, 2)),
    ("dedup", "indices", (1, 0)),
    ("prune", "indices", (1, 5)),
    ("prune", "feats", (0, 8, 11)),
    ("prune_varlen", "indices", (11,)),
    ("prune_varlen", "feats", (17, 0)),
]


@pytest.mark.parametrize(("name", "output", "at"), BITS)
def test_one_wrong_bit_is_found(name: str, output: str, at: tuple[int, ...]) -> None:
    def fault(result: Any) -> Any:
        if isinstance(result, torch.Tensor):
            return flipped(result, at)
        return result._replace(**{output: flipped(getattr(result, output), at)})

    result = verify(Backend("faulty", faulty(name, fault)), SMALL.values())
    assert not result["equal"]
    counts = result["operators"].pop(name)
    assert (counts["cases"], counts["wrong_cases"], counts["runs"]) == (1, 1, 1)
    (found,) = counts["differences"]
    assert found["output"] == output
    assert found["position"] == list(at)
    assert found["wrong_elements"] == 1
    assert found["got"] != found["want"]
    assert Case.from_data(json.loads(json.dumps(found["case"]))) == SMALL[name]
    assert not any(c["wrong_cases"] for c in result["operators"].values())


def score_case(name: str, dtype: str) -> Case:
    return Case.from_data({**SMALL[name].data(), "dtype": dtype})


@pytest.mark.parametrize("name", ["cls_attention", "received_attention"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("change", [1.004, float("nan")])
def test_one_wrong_score_is_found(name: str, dtype: str, change: float) -> None:
    """Even if the norm of all errors stays within its bound, as in bfloat16."""
    last = (1, 38) if name == "cls_attention" else (52,)

    def fault(scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[last] *= change
        return scores

    result = verify(Backend("faulty", faulty(name, fault)), [score_case(name, dtype)])
    (found,) = result["operators"][name]["differences"]
    assert (found["output"], found["position"]) == ("scores", list(last))
    assert found["wrong_elements"] == 1
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("name", ["cls_attention", "received_attention"])
def test_many_slightly_wrong_scores_are_found(name: str) -> None:
    """Each error is within the bound of a single one."""
    operators = faulty(name, lambda scores: scores * (1 + 1e-4))
    result = verify(Backend("faulty", operators), [score_case(name, "float32")])
    (found,) = result["operators"][name]["differences"]
    assert found["error_norm"] > found["allowed_norm"]
    assert found["wrong_elements"] > 1


@pytest.mark.parametrize("name", ["cls_attention", "received_attention"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scores_within_their_bound_are_right(name: str, dtype: str) -> None:
    case = score_case(name, dtype)
    assert verify(Backend("reference", reference), [case])["equal"]
    other = faulty(name, lambda scores: scores * (1 + 1e-9) + 1e-12)
    assert verify(Backend("other", other), [case])["equal"]


def test_the_first_of_several_wrong_elements_is_reported() -> None:
    operators = faulty("dedup", lambda r: flipped(flipped(r, (1, 6)), (1, 2)))
    result = verify(Backend("faulty", operators), [SMALL["dedup"]])
    (found,) = result["operators"]["dedup"]["differences"]
    assert (found["position"], found["wrong_elements"]) == ([1, 2], 2)


def test_minus_zero_is_not_zero() -> None:
    case = Case("topk", (8,), 1, None, 8, attention="negative_zero")
    operators = faulty("topk", lambda r: r._replace(scores=-r.scores))
    (found,) = verify(Backend("faulty", operators), [case])["operators"]["topk"]["differences"]
    assert (found["got"], found["want"]) == ("-0.0 (0x80000000)", "0.0 (0x00000000)")


@pytest.mark.parametrize(
    "fault",
    [
        lambda r: r._replace(feats=r.feats[:, :-1]),
        lambda r: r._replace(feats=r.feats.float()),
        lambda r: r._replace(indices=r.indices.int()),
        lambda r: r._replace(indices=None),
    ],
)
def test_wrong_shapes_and_dtypes_are_found(fault: Callable[[Any], Any]) -> None:
    result = verify(Backend("faulty", faulty("prune", fault)), [SMALL["prune"]])
    (found,) = result["operators"]["prune"]["differences"]
    assert "position" not in found
    assert found["got"] != found["want"]


def test_wrong_bounds_of_packed_images_are_found() -> None:
    operators = faulty("prune_varlen", lambda r: r._replace(cu_seqlens=(0, 9, 18, 18)))
    result = verify(Backend("faulty", operators), [SMALL["prune_varlen"]])
    (found,) = result["operators"]["prune_varlen"]["differences"]
    assert (found["got"], found["want"]) == ("(0, 9, 18, 18)", "(0, 9, 9, 18)")


@pytest.mark.parametrize(
    ("stage", "plan"), [(s, p) for s, names in STAGES.items() for p in names if s != "cpu"]
)
def test_a_fault_under_one_plan_is_found(stage: str, plan: str) -> None:
    plans = CudaPlans()
    operators = faulty(
        "dedup", lambda indices: flipped(indices, (0, 2)), lambda: plans.forced[stage] == plan
    )
    backend = Backend("faulty", operators, plans, {"cpu": "auto"})
    result = verify(backend, [SMALL["dedup"]])
    found = result["operators"]["dedup"]["differences"][0]
    if plan == "auto":
        assert found["plans"] == {"cpu": "auto"}
    else:
        assert found["plans"] == {"cpu": "auto", stage: plan}
        assert result["operators"]["dedup"]["wrong_cases"] == 1
        assert f"no right result with {stage}={plan}" in result["problems"]


def test_only_the_first_differences_are_kept() -> None:
    many = [Case("dedup", (40,), 8, None, 9, seed=seed) for seed in range(10)]
    operators = faulty("dedup", lambda indices: indices + 1)
    counts = verify(Backend("faulty", operators), many)["operators"]["dedup"]
    assert counts["wrong_cases"] == 10
    assert [d["case"].get("seed", 0) for d in counts["differences"]] == [*range(MOST_DIFFERENCES)]


def refusing(error: Exception, when: Callable[[], bool] = lambda: True) -> Any:
    def fault(result: Any) -> Any:
        raise error

    return faulty("dedup", fault, when)


def test_an_exception_is_a_difference() -> None:
    operators = refusing(RuntimeError("invalid\nargument"))
    result = verify(Backend("faulty", operators), [SMALL["dedup"], SMALL["topk"]])
    (found,) = result["operators"]["dedup"]["differences"]
    assert found["error"] == "RuntimeError: invalid argument"
    assert not result["equal"]
    assert result["operators"]["topk"]["wrong_cases"] == 0


@pytest.mark.parametrize(
    ("tokens", "plan", "refused"),
    [
        (400, "lists_shared", False),
        (401, "lists_shared", True),
        (401, "state_shared", False),
        (401, "workspace", False),
    ],
)
def test_a_plan_that_need_not_fit_may_be_refused(tokens: int, plan: str, refused: bool) -> None:
    plans = CudaPlans()
    operators = refusing(RuntimeError("does not fit"), lambda: plans.forced["dedup"] == plan)
    case = Case("dedup", (tokens,), 4, None, 300, step=50)
    backend = Backend("old", operators, plans, {"cpu": "auto"})
    result = verify(backend, [case, SMALL["topk"]])
    counts = result["operators"]["dedup"]
    assert (counts["refused"], counts["wrong_cases"]) == ((1, 0) if refused else (0, 1))
    # It was right in no other case.
    assert result["problems"] == [f"no right result with dedup={plan}"]


@pytest.mark.parametrize("can", [True, False])
def test_dependent_launches_may_be_refused_by_an_older_gpu(can: bool) -> None:
    plans = CudaPlans()
    operators = refusing(RuntimeError("9.0"), lambda: plans.forced["launch"] == "dependent")
    backend = Backend("gpu", operators, plans, {"cpu": "auto"}, dependent_launches=can)
    counts = verify(backend, [SMALL["dedup"]])["operators"]["dedup"]
    assert (counts["refused"], counts["wrong_cases"]) == ((0, 1) if can else (1, 0))


def test_a_plan_that_takes_no_effect_is_found() -> None:
    plans = CudaPlans()
    plans.current = lambda: {**plans.forced, "gram": "auto"}  # type: ignore[method-assign]
    backend = Backend("gpu", machine.operators("cpu"), plans, {"cpu": "auto"})
    found = verify(backend, [SMALL["dedup"]])["operators"]["dedup"]["differences"][0]
    assert found["error"] == "gram=tiles_32 was forced, auto is in use"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("12 TiB"), RuntimeError("CUDA out of memory. Tried ...")]
)
def test_too_little_memory_is_no_difference(error: Exception) -> None:
    operators = refusing(error)
    result = verify(Backend("small", operators), [SMALL["dedup"]])
    assert result["equal"]
    assert result["operators"]["dedup"]["skipped"] == 1
    assert result["operators"]["dedup"]["runs"] == 0


def test_a_failed_device_ends_the_verification() -> None:
    operators = refusing(RuntimeError("illegal address"))
    many = [Case("dedup", (10,), 4, None, 3, seed=seed) for seed in range(100)]
    result = verify(Backend("gone", operators), many)
    assert result["operators"]["dedup"]["cases"] == MOST_ERRORS
    assert result["problems"] == [
        f"skipped {100 - MOST_ERRORS} cases after {MOST_ERRORS} failed in a row"
    ]


@pytest.mark.parametrize(("how", "least"), [("each", 50), ("turns", 3)])
def test_every_plan_of_every_stage_is_tried(how: str, least: int) -> None:
    backend = Backend("gpu", machine.operators("cpu"), CudaPlans(), {"cpu": "auto"})
    result = verify(backend, select(cases(), quick=True), plans=how)
    assert result["equal"], result
    assert set(result["plans"]) == set(STAGES) - {"cpu"}
    for stage, names in result["plans"].items():
        assert set(names) == set(STAGES[stage])
        assert min(names.values()) > least, stage
    runs = sum(counts["runs"] for counts in result["operators"].values())
    of = sum(counts["cases"] for counts in result["operators"].values())
    assert (runs > 8 * of) if how == "each" else (runs < 2 * of)


def test_settings_of_a_case() -> None:
    backend = Backend("gpu", machine.operators("cpu"), CudaPlans(), {"cpu": "auto"})
    tried = list(settings(backend, Case("dedup", (700,), 4, None, 300)))
    assert tried[0] == {}
    assert all(len(plans) == 1 for plans in tried[1:])
    assert {"neighbours": "warp_576"} not in tried
    assert {"neighbours": "warp_1024"} in tried
    topk = list(settings(backend, Case("topk", (700,), 1)))
    assert {next(iter(plans)) for plans in topk[1:]} == {"rank", "launch"}
    assert list(settings(backend, SMALL["cls_attention"])) == [{}]


def test_unknown_way_to_try_plans() -> None:
    with pytest.raises(ValueError, match="plans must be each, combined or turns, got 'all'"):
        verify(Backend("cpu", machine.operators("cpu")), [], plans="all")


def test_combinations_of_all_stages_are_tried() -> None:
    backend = Backend("gpu", machine.operators("cpu"), CudaPlans(), {"cpu": "auto"})
    for case in cases(["prune_varlen"]):
        combined = [s for s in settings(backend, case) if len(s) > 1]
        if combined:
            wanted = itertools.product(*(STAGES[s][1:] for s in STAGES if s != "cpu"))
            assert [tuple(plans.values()) for plans in combined] == list(wanted)
            assert not [s for s in settings(backend, case, combinations=False) if len(s) > 1]
            return
    pytest.fail("no case with combinations")


def test_a_known_answer_is_compared_without_the_reference(monkeypatch: Any) -> None:
    case = Case("dedup", (20,), 8, None, 4)
    right = reference.dedup(case.arguments()[0][0], 4).tolist()
    monkeypatch.setattr(reference, "dedup", None)
    backend = Backend("cpu", machine.operators("cpu"))
    assert verify(backend, [], [KnownAnswer(case, {"indices": right})])["equal"]
    right[0][3] += 1
    result = verify(backend, [], [KnownAnswer(case, {"indices": right})])
    assert result["known_answers"]["differences"][0]["position"] == [0, 3]


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    used: list[int] = []
    others: list[int] = []
    operators = faulty("topk", lambda result: used.append(torch.get_num_threads()) or result)
    verify(
        Backend("cpu", operators),
        [SMALL["topk"]],
        progress=lambda done, total, result: others.append(torch.get_num_threads()),
    )
    assert used == [before]
    assert others == [1]  # inputs, references, comparisons
    assert torch.get_num_threads() == before


def test_progress_and_counts() -> None:
    seen: list[tuple[int, int, int]] = []
    backend = Backend("cpu", machine.operators("cpu"))

    def progress(done: int, total: int, unfinished: Result) -> None:
        cases = sum(counts["cases"] for counts in unfinished["operators"].values())
        seen.append((done, total, cases))
        assert not unfinished["equal"]

    result = verify(backend, SMALL.values(), progress=progress)
    assert seen == [(i, len(SMALL), i) for i in range(1, len(SMALL) + 1)]
    assert list(result["operators"]) == list(OPERATORS)
    assert result["seconds"] >= sum(c["seconds"] for c in result["operators"].values())
