"""Synthetic inputs, and every case that the operator benchmarks measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vispruner_cuda

KINDS = ("random", "clustered", "smooth", "near duplicates")


def make_feats(
    kind: str, images: int, tokens: int, channels: int, seed: int = 0, device: str = "cpu"
) -> Tensor:
    """(B, N, C) float32 features.

    Args:
        kind: "random" (independent normal), "clustered" (64 centres plus noise, like patches of a
            few textures), "smooth" (a low-frequency field over the patch grid plus noise, like
            neighbouring patches; `tokens` must be a square) or "near duplicates" (copies of
            N / 8 tokens with a little noise).
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if kind == "random":
        return normal(images, tokens, channels)
    if kind == "clustered":
        centres = normal(images, 64, channels)
        member = torch.randint(64, (images, tokens, 1), generator=generator, device=device)
        return centres.gather(1, member.expand(-1, -1, channels)) + 0.5 * normal(
            images, tokens, channels
        )
    if kind == "smooth":
        side = round(tokens**0.5)
        if side * side != tokens:
            raise ValueError(f"smooth features need a square number of tokens, got {tokens}")
        field = F.interpolate(normal(images, channels, 6, 6), size=(side, side), mode="bicubic")
        return field.flatten(2).transpose(1, 2) + 0.3 * normal(images, tokens, channels)
    if kind == "near duplicates":
        originals = normal(images, tokens // 8, channels)
        member = torch.randint(tokens // 8, (images, tokens, 1), generator=generator, device=device)
        return originals.gather(1, member.expand(-1, -1, channels)) + 0.05 * normal(
            images, tokens, channels
        )
    raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")


def make_attention(
    images: int, tokens: int, seed: int = 0, heads: int = 16, device: str = "cpu"
) -> Tensor:
    """(B, H, N) float32 softmax attention with a long tail, like that of [CLS]."""
    generator = torch.Generator(device).manual_seed(seed + 1)
    logits = 2 * torch.randn((images, heads, tokens), generator=generator, device=device)
    return logits.softmax(dim=-1)


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        op: prune, topk, pairwise_cosine, dedup, cls_attention, received_attention, or
            received_attention_lse (the same with the log-sum-exp given).
        method: of prune.
        tokens: per image, without [CLS].
        channels: of the features; per head, for the attention scores.
        rounds: timed rounds on the CPU, fewer where the baseline takes seconds.
    """

    op: str
    images: int
    tokens: int
    dtype: str = "float32"
    k: int = 64
    channels: int = 1024
    heads: int = 16
    rounds: int = 31
    method: str = vispruner_cuda.methods.DEFAULT

    @property
    def name(self) -> str:
        shape = f"{self.images}x{self.tokens}"
        shape += "" if self.op == "topk" else f"x{self.channels}"
        k = f" k={self.k}" if self.op in ("prune", "topk", "dedup") else ""
        method = "" if self.method == vispruner_cuda.methods.DEFAULT else f" {self.method}"
        return f"{self.op}{method} {shape} {self.dtype}{k}"

    @property
    def is_score(self) -> bool:
        """Whether it computes scores from queries and keys."""
        return "attention" in self.op

    def inputs(self, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """The tensors of the call: `feats` and `attn`, or `q` and `k` (and `lse`).

        Attention scores have q and k of (T, H, D), or of (B, H, D) and (B, H, 1 + N, D).
        """
        dtype = getattr(torch, self.dtype)
        b, n, h, c = self.images, self.tokens, self.heads, self.channels
        if not self.is_score:
            attn = make_attention(b, n, seed, h, device).to(dtype)
            if self.op == "topk":
                return {"attn": attn}
            return {"feats": make_feats("random", b, n, c, seed, device).to(dtype), "attn": attn}
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        if self.op == "cls_attention":
            keys = normal(b, 1 + n, h, c).to(dtype)
            return {"q": normal(b, h, c).to(dtype), "k": keys.transpose(1, 2)}
        q, k = (normal(b * n, h, c).to(dtype) for _ in range(2))
        return {"q": q, "k": k} | ({"lse": normal(h, n)} if self.op.endswith("lse") else {})

    def call(self, x: dict[str, Tensor], operators: Any = vispruner_cuda) -> Callable[[], Any]:
        """The call as a function without arguments.

        Args:
            x: from `inputs`.
            operators: a module with the functional API.
        """
        if self.op == "prune":
            return lambda: operators.prune(x["feats"], x["attn"], self.k, method=self.method)
        if self.op == "topk":
            return lambda: operators.topk(x["attn"], self.k)
        if self.op == "pairwise_cosine":
            return lambda: operators.pairwise_cosine(x["feats"])
        if self.op == "dedup":
            return lambda: operators.dedup(x["feats"], self.k)
        scale = self.channels**-0.5
        if self.op == "cls_attention":
            return lambda: operators.cls_attention(x["q"], x["k"], scale)
        if "lse" in x:
            return lambda: operators.received_attention(x["q"], x["k"], scale, lse=x["lse"])
        return lambda: operators.received_attention(x["q"], x["k"], scale)


# ------------------------------------------------------------------------------------------- CPU
CPU_CASES = (
    Case("prune", 1, 576),
    Case("prune", 1, 576, "bfloat16"),
    Case("prune", 8, 576, rounds=11),
    Case("prune", 8, 576, "bfloat16", rounds=11),
    Case("prune", 1, 2880, rounds=7),
    Case("prune", 1, 2880, "bfloat16", rounds=7),
    Case("prune", 1, 2880, k=320, rounds=7),
    Case("topk", 1, 576),
    Case("topk", 8, 2880),
    Case("pairwise_cosine", 1, 576),
    Case("pairwise_cosine", 1, 2880, rounds=11),
    Case("dedup", 1, 576),
    Case("cls_attention", 8, 576, channels=64),
    Case("received_attention", 1, 2304, channels=80, rounds=11),
    Case("received_attention", 1, 2304, "bfloat16", channels=80, rounds=11),
)

#: Every method at the same shapes.
CPU_METHOD_CASES = tuple(
    Case("prune", images, 576, dtype, rounds=201 if images == 1 else 15, method=method)
    for images in (1, 8)
    for dtype in ("float32", "bfloat16")
    for method in vispruner_cuda.methods.METHODS
)

#: Those whose extra memory is measured.
CPU_MEMORY_CASES = tuple(
    case for case in CPU_CASES if case.op == "prune" and case.images == 1 and case.k == 64
)


# ------------------------------------------------------------------------------------------- GPU
@dataclass(frozen=True)
class Goal:
    """A case on a GPU, and the time it should take.

    Attributes:
        goal, aim: microseconds for the whole call, or per image where `per` is "image"; or,
            with `relative_to`, multiples of the floor or of that baseline's time.
    """

    name: str
    case: Case
    goal: float | None = None
    aim: float | None = None
    per: str = "call"
    relative_to: str | None = None


SDPA = "scaled_dot_product_attention"


def _fp16(op: str, images: int, tokens: int, channels: int = 1024, **more: Any) -> Case:
    return Case(op, images, tokens, "float16", channels=channels, **more)


_CLS_16, _CLS_64 = (_fp16("cls_attention", images, 576, 64) for images in (16, 64))
_RECEIVED = _fp16("received_attention", 1, 4096, 80)
_RECEIVED_LSE = _fp16("received_attention_lse", 1, 4096, 80)

GOALS = (
    Goal("1 image", _fp16("prune", 1, 576), 40, 25),
    Goal("1 image, bf16", Case("prune", 1, 576, "bfloat16"), 40, 25),
    Goal("5 tiles (LLaVA-NeXT)", _fp16("prune", 5, 576), 50, 30),
    Goal("64 images", _fp16("prune", 64, 576), 2.5, 1.5, per="image"),
    Goal("256 images", _fp16("prune", 256, 576), 2.0, 1.2, per="image"),
    Goal("4096 tokens (Qwen)", _fp16("prune", 1, 4096, 3584, k=410), 3000, 1500),
    Goal("[CLS] attention, 16 images", _CLS_16, 1.3, 1.1, relative_to="floor"),
    Goal("[CLS] attention, 64 images", _CLS_64, 1.3, 1.1, relative_to="floor"),
    Goal("received attention", _RECEIVED, 1.2, 0.8, relative_to=SDPA),
    Goal("received attention, lse", _RECEIVED_LSE, 1.2, 0.8, relative_to=SDPA),
    Goal("top-k of 576", _fp16("topk", 1, 576)),
    Goal("top-k of 64 x 576", _fp16("topk", 64, 576)),
    Goal("pairwise cosine", _fp16("pairwise_cosine", 1, 576)),
    Goal("pairwise cosine, 64 images", _fp16("pairwise_cosine", 64, 576)),
)

_LENGTHS = (256, 576, 1024, 2048, 4096, 8192, 16384)
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
_BUDGETS = (32, 64, 128, 192, 320, 575)
_WIDTHS = (256, 768, 1024, 1536, 4096, 8192)
_DTYPES = ("float16", "bfloat16", "float32")

CURVES: dict[str, tuple[Goal, ...]] = {
    "tokens": tuple(Goal(str(n), _fp16("prune", 1, n)) for n in _LENGTHS),
    "images": tuple(Goal(str(b), _fp16("prune", b, 576)) for b in _BATCHES),
    "k": tuple(Goal(str(k), _fp16("prune", 1, 576, k=k)) for k in _BUDGETS),
    "channels": tuple(Goal(str(c), _fp16("prune", 1, 576, c)) for c in _WIDTHS),
    "dtype": tuple(Goal(d, Case("prune", 8, 576, d)) for d in _DTYPES),
}
CURVES_WITH_BASELINES = ("tokens", "images")

# Goals to measure under every plan of these stages (docs/performance.md).
PLANNED_STAGES = ("launch", "rank", "gram", "sort")
PLANNED_GOALS = ("1 image", "64 images", "4096 tokens (Qwen)")
