"""The calls of a verification: one `Case` is one call of an operator.

The sizes are those at which a kernel, a tile or a memory plan changes, and their neighbours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import methods
from .._results import PruneResult, PruneVarlenResult, TopkResult
from . import inputs

OPERATORS = (
    "topk",
    "pairwise_cosine",
    "dedup",
    "prune",
    "prune_varlen",
    "cls_attention",
    "received_attention",
)
#: Operators whose results must be equal bit for bit.
EXACT = OPERATORS[:5]
DTYPES = ("float16", "bfloat16", "float32")

#: Positional and keyword arguments of a call.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Operators(Protocol):
    """The functional API: CPU tensors in, CPU tensors out."""

    def topk(self, cls_attn: Tensor, k: int) -> TopkResult: ...
    def pairwise_cosine(self, feats: Tensor) -> Tensor: ...
    def dedup(self, feats: Tensor, k: int, *, step: int = 8) -> Tensor: ...
    def prune(
        self,
        feats: Tensor,
        cls_attn: Tensor,
        k: int,
        *,
        method: str = methods.DEFAULT,
        **parameters: Any,
    ) -> PruneResult: ...
    def prune_varlen(
        self,
        feats: Tensor,
        cls_attn: Tensor,
        cu_seqlens: Sequence[int] | Tensor,
        k: int | Sequence[int],
        *,
        method: str = methods.DEFAULT,
        **parameters: Any,
    ) -> PruneVarlenResult: ...
    def cls_attention(self, q_cls: Tensor, k: Tensor, scale: float) -> Tensor: ...
    def received_attention(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Case:
    """One call of an operator, with inputs that follow from these numbers (inputs.py).

    Attributes:
        operator: one of OPERATORS.
        tokens: of each image; all equal except for `prune_varlen` and `received_attention`.
        channels: of a token, or of a head for the two attention scores.
        heads: None for scores without a dimension of heads.
        k: tokens to keep; one per image, or one for all.
        features, attention: kinds of inputs.FEATURES and inputs.ATTENTION.
        dtype, attention_dtype: "float16", "bfloat16" or "float32".
        layout: one of inputs.HEAD_LAYOUTS; of the features, or of queries and keys.
        scores_layout: the same for the attention.
        sharp: factor of queries and keys; a larger one makes a sharper softmax.
        lse: whether `received_attention` gets the log-sum-exp.
        method: of `prune` and `prune_varlen`.
        parameter: of a method other than the default; None: its default value, or no parameter.
    """

    operator: str
    tokens: tuple[int, ...]
    channels: int = 16
    heads: int | None = None
    k: int | tuple[int, ...] = 1
    important_ratio: float = 0.5
    step: int = 8
    features: str = "normal"
    attention: str = "positive"
    dtype: str = "float32"
    attention_dtype: str = "float32"
    layout: str = "contiguous"
    scores_layout: str = "contiguous"
    sharp: int = 1
    lse: bool = False
    seed: int = 0
    method: str = methods.DEFAULT
    parameter: float | None = None

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Case:
        """The case that `data()` describes.

        Raises:
            TypeError: the data have an unknown field, or a required field is missing.
        """
        values: dict[str, Any] = {}
        for name, value in data.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)

    def data(self) -> dict[str, Any]:
        """The fields that differ from their defaults, for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        used = {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in used.items()}

    def __str__(self) -> str:
        others = {k: v for k, v in self.data().items() if k not in ("operator", "tokens")}
        if len(set(self.tokens)) == 1:
            tokens = f"{len(self.tokens)} x {self.tokens[0]} tokens"
        elif len(self.tokens) <= 8:
            tokens = f"{self.tokens} tokens".replace(",)", ")")
        else:
            tokens = f"{len(self.tokens)} images of up to {max(self.tokens)} tokens"
        return ", ".join([f"{self.operator}: {tokens}", *(f"{k}={v}" for k, v in others.items())])

    # ------------------------------------------------------------------------------ the call
    def _feats(self) -> Tensor:
        """(B, N, C), or (1, T, C) for packed images."""
        dtype = getattr(torch, self.dtype)
        feats = inputs.features(self.features, (*self._batch(), self.channels), dtype, self.seed)
        return inputs.laid_out(feats, self.layout, 1)

    def _attention(self) -> Tensor:
        """(B, N) or (B, H, N)"""
        batch, n = self._batch()
        shape = (batch, n) if self.heads is None else (batch, self.heads, n)
        dtype = getattr(torch, self.attention_dtype)
        scores = inputs.attention(self.attention, shape, dtype, self.seed + 1000)
        if self.scores_layout == "misaligned":
            return inputs.laid_out(scores, "misaligned", 1)
        if self.scores_layout != "contiguous":  # heads, or nothing, are the last dimension
            return scores.transpose(0, -1).contiguous().transpose(0, -1)
        return scores

    def _batch(self) -> tuple[int, int]:
        if self.operator == "prune_varlen":
            return 1, sum(self.tokens)
        return len(self.tokens), self.tokens[0] if self.tokens else 0

    def _heads(self, shape: tuple[int, ...], seed: int, tokens: int) -> Tensor:
        values = inputs.normal(shape, self.seed + seed, self.sharp)
        return inputs.laid_out(values.to(getattr(torch, self.dtype)), self.layout, tokens)

    def _options(self) -> dict[str, Any]:
        if self.method == methods.DEFAULT:
            return {"important_ratio": self.important_ratio, "step": self.step}
        names = (p.name for p in methods.METHODS[self.method].parameters)
        return {"method": self.method, **dict.fromkeys(names, self.parameter)}

    @property
    def bounds(self) -> list[int]:
        """cu_seqlens of the images."""
        return [0, *itertools.accumulate(self.tokens)]

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        return self.channels**-0.5

    def arguments(self) -> Arguments:
        """Positional and keyword arguments of the call; tensors are on the CPU."""
        options = self._options()
        heads = self.heads or 1
        if self.operator == "topk":
            return (self._attention(), self.k), {}
        if self.operator == "pairwise_cosine":
            return (self._feats(),), {}
        if self.operator == "dedup":
            return (self._feats(), self.k), {"step": self.step}
        if self.operator == "prune":
            return (self._feats(), self._attention(), self.k), options
        if self.operator == "prune_varlen":
            k = list(self.k) if isinstance(self.k, tuple) else self.k
            return (self._feats()[0], self._attention()[0], self.bounds, k), options
        if self.operator == "cls_attention":
            q = self._heads((len(self.tokens), heads, self.channels), 0, 1)
            tokens = self.tokens[0] if self.tokens else 1
            keys = self._heads((len(self.tokens), heads, tokens, self.channels), 1000, 2)
            return (q, keys, self.scale), {}
        packed = (sum(self.tokens), heads, self.channels)
        q, keys = self._heads(packed, 0, 0), self._heads(packed, 1000, 0)
        lse = _log_sum_exp(q, keys, self.scale, self.bounds) if self.lse else None
        return (q, keys, self.scale, self.bounds), {"lse": lse}

    def call(self, operators: Operators, arguments: Arguments) -> Any:
        """The result of the call on an implementation."""
        args, keywords = arguments
        return getattr(operators, self.operator)(*args, **keywords)

    # ---------------------------------------------------------------------------------- cost
    @property
    def residual(self) -> int:
        """Tokens of the largest image that go through the loop of the method."""
        if self.operator not in ("dedup", "prune", "prune_varlen"):
            return 0
        ks = self.k if isinstance(self.k, tuple) else (self.k,) * len(self.tokens)
        return max((self._residual(n, k) for n, k in zip(self.tokens, ks, strict=True)), default=0)

    def _residual(self, tokens: int, k: int) -> int:
        if k >= tokens or self.method in ("topk", "random"):
            return 0
        if self.method != methods.DEFAULT:
            return tokens
        important = 0 if self.operator == "dedup" else int(k * self.important_ratio)
        return 0 if k >= tokens or k == important else tokens - important

    @property
    def cost(self) -> float:
        """Millions of scalar operations of the CUDA kernels, within a factor of a few."""
        ks = self.k if isinstance(self.k, tuple) else (self.k,) * len(self.tokens)
        heads = self.heads or 1
        total = 0.0
        for n, k in zip(self.tokens, ks, strict=True):
            # At least one block of several hundred threads per image.
            total += 2e4 * (1 if self.operator in EXACT else heads)
            if self.operator == "cls_attention":
                total += 2 * heads * n * self.channels
            elif self.operator == "received_attention":
                total += heads * n * n * (20 + self.channels / 8) * (1 if self.lse else 2)
            elif self.operator == "pairwise_cosine":
                total += n * n * (10 + self.channels / 16)
            else:
                total += n * n + heads * n
                r = self._residual(n, k) if self.operator != "topk" else 0
                rounds = -(-max(0, r - k) // min(self.step, max(1, r)))
                if self.method != methods.DEFAULT:
                    rounds = k if r else 0
                total += r * r * (40 + self.channels / 16) + rounds * (2e5 + 20 * r)
        return total / 1e6


def _log_sum_exp(q: Tensor, k: Tensor, scale: float, bounds: Sequence[int]) -> Tensor:
    """(H, T) float32 log-sum-exp of the logits, computed in float64."""
    out = torch.empty(q.shape[1], q.shape[0])
    for start, end in itertools.pairwise(bounds):
        logits = torch.einsum("qhd,khd->hqk", q[start:end].double(), k[start:end].double())
        out[:, start:end] = (logits * scale).logsumexp(-1)
    return out


# ------------------------------------------------------------------------------ the collection
# For cases about sizes: with each of these, a wrong order of tokens changes the result.
_TELLING_FEATURES = ("normal", "clustered", "few_values", "smooth", "duplicates")
_TELLING_ATTENTION = ("positive", "ties", "sorted")


class _Turns:
    """Gives each case a different seed, and cycles through kinds, dtypes and layouts."""

    def __init__(self) -> None:
        self.count = 0

    def options(self) -> dict[str, Any]:
        i = self.count
        self.count += 1
        return {
            "seed": i,
            "dtype": DTYPES[i % 3],
            "attention_dtype": DTYPES[i // 3 % 3],
            "features": _TELLING_FEATURES[i % len(_TELLING_FEATURES)],
            "attention": _TELLING_ATTENTION[i // 2 % len(_TELLING_ATTENTION)],
            "layout": inputs.LAYOUTS[i % len(inputs.LAYOUTS)] if i % 2 else "contiguous",
            "scores_layout": ("contiguous", "misaligned", "contiguous", "heads_last")[i % 4],
        }


def _draws(seed: int) -> list[int]:
    """Twelve pseudo-random numbers."""
    return inputs.integers((12,), 7919 * (seed + 1)).tolist()


def _mixed(draws: Sequence[int]) -> dict[str, Any]:
    """Options of `prune`, from seven numbers."""
    features, attention, dtype, attention_dtype, layout, step, ratio = draws
    return {
        "features": inputs.FEATURES[features % len(inputs.FEATURES)],
        "attention": inputs.ATTENTION[attention % len(inputs.ATTENTION)],
        "dtype": DTYPES[dtype % 3],
        "attention_dtype": DTYPES[attention_dtype % 3],
        "layout": inputs.LAYOUTS[layout % len(inputs.LAYOUTS)],
        "step": (1, 2, 3, 8, 8, 16, 1000)[step % 7],
        "important_ratio": (0.0, 0.5, 0.5, 1.0, 0.3, 0.9)[ratio % 6],
    }


def _topk() -> Iterator[Case]:
    turns = _Turns()
    sizes = (1, 2, 31, 32, 33, 196, 255, 256, 257, 576, 577, 1024, 1025, 2880, 4097)

    def case(tokens: int, images: int, heads: int | None, k: int, **options: Any) -> Case:
        used = turns.options()
        keep = ("seed", "attention_dtype", "attention", "scores_layout")
        used = {name: used[name] for name in keep}
        return Case("topk", (tokens,) * images, 1, heads, k, **{**used, **options})

    for i, n in enumerate(sizes):
        yield case(n, 1 + i % 3, (None, 1, 16)[i % 3], max(1, n // 9))
    for kind, dtype in itertools.product(inputs.ATTENTION, DTYPES):
        yield case(130, 2, 3, 131, attention=kind, attention_dtype=dtype)
    for images in (4, 70):  # too many for blocks that rank 8 tokens each
        yield case(576, images, 2, 64)
    yield case(33, 300, None, 33)
    yield case(3, _MOST_GRID, None, 2)
    yield case(12000, 1, None, 40)
    yield case(32768, 1, None, 64)
    for shape in ((0, 5), (2, 0)):
        yield case(shape[1], shape[0], 2, 3)


_MOST_GRID = 32770  # images: more than one launch takes

_FEW = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129)
_CHANNELS = (1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 65, 127, 128, 130)


def _pairwise_cosine() -> Iterator[Case]:
    turns = _Turns()

    def case(tokens: int, images: int, channels: int, **options: Any) -> Case:
        used = turns.options()
        used = {name: used[name] for name in ("seed", "dtype", "features", "layout")}
        return Case("pairwise_cosine", (tokens,) * images, channels, **{**used, **options})

    for i, n in enumerate(_FEW):
        yield case(n, 1 + i % 2, _CHANNELS[i % len(_CHANNELS)])
    for kind, dtype in itertools.product(inputs.FEATURES, DTYPES):
        yield case(40, 2, 21, features=kind, dtype=dtype)
    for layout, dtype in itertools.product(inputs.LAYOUTS, DTYPES):
        yield case(70, 2, 36, layout=layout, dtype=dtype, features="normal")
    # Few and many blocks of the Gram kernel; sums beyond 32 bits; the largest sums.
    for n, images, c in ((161, 1, 200), (161, 6, 200), (300, 9, 65), (577, 1, 64), (1030, 1, 16)):
        yield case(n, images, c)
    yield case(60, 1, 5000, features="outliers", dtype="float32")
    yield case(40, 1, 8192, features="constant", dtype="float16")
    yield case(33, 2, 8191, features="signed", dtype="bfloat16")
    yield case(130, 1, 1024, features="clustered")
    yield case(2, _MOST_GRID, 3)
    for shape in ((0, 5), (2, 0)):
        yield case(shape[1], shape[0], 4)


# Residual tokens at which a kernel or a memory plan changes: shared memory near 48 KiB (234, 2188)
# and near the maximum per block (479 and 4564 with 99 KiB, 1096 with 227), rows of the neighbour
# lists (576, 1024, 4096).
_RESIDUALS = (233, 234, 235, 478, 479, 480, 543, 544, 545, 575, 576, 577, 1023, 1024, 1025, 1026)
_LARGE_RESIDUALS = (1096, 1097, 2187, 2188, 2189, 4096, 4097, 4564, 4565)


def _dedup() -> Iterator[Case]:
    turns = _Turns()

    def case(tokens: int, images: int, channels: int, k: int, **options: Any) -> Case:
        used = turns.options()
        used = {name: used[name] for name in ("seed", "dtype", "features", "layout")}
        return Case("dedup", (tokens,) * images, channels, None, k, **{**used, **options})

    for i, n in enumerate(_FEW):
        yield case(n, 1 + i % 3, _CHANNELS[-1 - i % len(_CHANNELS)], max(1, n // 4))
    for i, n in enumerate(_RESIDUALS):
        yield case(n, 1 + i % 2, 24 + i, n // 7, step=(8, 16, 24)[i % 3])
    for i, n in enumerate(_LARGE_RESIDUALS):
        yield case(n, 1, 8 + i, n // 3, step=200 + n // 16)
    for step in (1, 2, 3, 8, 1000):
        yield case(150, 2, 20, 11, step=step)
    for k in (1, 2, 99, 100, 101):
        yield case(100, 2, 12, k)
    for kind in inputs.FEATURES:
        yield case(140, 1, 33, 15, features=kind)
    # All equal: crowded buckets, so that counting and merging are used.
    for kind, n in itertools.product(("constant", "few_values", "duplicates"), (300, 700, 1500)):
        yield case(n, 1, 3, 32, features=kind, step=n // 9)
    for shape in ((0, 5), (2, 0)):
        yield case(shape[1], shape[0], 4, 3)


_NAMES = tuple(name for name in methods.METHODS if name != methods.DEFAULT)
#: Other methods, with values of their parameters.
_OTHERS = (
    ("topk", None),
    *(("random", seed) for seed in (0, 7, 2**32 - 1)),
    ("maxmin", None),
    *(("scope", alpha) for alpha in (None, 0.0, 0.75, 4.0)),
    *(("mmr", weight) for weight in (None, 0.0, 0.3, 100.0)),
)


def _prune() -> Iterator[Case]:
    turns = _Turns()

    def case(
        tokens: int, images: int, channels: int, heads: int | None, k: int, **options: Any
    ) -> Case:
        used = {**turns.options(), **options}
        return Case("prune", (tokens,) * images, channels, heads, k, **used)

    for i, n in enumerate(_FEW):
        yield case(n, 1 + i % 3, _CHANNELS[i * 3 % len(_CHANNELS)], (None, 2, 5)[i % 3], 1 + n // 5)
    for n in (680, 679, 681):  # 446 important and 234 residual tokens: near 48 KiB
        for dtype in DTYPES:
            yield case(n, 1, 64, 2, 496, dtype=dtype, important_ratio=0.9)
    for dtype in DTYPES:  # LLaVA-1.5, LLaVA-NeXT and Qwen2-VL, with fewer channels
        yield case(576, 1, 1024, 16, 64, dtype=dtype, layout="contiguous")
        yield case(576, 5, 128, 16, 64, dtype=dtype, layout="cls_dropped")
        yield case(729, 2, 72, None, 128, dtype=dtype)
        yield case(1296, 1, 80, None, 130, dtype=dtype, step=32)
    for i, r in enumerate(_RESIDUALS):
        yield case(r + 20, 1, 17 + i, 3, 40, step=(8, 16, 1000)[i % 3])
    for i, r in enumerate(_LARGE_RESIDUALS):
        yield case(r + 50, 1, 8 + i, None, 100, step=200 + r // 16)
    for ratio, k in itertools.product((0.0, 0.1, 0.5, 1.0), (1, 2, 17, 119, 120, 121)):
        yield case(120, 2, 24, 2, k, important_ratio=ratio)
    for step in (1, 2, 3, 8, 1000):
        yield case(130, 2, 20, None, 15, step=step)
    for features, dtype in itertools.product(inputs.FEATURES, DTYPES):
        yield case(90, 2, 21, 2, 13, features=features, dtype=dtype)
    for attention in inputs.ATTENTION:
        yield case(90, 2, 9, 3, 40, attention=attention, important_ratio=0.8)
    for layout, dtype in itertools.product(inputs.LAYOUTS, DTYPES):
        yield case(70, 3, 36, 2, 11, layout=layout, dtype=dtype, features="normal")
    for images in (17, 70):
        yield case(64, images, 40, None, 9)
    yield case(300, 1, 8192, None, 30, dtype="float16", features="clustered")
    for shape in ((0, 5), (2, 0)):
        yield case(shape[1], shape[0], 4, None, 3)
    for method, parameter in _OTHERS:
        for i, n in enumerate(_FEW[2:]):
            options = {"method": method, "parameter": parameter}
            yield case(n, 1 + i % 2, 1 + 7 * i, (None, 3)[i % 2], 1 + n // 3, **options)
        for kind in inputs.FEATURES:
            yield case(90, 1, 21, 2, 33, features=kind, method=method, parameter=parameter)
        for kind in inputs.ATTENTION:
            yield case(70, 2, 9, 3, 30, attention=kind, method=method, parameter=parameter)
    for method in _NAMES:
        for n, k in ((120, 119), (120, 121), (576, 64)):
            yield case(n, 2, 32, 2, k, method=method)
        # Numbers of tokens at which the tokens per thread change.
        for n, k in ((1024, 40), (1025, 40), (2048, 30), (2049, 30), (4096, 20), (4097, 20)):
            yield case(n, 1, 12, None, k, method=method)
    for i in range(150):  # everything mixed
        n, images, c, heads, k, *_ = draw = _draws(i)
        used = _mixed(draw[5:])
        yield case(1 + n % 160, 1 + images % 3, 1 + c % 70, 1 + heads % 5, 1 + k % 60, **used)


def _prune_varlen() -> Iterator[Case]:
    turns = _Turns()

    def case(
        tokens: Sequence[int],
        channels: int,
        heads: int | None,
        k: int | Sequence[int],
        **options: Any,
    ) -> Case:
        used = turns.options()
        used = {**used, "layout": "contiguous" if turns.count % 3 else used["layout"], **options}
        ks = k if isinstance(k, int) else tuple(k)
        return Case("prune_varlen", tuple(tokens), channels, heads, ks, **used)

    ragged = (1, 300, 0, 33, 2, 129, 64, 0)
    for dtype in DTYPES:
        yield case(ragged, 48, 3, (5, 40, 3, 33, 1, 1, 63, 9), dtype=dtype)
        yield case(ragged, 21, None, 20, dtype=dtype, important_ratio=0.25)
    for lengths in ((), (0,), (1,), (0, 0, 0), (1, 1, 1), (0, 196, 1), (196, 256), (5, 0)):
        yield case(lengths, 16, 2, 26)
    # More images than fit a kernel parameter, some empty, some with one token.
    for count in (47, 48, 49, 130):
        yield case([i * 7 % 40 for i in range(count)], 12, 2, 6)
        yield case([1 + i % 3 for i in range(count)], 5, None, [1 + i % 4 for i in range(count)])
    for i, r in enumerate((234, 479, 544, 576, 577, 1024, 1025, 1096)):
        yield case((20, r + 13, 7, r // 2), 20 + i, None, 26, step=(8, 24)[i % 2])
    for i, r in enumerate((2188, 4096, 4097, 4564)):
        yield case((100, r + 13, 1), 8 + i, 2, 26, step=400)
    for ratio, step in itertools.product((0.0, 1.0), (1, 8, 1000)):
        yield case((90, 31, 120), 20, 2, (9, 40, 60), important_ratio=ratio, step=step)
    for kind in inputs.FEATURES:
        yield case((77, 0, 50, 1), 19, 2, (8, 1, 49, 1), features=kind)
    for method, parameter in _OTHERS:
        yield case(ragged, 20, 2, 17, method=method, parameter=parameter)
        yield case((77, 0, 50, 1), 19, None, (8, 1, 49, 1), method=method, parameter=parameter)
    for i in range(50):
        n, images, c, heads, k, *_ = draw = _draws(1000 + i)
        packed = [(n >> j) % 100 if n >> j & 3 else 0 for j in range(1 + images % 6)]
        ks = [1 + (k >> j) % 40 for j in range(len(packed))]
        yield case(packed, 1 + c % 50, 1 + heads % 3, ks, **_mixed(draw[5:]))


_HEAD_DIMS = (1, 5, 40, 64, 72, 80, 88, 128, 130, 240, 256)


def _cls_attention() -> Iterator[Case]:
    seeds = itertools.count()

    def case(images: int, heads: int, tokens: int, dim: int, dtype: str, **options: Any) -> Case:
        options = {"seed": next(seeds), **options}
        return Case("cls_attention", (tokens,) * images, dim, heads, dtype=dtype, **options)

    for i, (dim, dtype) in enumerate(itertools.product(_HEAD_DIMS, DTYPES)):
        tokens = (2, 33, 100, 197, 257)[i % 5]
        layout = inputs.HEAD_LAYOUTS[i % len(inputs.HEAD_LAYOUTS)]
        yield case(1 + i % 3, 1 + i % 4, tokens, dim, dtype, layout=layout)
    for dtype in DTYPES:
        yield case(1, 1, 1, 1, dtype)
        yield case(2, 16, 577, 64, dtype, layout="heads_swapped")
        yield case(1, 4, 577, 64, dtype, sharp=4)
        yield case(70, 2, 40, 16, dtype)
        yield case(_MOST_GRID, 1, 3, 4, dtype)
        # Shared memory near 48 KiB: 6144 tokens of float32, 12288 of 16 bits.
        for tokens in (6070, 6100, 6112, 6120, 12216, 12224, 12230, 13000):
            yield case(1, 1, tokens, 64, dtype)
    for shape in ((0, 5), (2, 1)):
        yield case(shape[0], 2, shape[1], 4, "float32")


def _received_attention() -> Iterator[Case]:
    seeds = itertools.count()

    def case(
        lengths: Sequence[int], heads: int, dim: int, dtype: str, lse: bool, **options: Any
    ) -> Case:
        options = {"seed": next(seeds), "lse": lse, **options}
        return Case("received_attention", tuple(lengths), dim, heads, dtype=dtype, **options)

    both = (False, True)
    for dim, dtype, lse in itertools.product((1, 40, 64, 72, 80, 128, 240, 256), DTYPES, both):
        yield case((130, 70), 2, dim, dtype, lse)
    for dim, dtype in itertools.product((88, 96, 112, 120), DTYPES):
        yield case((67,), 2, dim, dtype, False)
    for i, (dtype, lse) in enumerate(itertools.product(DTYPES, both)):
        yield case((1,), 1, 1, dtype, lse)
        yield case((65, 0, 63, 1, 64), 2, 80, dtype, lse)
        yield case((300,), 3, 72, dtype, lse, layout="heads_swapped")
        yield case((577,), 1, 64, dtype, lse, layout=inputs.HEAD_LAYOUTS[i])
        yield case((200, 129), 2, 96, dtype, lse, sharp=3)
        yield case([i * 5 % 23 for i in range(60)], 2, 16, dtype, lse)
    for layout in inputs.HEAD_LAYOUTS:
        for dtype in DTYPES:
            yield case((90, 20), 2, 33, dtype, False, layout=layout)
    for dtype in DTYPES:
        yield case((1500,), 1, 80, dtype, False)
    yield case((), 2, 4, "float32", False)
    yield case((0, 0), 2, 4, "float16", False)


_COLLECTIONS = {
    "topk": _topk,
    "pairwise_cosine": _pairwise_cosine,
    "dedup": _dedup,
    "prune": _prune,
    "prune_varlen": _prune_varlen,
    "cls_attention": _cls_attention,
    "received_attention": _received_attention,
}

# For every combination of the plans of all stages.
COMBINED = (
    Case("prune", (200, 200), 40, 2, 20, dtype="float16", features="clustered"),
    Case("prune", (161,), 70, None, 5, features="smooth", step=16),
    Case("prune_varlen", (150, 0, 1, 90), 24, 2, (12, 3, 1, 80), dtype="bfloat16"),
)


def cases(operators: Iterable[str] = OPERATORS) -> list[Case]:
    """All cases of these operators, in a fixed order.

    Raises:
        KeyError: an unknown operator.
    """
    found = [case for name in operators for case in _COLLECTIONS[name]()]
    wanted = {case.operator for case in found}
    return [*found, *(case for case in COMBINED if case.operator in wanted)]


def select(of: Iterable[Case], most_cost: float = math.inf, quick: bool = False) -> list[Case]:
    """The cases that cost at most `most_cost` (see `Case.cost`).

    With `quick`, only every fifth small case of each operator: a second on a CPU or a GPU.
    """
    left = [
        case for case in of if case.cost <= (min(most_cost, QUICK_COST) if quick else most_cost)
    ]
    if not quick:
        return left
    seen: dict[str, int] = {}
    chosen = []
    for case in left:
        seen[case.operator] = seen.get(case.operator, -1) + 1
        if seen[case.operator] % 5 == 0:
            chosen.append(case)
    return chosen


#: The most that a case of the quick selection costs.
QUICK_COST = 20.0
