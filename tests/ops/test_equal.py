"""Reference, C++ and CUDA kernels return bitwise the same, for random and adversarial problems."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import RANDOM_CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import bitwise_equal
from support.compiled_kernels import A100, ADA, BLACKWELL, H100, Device, Kernels
from support.problems import PARAMETERS, Problem, crowded, problems, problems_of, widest

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
@given(problem=problems())
def test_prune(problem: Problem, installed: dict[str, Any], count_equal: Counter[str]) -> None:
    feats, attn = problem.tensors()
    compare(installed, count_equal, "prune", feats, attn, problem.k, **problem.keywords())


@st.composite
def packings(draw: st.DrawFn, tokens: int, k: int) -> tuple[list[int], int | list[int]]:
    """cu_seqlens and k for that many packed tokens."""
    inner = draw(st.lists(st.integers(0, tokens), max_size=4))
    bounds = [0, *sorted(inner), tokens]
    images = len(bounds) - 1
    each = st.lists(st.integers(1, tokens), min_size=images, max_size=images)
    return bounds, draw(st.one_of(st.just(k), each))


@settings(max_examples=share(0.2))
@given(problem=problems(), data=st.data())
def test_prune_varlen(
    problem: Problem, data: st.DataObject, installed: dict[str, Any], count_equal: Counter[str]
) -> None:
    feats, attn = (t[0] for t in problem.tensors())
    packing = data.draw(packings(problem.tokens, problem.k))
    compare(installed, count_equal, "prune_varlen", feats, attn, *packing, **problem.keywords())


@pytest.mark.parametrize("method", PARAMETERS)
@settings(max_examples=share(0.1))
@given(data=st.data())
def test_methods(
    method: str, data: st.DataObject, installed: dict[str, Any], count_equal: Counter[str]
) -> None:
    problem = data.draw(problems_of(method))
    feats, attn = problem.tensors()
    compare(installed, count_equal, "prune", feats, attn, problem.k, **problem.keywords())


@pytest.mark.parametrize("method", PARAMETERS)
@settings(max_examples=share(0.04))
@given(data=st.data())
def test_methods_varlen(
    method: str, data: st.DataObject, installed: dict[str, Any], count_equal: Counter[str]
) -> None:
    problem = data.draw(problems_of(method))
    feats, attn = (t[0] for t in problem.tensors())
    packing = data.draw(packings(problem.tokens, problem.k))
    compare(installed, count_equal, "prune_varlen", feats, attn, *packing, **problem.keywords())


@settings(max_examples=share(0.1))
@given(problem=problems(most_tokens=200))
def test_topk(problem: Problem, installed: dict[str, Any], count_equal: Counter[str]) -> None:
    _, attn = problem.tensors()
    compare(installed, count_equal, "topk", attn, problem.k)


@settings(max_examples=share(0.1))
@given(problem=problems())
def test_dedup(problem: Problem, installed: dict[str, Any], count_equal: Counter[str]) -> None:
    feats, _ = problem.tensors()
    compare(installed, count_equal, "dedup", feats, problem.k, step=problem.step)


@settings(max_examples=share(0.1))
@given(problem=problems())
def test_pairwise_cosine(
    problem: Problem, installed: dict[str, Any], count_equal: Counter[str]
) -> None:
    feats, _ = problem.tensors()
    compare(installed, count_equal, "pairwise_cosine", feats)


# ---- the same on the compiled CUDA kernels ----------------------------------------------------
@dataclass(frozen=True)
class Run:
    """How the executor runs the kernels: the GPU, the order and the plans."""

    device: Device
    seed: int
    lockstep: bool
    quantum: int
    plans: dict[str, str]

    def set_up(self, kernels: Kernels) -> Kernels:
        kernels.reset()
        kernels.device = self.device
        kernels.options = {"seed": self.seed, "lockstep": self.lockstep, "quantum": self.quantum}
        kernels.plans.select(**self.plans)
        return kernels


@st.composite
def runs(draw: st.DrawFn) -> Run:
    device = draw(st.sampled_from([H100, H100, A100, ADA, BLACKWELL]))
    launches = ["ordered", "dependent"] if device.major >= 9 else ["ordered"]
    auto_or = lambda *plans: st.sampled_from(["auto", *plans])  # noqa: E731
    return Run(
        device,
        draw(st.integers(0, 2**16)),
        draw(st.sampled_from([True, True, True, False])),
        draw(st.sampled_from([0, 0, 40])),
        {
            "rank": draw(auto_or("tokens_8", "tokens_32")),
            "gram": draw(auto_or("tiles_32", "tiles_64", "tiles_128")),
            "neighbours": draw(auto_or("block_4096")),
            "dedup": draw(auto_or("state_shared", "workspace")),
            "sort": draw(auto_or("buckets", "counting")),  # most are too short for buckets
            "launch": draw(st.sampled_from(launches)),
        },
    )


@settings(max_examples=share(0.04))
@given(problem=problems(), run=runs())
def test_prune_compiled(
    problem: Problem, run: Run, compiled_session: Kernels, count_equal: Counter[str]
) -> None:
    feats, attn = problem.tensors()
    kernels = {"compiled kernels": run.set_up(compiled_session)}
    compare(kernels, count_equal, "prune", feats, attn, problem.k, **problem.keywords())


@pytest.mark.parametrize("method", PARAMETERS)
@settings(max_examples=share(0.01))
@given(data=st.data(), run=runs())
def test_methods_compiled(
    method: str,
    data: st.DataObject,
    run: Run,
    compiled_session: Kernels,
    count_equal: Counter[str],
) -> None:
    problem = data.draw(problems_of(method))
    feats, attn = problem.tensors()
    kernels = {"compiled kernels": run.set_up(compiled_session)}
    compare(kernels, count_equal, "prune", feats, attn, problem.k, **problem.keywords())
    packing = data.draw(packings(problem.tokens, problem.k))
    flat, flat_attn = feats[0], attn[0]
    compare(kernels, count_equal, "prune_varlen", flat, flat_attn, *packing, **problem.keywords())


@settings(max_examples=share(0.02))
@given(problem=problems(), data=st.data(), run=runs())
def test_prune_varlen_compiled(
    problem: Problem,
    data: st.DataObject,
    run: Run,
    compiled_session: Kernels,
    count_equal: Counter[str],
) -> None:
    feats, attn = (t[0] for t in problem.tensors())
    packing = data.draw(packings(problem.tokens, problem.k))
    kernels = {"compiled kernels": run.set_up(compiled_session)}
    compare(kernels, count_equal, "prune_varlen", feats, attn, *packing, **problem.keywords())


@settings(max_examples=share(0.02))
@given(problem=problems(), run=runs())
def test_stages_compiled(
    problem: Problem, run: Run, compiled_session: Kernels, count_equal: Counter[str]
) -> None:
    feats, attn = problem.tensors()
    kernels = {"compiled kernels": run.set_up(compiled_session)}
    compare(kernels, count_equal, "topk", attn, problem.k)
    compare(kernels, count_equal, "dedup", feats, problem.k, step=problem.step)
    compare(kernels, count_equal, "pairwise_cosine", feats)


# Real shapes, and those at which the kernels change their algorithm.
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


# Those at which the greedy kernels have more tokens per thread: 1024, 2048 and 4096.
LARGE += [
    Problem(1, tokens, 12, None, k, features=features, attention="ties", method=method)
    for tokens, k, features in (
        (576, 64, "clustered"),
        (1025, 20, "smooth"),
        (2049, 8, "duplicates"),
        (4100, 6, "few_values"),
    )
    for method in ("maxmin", "scope", "mmr")
]


@pytest.mark.parametrize("problem", LARGE, ids=str)
def test_large(problem: Problem, implementations: dict[str, Any]) -> None:
    feats, attn = problem.tensors()
    expected = reference.prune(feats, attn, problem.k, **problem.keywords())
    for name, implementation in implementations.items():
        actual = implementation.prune(feats, attn, problem.k, **problem.keywords())
        assert_equal(expected, actual, name)


def test_the_most_channels(implementations: dict[str, Any]) -> None:
    feats = widest()
    expected = reference.pairwise_cosine(feats)
    for name, implementation in implementations.items():
        assert_equal(expected, implementation.pairwise_cosine(feats), name)


@pytest.mark.parametrize("dedup", ["lists_shared", "state_shared", "workspace"])
@pytest.mark.parametrize("sort", ["auto", "buckets", "counting"])
@pytest.mark.parametrize(
    "problem",
    [
        Problem(2, 300, 32, 2, 33, features="clustered", dtype=torch.float16),
        Problem(1, 1040, 16, None, 60, 0.1, 100, features="smooth"),  # A is too long to be counted
    ],
    ids=lambda problem: f"{problem.tokens} tokens",
)
def test_every_variant_of_the_loop(
    problem: Problem, sort: str, dedup: str, implementations: dict[str, Any]
) -> None:
    """Neighbour lists in shared memory or not, the loop's state in shared memory or not; all
    ranking algorithms."""
    feats, attn = problem.tensors()
    expected = reference.prune(feats, attn, problem.k, **problem.keywords())
    for name, implementation in implementations.items():
        if "dedup" in implementation.plans.choices():
            with implementation.plans.use(dedup=dedup, sort=sort):
                got = implementation.prune(feats, attn, problem.k, **problem.keywords())
            assert_equal(expected, got, name)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("method", PARAMETERS)
def test_every_order_of_threads_of_methods(
    method: str, lockstep: bool, seed: int, compiled: Kernels
) -> None:
    compiled.options = {"seed": seed, "lockstep": lockstep, "quantum": 40}
    problem = Problem(2, 150, 16, 2, 33, features="clustered", method=method)
    feats, attn = problem.tensors()
    expected = reference.prune(feats, attn, problem.k, **problem.keywords())
    got = compiled.prune(feats, attn, problem.k, **problem.keywords())
    assert_equal(expected, got, method)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("device", [H100, A100], ids=["sm_90", "sm_80"])
def test_every_order_of_threads(
    device: Device, lockstep: bool, seed: int, compiled: Kernels
) -> None:
    """Blocks, warps and threads in different orders, preempted after at most 40 instructions."""
    compiled.device = device
    compiled.options = {"seed": seed, "lockstep": lockstep, "quantum": 40}
    problem = Problem(2, 150, 32, 2, 33, features="clustered", dtype=torch.float16)
    feats, attn = problem.tensors()
    expected = reference.prune(feats, attn, problem.k, **problem.keywords())
    for sort in ("buckets", "counting"):
        with compiled.plans.use(sort=sort):
            got = compiled.prune(feats, attn, problem.k, **problem.keywords())
        assert_equal(expected, got, sort)


def can_depend(implementation: Any) -> bool:
    """Whether its GPU has dependent launches."""
    if isinstance(implementation, Kernels):
        return implementation.device.major >= 9
    return torch.cuda.get_device_capability()[0] >= 9


@pytest.mark.parametrize("rank", ["tokens_8", "tokens_32"])
@pytest.mark.parametrize("gram", ["tiles_32", "tiles_64", "tiles_128"])
@pytest.mark.parametrize("launch", ["ordered", "dependent"])
def test_every_block_size_and_launch(
    rank: str, gram: str, launch: str, implementations: dict[str, Any]
) -> None:
    """Blocks of the first two kernels; kernels one after the other or overlapped."""
    for problem in (
        Problem(2, 300, 40, 2, 33, features="clustered", dtype=torch.float16),
        Problem(1, 161, 200, None, 5, features="smooth"),
    ):
        feats, attn = problem.tensors()
        expected = reference.prune(feats, attn, problem.k, **problem.keywords())
        cosine = reference.pairwise_cosine(feats)
        for name, implementation in implementations.items():
            if "gram" not in implementation.plans.choices():
                continue
            if launch == "dependent" and not can_depend(implementation):
                continue  # test_plans.py checks that it is refused
            with implementation.plans.use(rank=rank, gram=gram, launch=launch):
                got = implementation.prune(feats, attn, problem.k, **problem.keywords())
                assert_equal(expected, got, name)
                assert torch.equal(implementation.pairwise_cosine(feats), cosine), name


@pytest.mark.parametrize(
    "plan", ["warp_576", "warp_1024", "block_4096", "block_16384", "block_32768"]
)
@pytest.mark.parametrize("features", ["smooth", "few_values"])
def test_every_kernel_of_neighbours(
    plan: str, features: str, implementations: dict[str, Any]
) -> None:
    """The kernels for long rows, on short ones as well."""
    problem = Problem(1, 140, 16, None, 20, 0.1, features=features)
    feats, attn = problem.tensors()
    expected = reference.prune(feats, attn, problem.k, **problem.keywords())
    for name, implementation in implementations.items():
        if "neighbours" in implementation.plans.choices():
            with implementation.plans.use(neighbours=plan):
                got = implementation.prune(feats, attn, problem.k, **problem.keywords())
            assert_equal(expected, got, name)


@pytest.mark.parametrize("identical", [31, 32, 33, 127, 128, 129, 256])
@pytest.mark.parametrize("dedup", ["lists_shared", "workspace"])  # these have other buckets
def test_buckets_that_are_full(identical: int, dedup: str, implementations: dict[str, Any]) -> None:
    feats = crowded(identical)
    k = feats.shape[1] - 40
    expected = reference.dedup(feats, k, step=7)
    for name, implementation in implementations.items():
        plan = {"dedup": dedup} if "dedup" in implementation.plans.choices() else {}
        with implementation.plans.use(**plan):
            assert torch.equal(implementation.dedup(feats, k, step=7), expected), name


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
