"""Synthetic features and attention, and what each benchmark case is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS = 16
KINDS = ("random", "clustered", "smooth")


def make_feats(kind: str, images: int, tokens: int, channels: int, seed: int = 0) -> Tensor:
    """(B, N, C) float32 features.

    Args:
        kind: "random" (independent normal), "clustered" (64 centres and noise, as patches of a
            few textures have) or "smooth" (a low-frequency field over the patch grid and noise,
            as neighbouring patches have; tokens must be a square).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if kind == "random":
        return normal(images, tokens, channels)
    if kind == "clustered":
        centres = normal(images, 64, channels)
        member = torch.randint(64, (images, tokens, 1), generator=generator)
        return centres.gather(1, member.expand(-1, -1, channels)) + 0.5 * normal(
            images, tokens, channels
        )
    if kind == "smooth":
        side = round(tokens**0.5)
        if side * side != tokens:
            raise ValueError(f"smooth features need a square number of tokens, got {tokens}")
        field = F.interpolate(normal(images, channels, 6, 6), size=(side, side), mode="bicubic")
        return field.flatten(2).transpose(1, 2) + 0.3 * normal(images, tokens, channels)
    raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")


def make_attention(
    images: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, H, N) softmax attention with the long tail that [CLS] attention has."""
    generator = torch.Generator().manual_seed(seed + 1)
    logits = 2 * torch.randn((images, HEADS, tokens), generator=generator)
    return logits.softmax(dim=-1).to(dtype)


@dataclass(frozen=True)
class Case:
    """One comparison: an operator against its baselines on the same tensors.

    Attributes:
        op: prune, topk, pairwise_cosine, dedup, cls_attention or received_attention.
        channels: of the features; of a head, for the attention scores.
        rounds: timed rounds, fewer where the baseline takes seconds.
    """

    op: str
    images: int
    tokens: int
    dtype: str = "float32"
    k: int = 64
    channels: int = 1024
    rounds: int = 31

    @property
    def name(self) -> str:
        shape = f"{self.images}x{self.tokens}"
        shape += "" if self.op == "topk" else f"x{self.channels}"
        k = f" k={self.k}" if self.op in ("prune", "topk", "dedup") else ""
        return f"{self.op} {shape} {self.dtype}{k}"

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(feats, cls_attn)."""
        dtype = getattr(torch, self.dtype)
        feats = make_feats("random", self.images, self.tokens, self.channels).to(dtype)
        return feats, make_attention(self.images, self.tokens, dtype=dtype)

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """q and k of an attention score: (T, H, D) both, or (B, H, D) and (B, H, 1 + N, D)."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.images, 1 + self.tokens, HEADS, self.channels)
        q, k = (torch.randn(shape, generator=generator) for _ in range(2))
        dtype = getattr(torch, self.dtype)
        if self.op == "cls_attention":
            return q[:, 0].to(dtype), k.to(dtype).transpose(1, 2)
        return q[0, 1:].to(dtype), k[0, 1:].to(dtype)


CASES = (
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
