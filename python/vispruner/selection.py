"""Token selection: attention scores, the budget, and calls of the operators.

All integrations (transformers, the vLLM plugin, the command, a CLIP tower) score and select tokens
through this file.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import vispruner_cuda


def _computable(x: Tensor) -> Tensor:
    """The operators take half and single precision; float64 is scored and selected in float32."""
    x = x.detach()
    return x.float() if x.dtype == torch.float64 else x


def cls_attention(q_cls: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention of [CLS] to each patch, averaged over heads.

    Args:
        q_cls: (B, H, D) query of [CLS]; k: (B, H, 1 + N, D) keys, [CLS] first; any float dtype.
        scale: factor of the attention logits.

    Returns:
        (B, N) float32.
    """
    return vispruner_cuda.cls_attention(_computable(q_cls), _computable(k), scale)


def received_attention(q: Tensor, k: Tensor, scale: float, cu_seqlens: Sequence[int]) -> Tensor:
    """Attention that each token receives, averaged over the queries and heads of its picture.

    Args:
        q, k: (T, H, D) after rotary embedding, packed pictures.
        scale: factor of the attention logits.
        cu_seqlens: picture i is rows cu_seqlens[i] to cu_seqlens[i + 1].

    Returns:
        (T,) float32.
    """
    return vispruner_cuda.received_attention(_computable(q), _computable(k), scale, cu_seqlens)


@dataclass(frozen=True)
class Budget:
    """How many tokens to retain per picture (an image, a tile of one, or a frame of a video).

    Attributes:
        k: tokens to retain, at least 1; pictures with fewer tokens retain all. Exactly one of k and
            ratio must be set.
        ratio: share of the tokens to retain, in (0, 1], rounded, at least one token.
        important_ratio: share of the retained tokens selected by attention, in [0, 1].
        step: tokens that the deduplication drops per round, at least 1.

    Raises:
        TypeError, ValueError: a value is outside these bounds.
    """

    k: int | None = None
    ratio: float | None = None
    important_ratio: float = 0.5
    step: int = 8

    def __post_init__(self) -> None:
        if (self.k is None) == (self.ratio is None):
            raise ValueError(
                f"give exactly one of k and ratio, got k={self.k!r} and ratio={self.ratio!r}"
            )
        for name, whole in (("k", self.k), ("step", self.step)):
            if whole is None:
                continue
            if not isinstance(whole, numbers.Integral) or isinstance(whole, bool):
                raise TypeError(f"{name} must be an int, got {whole!r} ({type(whole).__name__})")
            if whole < 1:
                raise ValueError(f"{name} must be at least 1, got {whole}")
        for name, share in (("ratio", self.ratio), ("important_ratio", self.important_ratio)):
            if share is None:
                continue
            if not isinstance(share, numbers.Real) or isinstance(share, bool):
                raise TypeError(f"{name} must be a float, got {share!r} ({type(share).__name__})")
            if math.isnan(share) or not 0 <= share <= 1 or (name == "ratio" and share == 0):
                bounds = "(0, 1]" if name == "ratio" else "[0, 1]"
                raise ValueError(f"{name} must be in {bounds}, got {share}")

    def count(self, tokens: int, pictures: int = 1) -> int:
        """Retained tokens of `pictures` pictures with `tokens` tokens in total."""
        if self.k is not None:
            return min(int(self.k) * pictures, tokens)
        assert self.ratio is not None
        return min(tokens, max(1, round(self.ratio * tokens)))

    def ranked(self, count: int) -> int:
        """The number of important tokens among `count` retained tokens."""
        return int(count * float(self.important_ratio))

    def select(self, feats: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Selects tokens of pictures of equal size.

        Args:
            feats: (B, N, C) any float dtype; scores: (B, N).

        Returns:
            (B, k, C) retained features, differentiable in feats, and (B, k) int64 ascending
            indices.
        """
        if feats.shape[0] == 0 or feats.shape[1] == 0:
            return feats, torch.arange(feats.shape[1], device=feats.device).expand(feats.shape[:2])
        kept = vispruner_cuda.prune(
            _computable(feats),
            scores.to(feats.device),
            self.count(feats.shape[1]),
            important_ratio=float(self.important_ratio),
            step=int(self.step),
        )
        if feats.dtype != torch.float64 and not feats.requires_grad:
            return kept.feats, kept.indices
        rows = kept.indices.unsqueeze(-1).expand(-1, -1, feats.shape[-1])
        return feats.gather(1, rows), kept.indices

    def select_packed(
        self, feats: Tensor, scores: Tensor, lengths: Sequence[int], counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Selects tokens of packed pictures of different sizes.

        Args:
            feats: (T, C); scores: (T,).
            lengths: tokens of each picture; counts: tokens to retain of each.

        Returns:
            (T', C) retained features, differentiable in feats, and (T',) int64 ascending rows of
            feats.
        """
        kept = vispruner_cuda.prune_varlen(
            _computable(feats),
            scores.to(feats.device),
            [0, *itertools.accumulate(lengths)],
            list(counts),
            important_ratio=float(self.important_ratio),
            step=int(self.step),
        )
        if feats.dtype != torch.float64 and not feats.requires_grad:
            return kept.feats, kept.indices
        return feats[kept.indices], kept.indices
