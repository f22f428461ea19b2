"""Detects errors of a build of the kernels, as quickly as possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from support.compiled_kernels import A100, H100, Device, FindingsError, Kernels
from support.problems import NEAR_48_KIB, Problem, crowded, widest
from vispruner_cuda import methods, reference

#: The results differ from the reference, or an operator raises.
RESULTS = "results"

PROBLEMS = [
    Problem(2, 130, 33, 5, 20, features="clustered"),
    Problem(1, 200, 20, None, 17, features="few_values", attention="ties", dtype=torch.float16),
    Problem(1, 90, 31, 2, 9, features="constant", attention="constant", dtype=torch.bfloat16),
    Problem(1, 300, 640, 3, 30, dtype=torch.float16),
    NEAR_48_KIB[0],
    Problem(1, 1100, 16, None, 40, 0.0, 300, features="clustered"),
    Problem(1, 1200, 3, None, 40, 0.0, 300, features="few_values", attention="ties"),
    Problem(1, 400, 16, None, 150, step=64, features="smooth", dtype=torch.float16),
]
OF_METHODS = (
    [
        Problem(2, 130, 33, 5, 20, features="clustered", method=method, attention="sorted")
        for method in methods.METHODS
        if method != methods.DEFAULT
    ]
    + [
        Problem(1, 1100, 6, None, 25, features="few_values", attention="ties", method=method)
        for method in ("random", "maxmin", "scope", "mmr")
    ]
    + [
        Problem(1, 70, 9, None, 30, features="signed", method="mmr"),
        Problem(1, 600, 3, None, 90, features="few_values", attention="constant", method="scope"),
        # Lists in two parts.
        Problem(1, 2060, 8, None, 9, features="duplicates", attention="ties", method="scope"),
        Problem(2, 40, 3, None, 1, method="scope"),
        # The first pick covers all.
        Problem(1, 40, 3, None, 5, features="constant", attention="constant", method="scope"),
        Problem(1, 90, 20, None, 11, method="random", parameter=3),
        Problem(1, 70, 5, None, 80, method="maxmin"),  # all tokens stay
        # Gains so close that the last digit of one coverage decides.
        Problem(
            1, 60, 8, None, 40, features="duplicates", attention="constant", seed=62, method="scope"
        ),
        Problem(
            1, 60, 8, None, 40, features="clustered", attention="constant", seed=1, method="scope"
        ),
    ]
)
#: With a state in memory. Seconds, unlike the others.
LARGE = Problem(1, 4100, 4, None, 5, features="few_values", method="scope")


def _prune(kernels: Kernels, problem: Problem) -> bool:
    feats, attn = problem.tensors()
    got = kernels.prune(feats, attn, problem.k, **problem.keywords())
    want = reference.prune(feats, attn, problem.k, **problem.keywords())
    scores = kernels.topk(attn, problem.tokens).scores
    return (
        torch.equal(got.indices, want.indices)
        and torch.equal(got.feats, want.feats)
        and torch.equal(scores, reference.topk(attn, problem.tokens).scores)
    )


def _ragged(kernels: Kernels, method: str) -> bool:
    """Images of which all tokens or some are retained, and one without tokens."""
    feats, attn = Problem(1, 150, 9, 3, 5, features="clustered").tensors()
    packing = ([0, 30, 30, 31, 90, 150], [40, 3, 1, 1, 20])
    got = kernels.prune_varlen(feats[0], attn[0], *packing, method=method)
    want = reference.prune_varlen(feats[0], attn[0], *packing, method=method)
    return torch.equal(got.indices, want.indices) and torch.equal(got.feats, want.feats)


def _dedup(kernels: Kernels) -> bool:
    feats = crowded(128)  # the most that a bucket may have
    return torch.equal(kernels.dedup(feats, 200), reference.dedup(feats, 200))


def _widest(kernels: Kernels) -> bool:
    feats = widest()
    return torch.equal(kernels.pairwise_cosine(feats), reference.pairwise_cosine(feats))


def _planned(kernels: Kernels, **plans: str) -> bool:
    with kernels.plans.use(**plans):
        return all(_prune(kernels, problem) for problem in PROBLEMS[:3])


def _attention(kernels: Kernels, dtype: torch.dtype) -> bool:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn((150, 2, 40), generator=g).to(dtype) for _ in range(2))
    got = kernels.received_attention(q, k, 0.2, [0, 131, 150])
    want = reference.received_attention(q, k, 0.2, [0, 131, 150])
    lse = torch.rand(2, 150, generator=g)
    got_lse = kernels.received_attention(q, k, 0.2, [0, 131, 150], lse)
    want_lse = reference.received_attention(q, k, 0.2, [0, 131, 150], lse)
    keys = k.transpose(0, 1).unsqueeze(0)
    got_cls = kernels.cls_attention(q[:1], keys, 0.2)
    want_cls = reference.cls_attention(q[:1], keys, 0.2)
    pairs = ((got, want), (got_lse, want_lse), (got_cls, want_cls))
    return all(torch.allclose(a, b, rtol=1e-4, atol=0) for a, b in pairs)


def _refuses_to_depend(kernels: Kernels) -> bool:
    """Code from old PTX does not wait for the previous kernel."""
    kernels.device = Device(9, 0, H100.shared_bytes, newest_ptx=80)
    try:
        _planned(kernels, launch="dependent")
    except FindingsError:
        raise
    except RuntimeError:
        return True
    return False


def _probes(kernels: Kernels, device: Device, seed: int) -> Iterator[Callable[[], bool]]:
    """Cheap ones first."""
    kernels.reset()
    kernels.device = device
    kernels.options = {"seed": seed}
    for problem in PROBLEMS:
        yield lambda problem=problem: _prune(kernels, problem)
    for problem in OF_METHODS:
        yield lambda problem=problem: _prune(kernels, problem)
    for method in methods.METHODS:
        yield lambda method=method: _ragged(kernels, method)
    yield lambda: _dedup(kernels)
    yield lambda: _widest(kernels)
    for dtype in (torch.float16, torch.float32):
        yield lambda dtype=dtype: _attention(kernels, dtype)
    for gram in ("tiles_32", "tiles_64", "tiles_128"):
        yield lambda gram=gram: _planned(kernels, gram=gram, rank="tokens_32", sort="buckets")
    yield lambda: _planned(kernels, neighbours="block_4096", dedup="workspace")
    yield lambda: _prune(kernels, LARGE)


def _probes_of_sm_90(kernels: Kernels) -> Iterator[Callable[[], bool]]:
    yield from _probes(kernels, H100, 0)
    kernels.reset()
    yield lambda: _planned(kernels, launch="dependent")


def _probes_of_sm_80(kernels: Kernels) -> Iterator[Callable[[], bool]]:
    yield from _probes(kernels, A100, 5)
    kernels.reset()
    yield lambda: _refuses_to_depend(kernels)


#: Probes by the target of the code that they run. Most faults are detected by the first.
PROBES = {90: _probes_of_sm_90, 80: _probes_of_sm_80}


def _observed(probe: Callable[[], bool]) -> set[str]:
    try:
        return set() if probe() else {RESULTS}
    except FindingsError as error:
        return {found[1 : found.index("]")].split(",")[0] for found in error.findings}
    except RuntimeError:
        return {RESULTS}


def observations(kernels: Kernels, target: int) -> Iterator[str]:
    """RESULTS or the name of a checker for each error of the code for a target (80, 90) that is
    detected; nothing for correct kernels."""
    for probe in PROBES[target](kernels):
        yield from _observed(probe)
