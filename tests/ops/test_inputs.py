"""Bad input of every argument: TypeError or ValueError that names it; never a crash."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import vispruner_cuda
from vispruner_cuda import _checks, reference

F, A = torch.randn(2, 10, 4), torch.rand(2, 3, 10)
PF, PA = torch.randn(10, 4), torch.rand(3, 10)
WRONG_INTS = [("3", TypeError), (2.0, TypeError), (True, TypeError), (None, TypeError)]
# more than the operators take, and more than Python prints
WRONG_INTS += [(2**63, ValueError), (np.uint64(2**63), ValueError), (10**5000, ValueError)]

BAD: list[tuple[str, str, tuple[Any, ...], dict[str, Any], type[Exception]]] = []


def bad(function: str, argument: str, error: type[Exception], *args: Any, **keywords: Any) -> None:
    BAD.append((function, argument, args, keywords, error))


ARRAY = np.ones((2, 10, 4))  # its repr has many lines
for wrong in ([[1.0]], None, 3, ARRAY):
    bad("prune", "feats", TypeError, wrong, A, 3)
    bad("prune", "cls_attn", TypeError, F, wrong, 3)
    bad("topk", "cls_attn", TypeError, wrong, 3)
    bad("dedup", "feats", TypeError, wrong, 3)
    bad("pairwise_cosine", "feats", TypeError, wrong)
    bad("prune_varlen", "feats", TypeError, wrong, PA, [0, 10], 3)
    bad("prune_varlen", "cls_attn", TypeError, PF, wrong, [0, 10], 3)
for dtype in (torch.float64, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
    bad("prune", "feats", TypeError, F.to(dtype), A, 3)
    bad("prune", "cls_attn", TypeError, F, A.to(dtype), 3)
    bad("topk", "cls_attn", TypeError, A.to(dtype), 3)
    bad("dedup", "feats", TypeError, F.to(dtype), 3)
    bad("pairwise_cosine", "feats", TypeError, F.to(dtype))
bad("prune", "feats", TypeError, F.to_sparse(), A, 3)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is a prototype
    NESTED = torch.nested.nested_tensor([torch.ones(10, 4), torch.ones(10, 4)])
bad("prune", "feats", TypeError, NESTED, A, 3)
bad("topk", "cls_attn", TypeError, NESTED, 3)
bad("prune_varlen", "cu_seqlens", TypeError, PF[:1], PA[:, :1], torch.tensor([False, True]), 3)
bad("prune_varlen", "cu_seqlens", ValueError, PF, PA, list(range(100_000)), 3)
bad("prune_varlen", "cu_seqlens", ValueError, PF, PA, [0, 10**5000, 1], 3)
bad("prune", "feats", ValueError, F[0], A, 3)
bad("prune", "feats", ValueError, F[:, :, :0], A, 3)
bad("prune", "cls_attn", ValueError, F, A[0, 0], 3)
bad("prune", "cls_attn", ValueError, F, A[:, :0], 3)
bad("prune", "cls_attn", ValueError, F, A[:, :, :9], 3)
bad("prune", "cls_attn", ValueError, F, A[:1], 3)
bad("prune", "cls_attn", ValueError, F, A.to("meta"), 3)
bad("topk", "cls_attn", ValueError, A[0, 0], 3)
bad("topk", "cls_attn", ValueError, A[None], 3)
bad("pairwise_cosine", "feats", ValueError, F[0])
bad("dedup", "feats", ValueError, F[0], 3)
bad("prune_varlen", "feats", ValueError, F, PA, [0, 10], 3)
bad("prune_varlen", "cls_attn", ValueError, PF, PA[:, :9], [0, 10], 3)
bad("prune_varlen", "cls_attn", ValueError, PF, A, [0, 10], 3)
for value, error in [*WRONG_INTS, (0, ValueError), (-5, ValueError)]:
    bad("prune", "k", error, F, A, value)
    bad("topk", "k", error, A, value)
    bad("dedup", "k", error, F, value)
    bad("prune_varlen", "k", error, PF, PA, [0, 10], value)
    bad("prune_varlen", "k", error, PF, PA, [0, 5, 10], [3, value])
    bad("dedup", "step", error, F, 3, step=value)
    if value is not None:  # the default
        bad("prune", "step", error, F, A, 3, step=value)
        bad("prune_varlen", "step", error, PF, PA, [0, 10], 3, step=value)
for ratio, error in [
    (-0.1, ValueError),
    (1.1, ValueError),
    (float("nan"), ValueError),
    (float("inf"), ValueError),
    ("0.5", TypeError),
    (True, TypeError),
    (ARRAY, TypeError),
    (10**5000, ValueError),
]:
    bad("prune", "important_ratio", error, F, A, 3, important_ratio=ratio)
    bad("prune_varlen", "important_ratio", error, PF, PA, [0, 10], 3, important_ratio=ratio)
for bounds in ([], [0], [1, 10], [0, 9], [0, 11], [0, 7, 5, 10], [-1, 10]):
    bad("prune_varlen", "cu_seqlens", ValueError, PF, PA, bounds, 3)
bad("prune_varlen", "cu_seqlens", ValueError, PF, PA, torch.tensor([0, 10], device="meta"), 3)
bad("prune_varlen", "cu_seqlens", TypeError, PF, PA, torch.tensor([0.0, 10.0]), 3)
bad("prune_varlen", "cu_seqlens", TypeError, PF, PA, "0", 3)
bad("prune_varlen", "cu_seqlens", TypeError, PF, PA, 10, 3)
bad("prune_varlen", "cu_seqlens", TypeError, PF, PA, [0, 10.0], 3)
bad("prune_varlen", "k", ValueError, PF, PA, [0, 5, 10], [3])
for method, error in [
    ("divprune", ValueError),
    ("", ValueError),
    (None, TypeError),
    (3, TypeError),
]:
    bad("prune", "method", error, F, A, 3, method=method)
    bad("prune_varlen", "method", error, PF, PA, [0, 10], 3, method=method)
for method, name, value, error in [
    ("maxmin", "important_ratio", 0.5, ValueError),  # of another method
    ("mmr", "step", 8, ValueError),
    ("vispruner", "seed", 0, ValueError),
    ("topk", "mmr_lambda", 1.0, ValueError),
    ("random", "scope_alpha", 1.0, ValueError),
    ("random", "seed", -1, ValueError),
    ("random", "seed", 2**32, ValueError),
    ("random", "seed", 1.5, TypeError),
    ("random", "seed", True, TypeError),
    ("scope", "scope_alpha", -0.25, ValueError),
    ("scope", "scope_alpha", 4.25, ValueError),
    ("scope", "scope_alpha", 0.3, ValueError),
    ("scope", "scope_alpha", float("nan"), ValueError),
    ("scope", "scope_alpha", "1", TypeError),
    ("mmr", "mmr_lambda", -0.1, ValueError),
    ("mmr", "mmr_lambda", 100.5, ValueError),
    ("mmr", "mmr_lambda", float("inf"), ValueError),
    ("mmr", "mmr_lambda", "1", TypeError),
]:
    options = {"method": method, name: value}
    bad("prune", name, error, F, A, 3, **options)
    bad("prune_varlen", name, error, PF, PA, [0, 10], 3, **options)
bad("prune", "cls_attn", ValueError, F, A[:1], 3, method="maxmin")
bad("prune", "k", ValueError, F, A, 0, method="mmr")
Q, K = torch.randn(2, 3, 4), torch.randn(2, 3, 7, 4)
for wrong in ([[1.0]], None, Q.double(), Q.int()):
    bad("cls_attention", "q_cls", TypeError, wrong, K, 0.5)
    bad("cls_attention", "k", TypeError, Q, wrong, 0.5)
    bad("received_attention", "q", TypeError, wrong, Q, 0.5)
bad("cls_attention", "q_cls", ValueError, Q[0], K, 0.5)
bad("cls_attention", "q_cls", ValueError, Q[..., :0], K, 0.5)
bad("cls_attention", "k", ValueError, Q, K[:1], 0.5)
bad("cls_attention", "k", ValueError, Q, K[:, :, :0], 0.5)
bad("cls_attention", "k", ValueError, Q, K[..., :3], 0.5)
bad("cls_attention", "k", TypeError, Q, K.half(), 0.5)
bad("cls_attention", "k", ValueError, Q, K.to("meta"), 0.5)
bad("received_attention", "q", ValueError, K, K, 0.5)
bad("received_attention", "q", ValueError, torch.ones(2, 1, 257), torch.ones(2, 1, 257), 0.5)
bad("received_attention", "k", ValueError, Q, Q[:, :2], 0.5)
bad("received_attention", "k", TypeError, Q, Q.half(), 0.5)
bad("received_attention", "cu_seqlens", ValueError, Q, Q, 0.5, [0, 1])
bad("received_attention", "cu_seqlens", TypeError, Q, Q, 0.5, 2)
bad("received_attention", "lse", TypeError, Q, Q, 0.5, lse=3.0)
bad("received_attention", "lse", TypeError, Q, Q, 0.5, lse=torch.ones(3, 2).half())
bad("received_attention", "lse", ValueError, Q, Q, 0.5, lse=torch.ones(2, 3))
bad("received_attention", "lse", TypeError, Q, Q, 0.5, lse=torch.ones(3, 2).to_sparse())
for heads in (_checks.MAX_HEADS + 1, 2**32 + 3):
    wide = torch.ones(2, 1, 4).expand(2, heads, 4)
    bad("cls_attention", "q_cls", ValueError, wide, K[:, :1].expand(2, heads, 7, 4), 0.5)
    bad("received_attention", "q", ValueError, wide, wide, 0.5)
    bad("topk", "cls_attn", ValueError, A[:, :1].expand(-1, heads, 10), 3)
    bad("prune", "cls_attn", ValueError, F, A[:, :1].expand(-1, heads, 10), 3)
    bad("prune_varlen", "cls_attn", ValueError, PF, PA[:1].expand(heads, 10), [0, 10], 3)
for scale, error in [
    ("1", TypeError),
    (None, TypeError),
    (True, TypeError),
    (ARRAY, TypeError),
    (float("nan"), ValueError),
    (np.float32("inf"), ValueError),
    (np.float64("nan"), ValueError),
    (1e39, ValueError),  # infinite in float32
    (-1e300, ValueError),
    (10**400, ValueError),  # not a float
    (10**5000, ValueError),
    (Fraction(10**400), ValueError),
]:
    bad("cls_attention", "scale", error, Q, K, scale)
    bad("received_attention", "scale", error, Q, Q, scale)
LONG = _checks.MAX_TOKENS + 1
bad("prune", "feats", ValueError, torch.empty(1, LONG, 1), torch.empty(1, LONG), 3)
bad("topk", "cls_attn", ValueError, torch.empty(1, LONG), 3)
bad("prune_varlen", "feats", ValueError, torch.empty(LONG, 1), torch.empty(LONG), [0, LONG], 3)
WIDE = torch.empty(1, 1, _checks.MAX_CHANNELS + 1)
bad("prune", "feats", ValueError, WIDE, torch.empty(1, 1), 1)
bad("dedup", "feats", ValueError, WIDE, 1)
bad("pairwise_cosine", "feats", ValueError, WIDE)
bad("prune_varlen", "feats", ValueError, WIDE[0], torch.empty(1), [0, 1], 1)


@pytest.mark.parametrize("module", [vispruner_cuda, reference], ids=["operators", "reference"])
@pytest.mark.parametrize(("function", "argument", "args", "keywords", "error"), BAD)
def test_bad_input(
    module: Any,
    function: str,
    argument: str,
    args: tuple[Any, ...],
    keywords: dict[str, Any],
    error: type[Exception],
) -> None:
    call: Callable[..., Any] = getattr(module, function)
    with pytest.raises(error, match=rf"^{argument} ") as raised:
        call(*args, **keywords)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_message_names_value_and_expectation() -> None:
    with pytest.raises(ValueError, match=r"k must be at least 1, got 0"):
        vispruner_cuda.prune(F, A, 0)
    with pytest.raises(TypeError, match=r"feats must have dtype .* got torch\.float64"):
        vispruner_cuda.prune(F.double(), A, 3)
    with pytest.raises(ValueError, match=r"cls_attn .*\(2, 10\).*got .* \(2, 3, 9\)"):
        vispruner_cuda.prune(F, A[..., :9], 3)
    with pytest.raises(TypeError, match=r"feats .* torch.Tensor, got numpy.ndarray of shape \(2, "):
        vispruner_cuda.prune(ARRAY, A, 3)
    with pytest.raises(ValueError, match=r"k must be at most 9223372036854775807, got 922337"):
        vispruner_cuda.prune(F, A, 2**63)
    with pytest.raises(ValueError, match=r"scale must be finite in float32, got 1e\+300"):
        vispruner_cuda.cls_attention(Q, K, 1e300)
    with pytest.raises(TypeError) as raised:
        vispruner_cuda.prune([[1.0] * 999], A, 3)
    assert len(str(raised.value)) < 200


def test_numpy_ints_are_ints() -> None:
    kept = vispruner_cuda.prune(F, A, np.int64(3), step=np.int32(8))
    assert torch.equal(kept.indices, reference.prune(F, A, 3).indices)


@pytest.mark.parametrize("module", [vispruner_cuda, reference])
def test_small_numbers_of_numpy_do_not_wrap_around_or_round(module: ModuleType) -> None:
    feats, attn = torch.randn(1, 600, 4), torch.rand(1, 600)
    packed, bounds = (feats[0], attn[0]), np.array([0, 250, 600], dtype=np.int16)
    # 200 + 200 does not fit an uint8, 600 - 96 no int8, and 93 * 0.57 is 53 in float16.
    for k in (np.uint8(200), np.int8(96)):
        want = module.prune(feats, attn, int(k))
        assert torch.equal(module.prune(feats, attn, k, step=np.int8(8)).indices, want.indices)
        many = module.prune_varlen(*packed, list(bounds), [k, k], step=np.int8(8))
        assert many.cu_seqlens == (0, int(k), 2 * int(k))
        assert all(type(bound) is int for bound in many.cu_seqlens)
        assert module.prune_varlen(*packed, list(bounds), k).cu_seqlens == many.cu_seqlens
        assert torch.equal(module.topk(attn, k).indices, module.topk(attn, int(k)).indices)
        assert torch.equal(module.dedup(feats, k), module.dedup(feats, int(k)))
    ratio = np.float16(0.57)
    want = module.prune(feats, attn, 93, important_ratio=float(ratio))
    for kept in (
        module.prune(feats, attn, 93, important_ratio=ratio),
        module.prune_varlen(*packed, [0, 600], 93, important_ratio=ratio),
    ):
        assert torch.equal(kept.indices.flatten(), want.indices[0])


def test_the_largest_ints_and_scales_of_other_types() -> None:
    kept = vispruner_cuda.prune(F, A, 2**63 - 1, step=2**63 - 1)
    assert torch.equal(kept.feats, F)
    for scale in (np.float32(0.5), np.float16(0.5), Fraction(1, 2)):
        for module in (vispruner_cuda, reference):
            found = module.cls_attention(Q, K, scale)
            assert torch.equal(found, module.cls_attention(Q, K, 0.5))


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_no_memory(threads: str) -> None:
    """Said in words that libraries look for, which retry with a smaller batch."""
    program = """
import resource, torch, vispruner_cuda
feats, attn, heads = torch.randn(1, 12000, 4), torch.rand(1, 12000), torch.randn(32768, 1, 256)
several = heads.view(8192, 4, 256)
calls = {
    "prune": lambda: vispruner_cuda.prune(feats, attn, 100),
    "pairwise_cosine": lambda: vispruner_cuda.pairwise_cosine(feats),
    "received_attention": lambda: vispruner_cuda.received_attention(heads, heads, 0.1),
    "several heads": lambda: vispruner_cuda.received_attention(several, several, 0.1),
    "cls_attention": lambda: vispruner_cuda.cls_attention(heads[:1], heads[None, None, :, 0], 0.1),
    "topk": lambda: vispruner_cuda.topk(torch.ones(1).expand(10**6, 32768), 32768),
}
vispruner_cuda.received_attention(heads[:9], heads[:9], 0.1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 20 * 2**20, hard))
for name, call in calls.items():
    try:
        call()
    except RuntimeError as error:
        assert "out of memory. vispruner" in str(error), f"{name}: {error}"
    else:
        raise AssertionError(f"{name} had enough")
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
print(vispruner_cuda.prune(feats[:, :99], attn[:, :99], 3).indices.shape)
"""
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "[1, 3]" in done.stdout


# The operators themselves check arguments that could cause out-of-bounds accesses.
MANY = torch.ones(2, 1, 4).expand(2, 2**32 + 3, 4)
DIRECT: list[tuple[str, tuple[Any, ...]]] = [
    ("topk", (A, 0)),
    ("topk", (A.double(), 3)),
    ("topk", (A[0, 0], 3)),
    ("topk", (torch.empty(1, LONG), 3)),
    ("pairwise_cosine", (F[0],)),
    ("pairwise_cosine", (F.int(),)),
    ("dedup", (F, -1, 8)),
    ("dedup", (F, 3, 0)),
    ("prune", (F, A[:1], 3, 0.5, 8)),
    ("prune", (F, A[..., :9], 3, 0.5, 8)),
    ("prune", (F, A, 0, 0.5, 8)),
    ("prune", (F, A, 3, float("nan"), 8)),
    ("prune", (F, A, 3, 2.0, 8)),
    ("prune", (F, A, 3, 0.5, 0)),
    ("prune", (F[..., :0], A, 3, 0.5, 8)),
    ("prune_by", (F, A, 3, "vispruner", 0.0)),
    ("prune_by", (F, A, 3, "none", 0.0)),
    ("prune_by", (F, A, 3, "maxmin", 1.0)),
    ("prune_by", (F, A, 3, "mmr", -1.0)),
    ("prune_by", (F, A, 3, "mmr", float("nan"))),
    ("prune_by", (F, A, 3, "scope", 0.1)),
    ("prune_by", (F, A, 3, "random", 0.5)),
    ("prune_by", (F, A, 3, "random", 2.0**32)),
    ("prune_by", (F, A[:1], 3, "mmr", 1.0)),
    ("prune_varlen_by", (PF, PA, [0, 11], [3], "topk", 0.0)),
    ("prune_varlen_by", (PF, PA, [0, 10], [3], "mmr", -1.0)),
    ("dedup", (WIDE, 1, 8)),
    ("prune_varlen", (PF, PA, [0, 11], [3], 0.5, 8)),
    ("prune_varlen", (PF, PA, [0, 20, 10], [3, 3], 0.5, 8)),
    ("prune_varlen", (PF, PA, [], [], 0.5, 8)),
    ("prune_varlen", (PF, PA, [0, 10], [3, 3], 0.5, 8)),
    ("prune_varlen", (PF, PA, [0, 10], [0], 0.5, 8)),
    ("cls_attention", (Q, K[:1], 0.5)),
    ("cls_attention", (Q, K.half(), 0.5)),
    ("cls_attention", (Q, K, 1e300)),
    ("cls_attention", (MANY, MANY[:, :, None], 0.5)),
    ("received_attention", (MANY, MANY, 0.5, [0, 2], None)),
    ("topk", (MANY, 3)),
    ("received_attention", (Q, Q[:1], 0.5, [0, 2], None)),
    ("received_attention", (Q, Q, 0.5, [0, 3], None)),
    ("received_attention", (Q, Q, -1e300, [0, 2], None)),
    ("received_attention", (Q, Q, 0.5, [0, 2], torch.ones(2, 3))),
]


@pytest.mark.parametrize(("function", "args"), DIRECT)
def test_direct_calls_do_not_crash(function: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(RuntimeError):
        getattr(torch.ops.vispruner, function)(*args)
