"""Reference, C++ and kernels return bitwise the same, for random and adversarial problems."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import RANDOM_CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from support import host_kernels
from support.backends import bitwise_equal
from support.problems import Problem, problems

from vispruner_cuda import reference


def share(of_all: float) -> int:
    return max(1, round(RANDOM_CASES * of_all))


def assert_equal(expected: Any, actual: Any, what: str) -> None:
    """Named tuples field by field, tensors bit by bit."""
    fields = getattr(expected, "_fields", None)
    pairs = zip(expected, actual, strict=True) if fields else [(expected, actual)]
    for i, (want, got) in enumerate(pairs):
        name = f"{what}: {fields[i]}" if fields else what
        if isinstance(want, torch.Tensor):
            assert bitwise_equal(want, got), name
        else:
            assert want == got, name


def compare(
    implementations: dict[str, Any], counts: Counter[str], function: str, *args: Any, **kw: Any
) -> None:
    expected = getattr(reference, function)(*args, **kw)
    for name, implementation in implementations.items():
        assert_equal(expected, getattr(implementation, function)(*args, **kw), name)
        counts[f"random {function}, {name}"] += 1


@settings(max_examples=share(0.5))
@given(problem=problems(), sort=st.sampled_from(["by length", "buckets"]))
def test_prune(
    problem: Problem, sort: str, implementations: dict[str, Any], count_equal: Counter[str]
) -> None:
    feats, attn = problem.tensors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISPRUNER_SORT_PLAN", sort)  # these are too short for buckets by themselves
        compare(implementations, count_equal, "prune", feats, attn, problem.k, **problem.keywords())


@settings(max_examples=share(0.2))
@given(problem=problems(), data=st.data())
def test_prune_varlen(
    problem: Problem,
    data: st.DataObject,
    implementations: dict[str, Any],
    count_equal: Counter[str],
) -> None:
    feats, attn = (t[0] for t in problem.tensors())
    inner = data.draw(st.lists(st.integers(0, problem.tokens), max_size=4), label="cuts")
    bounds = [0, *sorted(inner), problem.tokens]
    ks = data.draw(
        st.one_of(
            st.just(problem.k),
            st.lists(
                st.integers(1, problem.tokens), min_size=len(bounds) - 1, max_size=len(bounds) - 1
            ),
        ),
        label="k",
    )
    compare(
        implementations, count_equal, "prune_varlen", feats, attn, bounds, ks, **problem.keywords()
    )


@settings(max_examples=share(0.1))
@given(problem=problems(most_tokens=200))
def test_topk(problem: Problem, implementations: dict[str, Any], count_equal: Counter[str]) -> None:
    _, attn = problem.tensors()
    compare(implementations, count_equal, "topk", attn, problem.k)


@settings(max_examples=share(0.1))
@given(problem=problems())
def test_dedup(
    problem: Problem, implementations: dict[str, Any], count_equal: Counter[str]
) -> None:
    feats, _ = problem.tensors()
    compare(implementations, count_equal, "dedup", feats, problem.k, step=problem.step)


@settings(max_examples=share(0.1))
@given(problem=problems())
def test_pairwise_cosine(
    problem: Problem, implementations: dict[str, Any], count_equal: Counter[str]
) -> None:
    feats, _ = problem.tensors()
    compare(implementations, count_equal, "pairwise_cosine", feats)


# Real shapes and those at which the kernels change their way.
LARGE = [
    Problem(1, 576, 1024, 16, 64, dtype=torch.float16),
    Problem(2, 576, 1024, None, 64, features="clustered", dtype=torch.bfloat16),
    Problem(1, 577, 129, 3, 63, features="smooth"),
    Problem(1, 729, 96, None, 128, features="duplicates"),
    Problem(1, 1025, 40, 2, 100, step=16, features="few_values"),  # lists in two blocks' rows
    Problem(1, 1300, 24, None, 32, 0.25, 64, features="clustered"),
    Problem(1, 1500, 3, None, 32, 0.25, 64, features="few_values"),  # crowded buckets: merging
    Problem(1, 2500, 16, None, 300, 0.5, 200, features="smooth", attention="ties"),
    Problem(1, 4200, 8, None, 2048, 0.0, 500, features="constant"),
    Problem(1, 100, 5000, None, 10, features="outliers"),  # sums beyond 32 bits
    Problem(1, 40, 8192, None, 7, features="constant"),  # the largest possible sums
]


@pytest.mark.parametrize("problem", LARGE, ids=str)
def test_large(problem: Problem, implementations: dict[str, Any]) -> None:
    feats, attn = problem.tensors()
    expected = reference.prune(feats, attn, problem.k, **problem.keywords())
    for name, implementation in implementations.items():
        actual = implementation.prune(feats, attn, problem.k, **problem.keywords())
        assert_equal(expected, actual, name)


PLANS = ("lists_shared", "state_shared", "workspace")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("sort", ["by length", "buckets", "counting"])
@pytest.mark.parametrize("schedule", [0, 1, 11])
@pytest.mark.parametrize(
    "problem",
    [
        Problem(2, 300, 32, 2, 33, features="clustered", dtype=torch.float16),
        Problem(1, 1100, 16, None, 60, 0.1, 100, features="smooth"),
    ],
    ids=str,
)
def test_every_plan(
    problem: Problem,
    schedule: int,
    sort: str,
    plan: str,
    host_kernels_default: host_kernels.Kernels,
    implementations: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neighbour lists in shared memory or not, the loop's state in shared memory or not; ranking
    in every way."""
    monkeypatch.setenv("VISPRUNER_DEDUP_PLAN", plan)
    monkeypatch.setenv("VISPRUNER_SORT_PLAN", sort)
    host_kernels_default.schedule = schedule
    feats, attn = problem.tensors()
    expected = reference.prune(feats, attn, problem.k, **problem.keywords())
    for name, implementation in implementations.items():
        got = implementation.prune(feats, attn, problem.k, **problem.keywords())
        assert_equal(expected, got, name)


@pytest.mark.parametrize("rank", ["tokens_8", "tokens_32"])
@pytest.mark.parametrize("gram", ["tiles_32", "tiles_64", "tiles_128"])
@pytest.mark.parametrize("launch", ["ordered", "dependent"])
def test_every_block_size_and_launch(
    rank: str,
    gram: str,
    launch: str,
    implementations: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of the first two kernels; kernels one after the other or overlapped (on a GPU)."""
    monkeypatch.setenv("VISPRUNER_RANK_PLAN", rank)
    monkeypatch.setenv("VISPRUNER_GRAM_PLAN", gram)
    monkeypatch.setenv("VISPRUNER_LAUNCH", launch)
    for problem in (
        Problem(2, 300, 40, 2, 33, features="clustered", dtype=torch.float16),
        Problem(1, 161, 200, None, 5, features="smooth"),
    ):
        feats, attn = problem.tensors()
        expected = reference.prune(feats, attn, problem.k, **problem.keywords())
        cosine = reference.pairwise_cosine(feats)
        for name, implementation in implementations.items():
            got = implementation.prune(feats, attn, problem.k, **problem.keywords())
            assert_equal(expected, got, name)
            assert torch.equal(implementation.pairwise_cosine(feats), cosine), name


@pytest.mark.parametrize("shared_limit", [host_kernels.ADA_SHARED, 32 * 1024, 8 * 1024])
def test_smaller_gpus(shared_limit: int, host_kernels_default: host_kernels.Kernels) -> None:
    """The plan follows from the shared memory there is."""
    host_kernels_default.shared_limit = shared_limit
    problem = Problem(1, 600, 32, 2, 33, features="clustered")
    feats, attn = problem.tensors()
    expected = reference.prune(feats, attn, problem.k)
    assert_equal(expected, host_kernels_default.prune(feats, attn, problem.k), "host")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_read_exactly(
    dtype: torch.dtype, implementations: dict[str, Any]
) -> None:
    """All 65536 bit patterns: as scores (rank them) and, finite ones, as features."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    every = bits.view(dtype)
    attn = every.reshape(4, -1)
    expected = reference.topk(attn, attn.shape[1])
    feats = every[torch.isfinite(every)][: 64 * 960].reshape(1, 960, 64)
    cosines = reference.pairwise_cosine(feats)
    for name, implementation in implementations.items():
        assert_equal(expected, implementation.topk(attn, attn.shape[1]), name)
        assert_equal(cosines, implementation.pairwise_cosine(feats), name)
