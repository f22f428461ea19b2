"""Attention scores: as close to float64 as plain PyTorch, and the same in any batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.problems import DTYPES
from torch import Tensor

from vispruner_cuda import reference

# (images, heads, tokens, channels per head)
CLS_SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 2, 5),
    (3, 2, 33, 64),
    (1, 4, 577, 64),
    (1, 16, 577, 64),
    (2, 2, 100, 72),
    (1, 2, 257, 88),
    (2, 1, 50, 130),
]
# (lengths of the images, heads, channels per head)
PACKED = [
    ([1], 1, 1),
    ([2], 3, 5),
    ([64], 2, 64),
    ([65, 0, 63, 1], 2, 80),
    ([130, 70], 3, 72),
    ([200], 1, 128),
    ([40], 2, 256),
]


def bounds_of(lengths: list[int]) -> list[int]:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return bounds


def heads(*shape: int, dtype: torch.dtype, seed: int, sharp: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * sharp).to(dtype)


def exact_cls(q: Tensor, k: Tensor, scale: float) -> Tensor:
    logits = torch.einsum("bhd,bhtd->bht", q.double(), k.double()) * scale
    return logits.softmax(-1)[..., 1:].mean(1)


def exact_received(q: Tensor, k: Tensor, scale: float, bounds: list[int]) -> Tensor:
    parts = []
    for start, end in itertools.pairwise(bounds):
        logits = torch.einsum("qhd,khd->hqk", q[start:end].double(), k[start:end].double())
        parts.append((logits * scale).softmax(-1).mean((0, 1)))
    return torch.cat(parts)


def assert_as_good(
    ours: Tensor, plain: Tensor, exact: Tensor, what: str, most: float = 2.0
) -> None:
    """The error against float64 is at most `most` times that of plain PyTorch in the same dtype.

    Errors are L2 norms. (The largest of several hundred errors, about half an ulp, is random on
    either side.)
    """
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape
    error = (ours.double() - exact).norm().item()
    allowed = most * (plain.double() - exact).norm().item()
    # float32 results cannot be better than the spacing of float32.
    spacing = torch.finfo(torch.float32).eps * exact.norm().item()
    assert error <= max(allowed, spacing), (what, error, allowed, spacing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CLS_SHAPES, ids=str)
@pytest.mark.parametrize("sharp", [1.0, 4.0])
def test_cls_attention(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    sharp: float,
    implementations: dict[str, Any],
) -> None:
    batch, h, tokens, dim = shape
    q = heads(batch, h, dim, dtype=dtype, seed=1, sharp=sharp)
    k = heads(batch, h, tokens, dim, dtype=dtype, seed=2, sharp=sharp)
    scale = dim**-0.5
    exact = exact_cls(q, k, scale)
    plain = ((q.unsqueeze(2) @ k.transpose(2, 3)).squeeze(2) * scale).softmax(-1)[..., 1:].mean(1)
    for name, implementation in {"reference": reference, **implementations}.items():
        assert_as_good(implementation.cls_attention(q, k, scale), plain, exact, name)


@pytest.mark.parametrize("heads_", [1, 4, 16])
@pytest.mark.parametrize("sharp", [1.0, 4.0])
def test_cls_attention_of_many_single_images(
    heads_: int, sharp: float, implementations: dict[str, Any]
) -> None:
    """Single images: a sharp softmax is one weight, whose error is not averaged out."""
    q = heads(40, heads_, 64, dtype=torch.float32, seed=21, sharp=sharp)
    k = heads(40, heads_, 577, 64, dtype=torch.float32, seed=22, sharp=sharp)
    exact = exact_cls(q, k, 0.125)
    plain = ((q.unsqueeze(2) @ k.transpose(2, 3)).squeeze(2) * 0.125).softmax(-1)[..., 1:].mean(1)
    for name, implementation in implementations.items():
        ours = implementation.cls_attention(q, k, 0.125)
        for i in range(len(q)):
            assert_as_good(ours[i], plain[i], exact[i], f"{name}, image {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "h", "dim"), PACKED)
@pytest.mark.parametrize("with_lse", [False, True])
def test_received_attention(
    lengths: list[int],
    h: int,
    dim: int,
    dtype: torch.dtype,
    with_lse: bool,
    implementations: dict[str, Any],
) -> None:
    bounds, scale = bounds_of(lengths), dim**-0.5
    q = heads(bounds[-1], h, dim, dtype=dtype, seed=3)
    k = heads(bounds[-1], h, dim, dtype=dtype, seed=4)
    exact = exact_received(q, k, scale, bounds)
    plain = torch.cat(
        [
            (torch.einsum("qhd,khd->hqk", q[s:e], k[s:e]) * scale).softmax(-1).mean((0, 1))
            for s, e in itertools.pairwise(bounds)
        ]
    )
    lse = None
    if with_lse:
        lse = torch.empty(h, bounds[-1])
        for s, e in itertools.pairwise(bounds):
            logits = torch.einsum("qhd,khd->hqk", q[s:e].double(), k[s:e].double()) * scale
            lse[:, s:e] = logits.logsumexp(-1)
    for name, implementation in {"reference": reference, **implementations}.items():
        ours = implementation.received_attention(q, k, scale, bounds, lse=lse)
        # A float32 lse has an error of about its size times eps.
        size = 0.0 if lse is None else float(lse.abs().max()) * torch.finfo(torch.float32).eps
        assert_as_good(ours, plain + size * exact.max(), exact, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharp", [1.0, 4.0, 12.0])
def test_received_attention_is_as_good_as_float32(
    sharp: float, dtype: torch.dtype, implementations: dict[str, Any]
) -> None:
    """Also of 16-bit inputs and of large logits, whose exponentials the kernels approximate.

    Here plain PyTorch has float32 copies of the inputs. Tensor cores cut sums off instead of
    rounding them (ptx/src/matrix.cpp), so for bfloat16 the error may be four times as large.
    """
    q = heads(150, 2, 80, dtype=dtype, seed=8, sharp=sharp)
    k = heads(150, 2, 80, dtype=dtype, seed=9)
    exact = exact_received(q, k, 80**-0.5, [0, 150])
    plain = reference.received_attention(q.float(), k.float(), 80**-0.5)
    for name, implementation in implementations.items():
        ours = implementation.received_attention(q, k, 80**-0.5)
        assert_as_good(ours, plain, exact, name, 4.0 if dtype == torch.bfloat16 else 2.0)


def test_one_image_is_the_default(implementations: dict[str, Any]) -> None:
    q, k = (heads(70, 2, 16, dtype=torch.float16, seed=s) for s in (5, 6))
    for implementation in (reference, *implementations.values()):
        whole = implementation.received_attention(q, k, 0.25)
        assert torch.equal(whole, implementation.received_attention(q, k, 0.25, [0, 70]))
        assert abs(whole.sum().item() - 1.0) < 1e-5


def test_an_image_does_not_depend_on_its_batch(implementations: dict[str, Any]) -> None:
    q, k = heads(5, 3, 40, dtype=torch.bfloat16, seed=7), None
    k = heads(5, 3, 90, 40, dtype=torch.bfloat16, seed=8)
    packed = [heads(5 * 90, 3, 40, dtype=torch.bfloat16, seed=s) for s in (9, 10)]
    bounds = list(range(0, 451, 90))
    for name, implementation in implementations.items():
        batch = implementation.cls_attention(q, k, 0.1)
        received = implementation.received_attention(*packed, 0.1, bounds)
        for i in range(5):
            alone = implementation.cls_attention(q[i : i + 1], k[i : i + 1], 0.1)
            assert torch.equal(alone[0], batch[i]), name
            rows = slice(bounds[i], bounds[i + 1])
            one = implementation.received_attention(packed[0][rows], packed[1][rows], 0.1)
            assert torch.equal(one, received[rows]), name
        assert torch.equal(implementation.received_attention(*packed, 0.1, bounds), received)


def test_any_strides(implementations: dict[str, Any]) -> None:
    fused = heads(2, 50, 3, 4, 24, dtype=torch.float32, seed=11)  # (B, T, qkv, H, D)
    q, k = fused[:, 0, 0], fused[:, :, 1].transpose(1, 2)
    wide = heads(60, 2, 33, dtype=torch.float16, seed=12)[..., 1:]  # rows not 16-byte aligned
    turned = heads(60, 16, 2, dtype=torch.float32, seed=13).transpose(1, 2)  # channels strided
    for name, implementation in implementations.items():
        got = implementation.cls_attention(q, k, 0.2)
        assert torch.equal(
            got, implementation.cls_attention(q.contiguous(), k.contiguous(), 0.2)
        ), name
        for x in (wide, turned):
            got = implementation.received_attention(x, x, 0.2)
            same = implementation.received_attention(x.contiguous(), x.contiguous(), 0.2)
            assert torch.equal(got, same), name


def test_extreme_logits_stay_finite(implementations: dict[str, Any]) -> None:
    q = heads(1, 2, 32, dtype=torch.float32, seed=14, sharp=50.0)
    k = heads(1, 2, 80, 32, dtype=torch.float32, seed=15, sharp=50.0)
    for name, implementation in implementations.items():
        assert torch.isfinite(implementation.cls_attention(q, k, 1.0)).all(), name
        rows = k[0].transpose(0, 1)
        got = implementation.received_attention(rows, rows, 1.0)
        assert torch.isfinite(got).all(), name
        assert abs(got.sum().item() - 1.0) < 1e-4, name


def test_empty(implementations: dict[str, Any]) -> None:
    for implementation in (reference, *implementations.values()):
        empty = implementation.cls_attention(torch.ones(0, 2, 4), torch.ones(0, 2, 5, 4), 1.0)
        assert empty.shape == (0, 4)
        only_cls = implementation.cls_attention(torch.ones(2, 2, 4), torch.ones(2, 2, 1, 4), 1.0)
        assert only_cls.shape == (2, 0)
        none = torch.ones(0, 2, 4)
        assert implementation.received_attention(none, none, 1.0, [0]).shape == (0,)
