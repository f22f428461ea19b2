"""Inputs made by integer arithmetic: the same bits on every machine and from every torch.

A verification case is a few numbers, so a reported difference can be reproduced anywhere, and known
answers need no stored tensors. Values come from 31-bit integers; at most one IEEE multiplication
and one conversion to the dtype follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FEATURES = (
    "normal",  # independent tokens
    "clustered",  # many near-duplicates
    "smooth",  # similar neighbours, as in images
    "duplicates",  # exact copies
    "few_values",  # small integers: exact ties of cosines everywhere
    "constant",  # every token the same
    "zeros",  # some tokens all zero
    "non_finite",  # some tokens with NaN or Inf
    "outliers",  # a few channels a thousand times larger
    "tiny",  # magnitudes near the 1e-30 limit, and subnormal
    "huge",  # near the largest finite number
    "signed",  # one direction and its negative
)
ATTENTION = ("positive", "ties", "constant", "non_finite", "negative_zero", "sorted", "tiny")
LAYOUTS = ("contiguous", "cls_dropped", "channels_strided", "tokens_strided", "misaligned")
HEAD_LAYOUTS = (*LAYOUTS, "heads_swapped")

_PRIME = 2**31 - 1
_UNIT = 1 / 997  # makes numbers of order one that use all 24 bits of a float32
_NON_FINITE = (float("nan"), float("inf"), float("-inf"))


def integers(shape: Sequence[int], seed: int) -> Tensor:
    """int64 values in [0, 2**31 - 1) of `shape`, a function of position and seed only.

    Every product stays below 2**62, so nothing overflows.
    """
    count = 1
    for size in shape:
        count *= size
    x = (torch.arange(count) * 1103515245 + (seed + 1) * 69069 * 12345) % _PRIME
    x = x * x % _PRIME
    x ^= x >> 15
    x = x * 1597334677 % _PRIME
    x ^= x >> 13
    return (x * 1103515245 % _PRIME).view(*shape)


def bell(shape: Sequence[int], seed: int) -> Tensor:
    """int64 values in [-1535, 1534] that concentrate around 0: sums of three uniform ones."""
    x = integers(shape, seed)
    return (x & 1023) + (x >> 10 & 1023) + (x >> 20 & 1023) - 1535


def normal(shape: Sequence[int], seed: int, sharp: int = 1) -> Tensor:
    """float32 values in about [-1.5, 1.5], times `sharp`."""
    return bell(shape, seed).float() * (sharp * _UNIT)


def features(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """(B, N, C) features of one of the kinds in FEATURES, in `dtype`."""
    batch, n, c = shape
    x = bell(shape, seed)
    spread = integers((batch, n, 1), seed + 1)
    if kind == "clustered":
        centres = bell((batch, max(1, n // 8), c), seed + 2)
        x = 20 * centres.gather(1, (spread % centres.shape[1]).expand(shape)) + x
    elif kind == "smooth":
        x = x.cumsum(dim=1)
    elif kind == "duplicates":
        x = x.gather(1, (spread % max(1, n // 3)).expand(shape))
    elif kind == "few_values":
        return (integers(shape, seed) % 3 - 1).to(dtype)
    elif kind == "constant":
        return torch.ones(shape, dtype=dtype)
    elif kind == "zeros":
        x = x.masked_fill(spread % 10 < 3, 0)
    elif kind == "outliers":
        x = torch.where(integers((c,), seed + 2) % 10 == 0, 1000 * x, x)
    elif kind == "signed":
        x = x[:, :1] * torch.where(spread % 2 == 0, 1, -1)
    values = x.float() * _UNIT
    if kind == "non_finite":
        which = integers(shape, seed + 3) % (4 * c)  # about every second token holds one
        for i, value in enumerate(_NON_FINITE):
            values = values.masked_fill(which == i, value)
    elif kind == "tiny":
        scales = torch.tensor([10.0**e for e in range(-44, -28)])
        values = values * scales[spread % len(scales)]
        values = torch.where(integers((batch, n, 1), seed + 2) % 5 == 0, 1e-30, values)
    elif kind == "huge":
        values = values * (torch.finfo(dtype).max / 1.6)
    return values.to(dtype)


def attention(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """(B, N) or (B, H, N) attention of one of the kinds in ATTENTION, in `dtype`."""
    x = integers(shape, seed)
    if kind == "ties":
        return (x % 4).to(dtype)
    if kind == "constant":
        return torch.full(shape, 0.25, dtype=dtype)
    if kind == "negative_zero":
        return torch.where(x % 2 == 0, 0.0, -0.0).to(dtype)
    values = (x % 65536).float() * (1 / 65521)
    if kind == "non_finite":
        for i, value in enumerate(_NON_FINITE):
            values = values.masked_fill(integers(shape, seed + 1) % 7 == i, value)
    elif kind == "sorted":
        values = values.sort(dim=-1).values
    elif kind == "tiny":
        values = values * 1e-41
    return values.to(dtype)


def laid_out(x: Tensor, layout: str, tokens: int) -> Tensor:
    """The values of `x` with other strides or another alignment; `tokens` is the dimension of
    tokens."""
    if layout == "cls_dropped":
        first = torch.zeros_like(x.narrow(tokens, 0, min(1, x.shape[tokens])))
        return torch.cat([first, x], dim=tokens).narrow(
            tokens, first.shape[tokens], x.shape[tokens]
        )
    if layout == "channels_strided":
        return x.transpose(tokens, -1).contiguous().transpose(tokens, -1)
    if layout == "tokens_strided":
        rows = torch.arange(x.shape[tokens]).repeat_interleave(2)
        wide = x.index_select(tokens, rows)
        strides = list(wide.stride())
        strides[tokens] *= 2
        return wide.as_strided(x.shape, strides)
    if layout == "heads_swapped":
        return x.transpose(-2, -3).contiguous().transpose(-2, -3)
    if layout == "misaligned":
        padded = x.new_zeros(x.numel() + 1)
        padded[1:] = x.reshape(-1)
        return padded[1:].view(x.shape)
    return x
