"""Pruning problems, with every kind of features and attention that has caused a difference.

A problem is generated from a few small numbers, so that hypothesis can shrink it and a failure can
be reproduced from its printed form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from vispruner_cuda import methods
from vispruner_cuda._checks import MAX_CHANNELS

DATA = Path(__file__).resolve().parents[1] / "data"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

FEATURE_KINDS = (
    "normal",  # independent tokens
    "clustered",  # many near-duplicates
    "smooth",  # similar neighbours, as in images
    "duplicates",  # exact copies
    "few_values",  # small integers: exact ties of cosines everywhere
    "constant",  # all tokens equal
    "zeros",  # some tokens are zero
    "non_finite",  # some tokens with NaN or Inf
    "outliers",  # a few channels a thousand times larger
    "tiny",  # magnitudes near the 1e-30 limit, and subnormal
    "huge",  # near the largest finite number
    "signed",  # one direction and its negative
)
ATTENTION_KINDS = ("softmax", "ties", "constant", "non_finite", "negative_zero", "sorted", "tiny")
LAYOUTS = ("contiguous", "cls_dropped", "channels_strided", "tokens_strided", "misaligned")


def features(kind: str, shape: tuple[int, int, int], g: torch.Generator) -> Tensor:
    """(B, N, C) float32 features."""
    batch, n, c = shape
    x = torch.randn(shape, generator=g)
    if kind == "clustered":
        centres = torch.randn((batch, max(1, n // 8), c), generator=g)
        which = torch.randint(0, centres.shape[1], (batch, n), generator=g)
        x = centres.gather(1, which.unsqueeze(-1).expand(shape)) + 0.05 * x
    elif kind == "smooth":
        x = x.cumsum(dim=1)
    elif kind == "duplicates":
        which = torch.randint(0, max(1, n // 3), (batch, n), generator=g)
        x = x.gather(1, which.unsqueeze(-1).expand(shape))
    elif kind == "few_values":
        x = torch.randint(-1, 2, shape, generator=g).float()
    elif kind == "constant":
        x = torch.ones(shape)
    elif kind == "zeros":
        x[torch.rand((batch, n), generator=g) < 0.3] = 0.0
    elif kind == "non_finite":
        for value in (float("nan"), float("inf"), float("-inf")):
            x[torch.rand(shape, generator=g) < 0.3 / c] = value
    elif kind == "outliers":
        x[..., torch.rand(c, generator=g) < 0.1] *= 1000.0
    elif kind == "tiny":
        x = x * 10.0 ** torch.randint(-44, -28, (batch, n, 1), generator=g)
        x[torch.rand((batch, n), generator=g) < 0.2] = 1e-30
    elif kind == "huge":
        x = x.clamp(-3, 3) * 1e4 if c % 2 else x.clamp(-3, 3) * 1e38
    elif kind == "signed":
        x = x[:, :1] * torch.where(torch.rand((batch, n, 1), generator=g) < 0.5, 1.0, -1.0)
    return x


def attention(kind: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """(B, N) or (B, H, N) float32 attention."""
    a = torch.randn(shape, generator=g)
    if kind == "softmax":
        a = a.softmax(dim=-1)
    elif kind == "ties":
        a = torch.randint(0, 4, shape, generator=g).float()
    elif kind == "constant":
        a = torch.full(shape, 0.25)
    elif kind == "non_finite":
        for value in (float("nan"), float("inf"), float("-inf")):
            a[torch.rand(shape, generator=g) < 0.15] = value
    elif kind == "negative_zero":
        a = torch.where(torch.rand(shape, generator=g) < 0.5, 0.0, -0.0)
    elif kind == "sorted":
        a = a.sort(dim=-1).values
    elif kind == "tiny":
        a = a * 1e-42
    return a


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides or alignment."""
    batch, n, c = x.shape
    if layout == "cls_dropped":
        return torch.cat([x.new_zeros((batch, 1, c)), x], dim=1)[:, 1:]
    if layout == "channels_strided":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "tokens_strided":
        return x.repeat_interleave(2, dim=1)[:, ::2]
    if layout == "misaligned":
        padded = x.new_zeros(x.numel() + 1)
        padded[1:] = x.reshape(-1)
        return padded[1:].view(batch, n, c)
    return x


def crowded(identical: int) -> Tensor:
    """(1, N, 256) float32 features that fill one bucket of the dedup kernel's first round.

    This many tokens of A are identical, and six differ slightly, so that their buckets are next to
    the full one.
    """
    g = torch.Generator().manual_seed(0)
    token = torch.randn(256, generator=g)
    different = 6
    x = token.expand(2 * (identical + different), 256).clone()
    for i in range(different):
        x[2 * (identical // different) * i] += (0.0160 + 0.0004 * i) * torch.randn(256, generator=g)
    return x.unsqueeze(0)


def widest() -> Tensor:
    """(1, 4, C) float32 features with the most channels and the largest sums.

    Quantized, their channels are 2047, 2015 (which has the largest digits and sum of digits),
    -2047, and alternating.
    """
    x = torch.empty(1, 4, MAX_CHANNELS)
    x[0, 0], x[0, 1], x[0, 2] = 1.0, 2015 / 2047, -1.0
    x[0, 1, 0] = 1.0
    x[0, 3, 0::2], x[0, 3, 1::2] = 2015 / 2047, -1.0
    return x


@dataclass(frozen=True)
class Problem:
    """One call of `prune`."""

    batch: int
    tokens: int
    channels: int
    heads: int | None
    k: int
    important_ratio: float = 0.5
    step: int = 8
    features: str = "normal"
    attention: str = "softmax"
    dtype: torch.dtype = torch.float32
    attention_dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0
    method: str = "vispruner"
    parameter: float | None = None  # of another method; None: its default, or it has none

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(feats, cls_attn)"""
        g = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.tokens, self.channels)
        feats = features(self.features, shape, g).to(self.dtype)
        heads = () if self.heads is None else (self.heads,)
        attn = attention(self.attention, (self.batch, *heads, self.tokens), g)
        return laid_out(feats, self.layout), attn.to(self.attention_dtype)

    def keywords(self) -> dict[str, Any]:
        if self.method == methods.DEFAULT:
            return {"important_ratio": self.important_ratio, "step": self.step}
        names = (p.name for p in methods.METHODS[self.method].parameters)
        return {"method": self.method, **dict.fromkeys(names, self.parameter)}


#: Images for which a block of the loop needs a little less than 48 KiB plus its 128 bytes of
#: static variables: with the neighbour lists in shared memory, and with the loop's arrays only.
NEAR_48_KIB = [
    Problem(1, 680, 4, None, 496, 0.9),  # 234 residual tokens
    Problem(1, 2332, 2, None, 290, 0.5, 2332),  # 2187
]


# Sizes near those of the kernels' tiles, warps and vectors, in addition to any small number.
_EDGES = (1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129)
_CHANNEL_EDGES = (1, 2, 3, 4, 7, 8, 16, 31, 33, 63, 64, 65, 128, 130)


@st.composite
def problems(draw: st.DrawFn, most_tokens: int = 80) -> Problem:
    """Random problems, small enough for thousands of runs."""
    tokens = draw(st.one_of(st.integers(1, most_tokens), st.sampled_from(_EDGES)))
    near_n = st.sampled_from([max(1, tokens - 1), tokens, tokens + 1])
    return Problem(
        batch=draw(st.integers(1, 3)),
        tokens=tokens,
        channels=draw(st.one_of(st.sampled_from(_CHANNEL_EDGES), st.integers(1, 40))),
        heads=draw(st.sampled_from([None, 1, 2, 5])),
        k=draw(st.one_of(st.integers(1, tokens), st.integers(1, 8), near_n)),
        important_ratio=draw(
            st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 1.0, allow_nan=False))
        ),
        step=draw(st.sampled_from([1, 2, 3, 8, 8, 8, 16, 1000])),
        features=draw(st.sampled_from(FEATURE_KINDS)),
        attention=draw(st.sampled_from(ATTENTION_KINDS)),
        dtype=draw(st.sampled_from(DTYPES)),
        attention_dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**20)),
    )


#: Values of each method's parameter, its bounds included.
PARAMETERS: dict[str, tuple[float | None, ...]] = {
    "topk": (None,),
    "random": (None, 0, 1, 2**31, 2**32 - 1),
    "maxmin": (None,),
    "scope": (None, 0.0, 0.25, 0.5, 1.0, 1.75, 4.0),
    "mmr": (None, 0.0, 0.3, 1.0, 100.0),
}


@st.composite
def problems_of(draw: st.DrawFn, method: str, most_tokens: int = 80) -> Problem:
    """Random problems of another method than VisPruner."""
    parameter = draw(st.sampled_from(PARAMETERS[method]))
    return replace(draw(problems(most_tokens)), method=method, parameter=parameter)


@dataclass(frozen=True)
class GoldenCase:
    """A problem with its expected result, from tests/data."""

    name: str
    feats: Tensor  # (1, N, C)
    cls_attn: Tensor  # (1, N) or (1, H, N)
    k: int
    keywords: dict[str, Any]  # the method and its parameters
    indices: Tensor  # (k,)


def _golden_keywords(data: Any, case: int) -> dict[str, Any]:
    if f"{case}_method" not in data.files:
        step = int(data[f"{case}_step"]) if f"{case}_step" in data.files else 8
        return {"important_ratio": float(data[f"{case}_ratio"]), "step": step}
    method = methods.METHODS[str(data[f"{case}_method"])]
    value = float(data[f"{case}_parameter"])
    values = {p.name: int(value) if p.step == 1 else value for p in method.parameters}
    return {"method": method.name, **values}


def golden_cases(file: str) -> list[GoldenCase]:
    """The cases of tests/data/<file>.npz.

    `upstream_exact` has int16 features, which quantize without loss, and the indices from the
    authors' code in float64; `v1` has cases of canonical numerics v1, and `methods` such cases of
    the other methods.
    """
    data = np.load(DATA / f"{file}.npz")
    cases = []
    for i in range(sum(name.endswith("_want") for name in data.files)):
        x, a = data[f"{i}_x"], data[f"{i}_a"]
        feats = torch.from_numpy(x.astype(np.float32) if x.dtype == np.int16 else x)
        cases.append(
            GoldenCase(
                name=f"{file}-{i}",
                feats=feats.unsqueeze(0),
                cls_attn=torch.from_numpy(a).unsqueeze(0),
                k=int(data[f"{i}_k"]),
                keywords=_golden_keywords(data, i),
                indices=torch.from_numpy(data[f"{i}_want"]).sort().values,
            )
        )
    return cases
