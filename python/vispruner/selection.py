"""Token selection: attention scores, the budget, and calls of the operators.

All integrations (transformers, the vLLM plugin, the command, a CLIP tower) score and select tokens
through this file.
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vispruner_cuda
from vispruner_cuda import methods


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
        k: tokens to retain, at least 1; a picture with fewer retains all. Not together with ratio.
        ratio: share of the tokens to retain, in (0, 1]: the nearest whole number, at least 1.
        important_ratio, step, seed, scope_alpha, mmr_lambda: of one method each, as in
            `vispruner_cuda.prune`. Those of this method have their defaults where None is passed,
            those of the others are None.
        method: which tokens: a name in `vispruner_cuda.methods.METHODS`.

    Raises:
        TypeError, ValueError: on a value out of these bounds, or of another method.
    """

    k: int | None = None
    ratio: float | None = None
    important_ratio: float | None = None
    step: int | None = None
    method: str = methods.DEFAULT
    seed: int | None = None
    scope_alpha: float | None = None
    mmr_lambda: float | None = None

    def __post_init__(self) -> None:
        if (self.k is None) == (self.ratio is None):
            raise ValueError(
                f"give exactly one of k and ratio, got k={self.k!r} and ratio={self.ratio!r}"
            )
        k, ratio = self.k, self.ratio
        if k is not None:
            if not isinstance(k, numbers.Integral) or isinstance(k, bool):
                raise TypeError(f"k must be an int, got {k!r} ({type(k).__name__})")
            if k < 1:
                raise ValueError(f"k must be at least 1, got {k}")
        if ratio is not None:
            if not isinstance(ratio, numbers.Real) or isinstance(ratio, bool):
                raise TypeError(f"ratio must be a float, got {ratio!r} ({type(ratio).__name__})")
            if not 0 < ratio <= 1:  # false for NaN as well
                raise ValueError(f"ratio must be in (0, 1], got {ratio}")
        given = {name: getattr(self, name) for name in methods.PARAMETERS}
        for name, value in methods.resolve(self.method, **given).items():
            object.__setattr__(self, name, value)

    @property
    def parameters(self) -> dict[str, Any]:
        """The method and its parameters, as keyword arguments of `vispruner_cuda.prune`."""
        own = methods.METHODS[self.method].parameters
        values = {p.name: getattr(self, p.name) for p in own}
        return {"method": self.method} | {
            p.name: int(values[p.name]) if p.step == 1 else float(values[p.name]) for p in own
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `vispruner.apply` for this budget, as plain data."""
        amount = {"ratio": float(self.ratio or 0)} if self.k is None else {"k": int(self.k)}
        return {**amount, **self.parameters}

    def count(self, tokens: int, pictures: int = 1) -> int:
        """Retained tokens of `pictures` pictures with `tokens` tokens in total."""
        if self.k is not None:
            return min(int(self.k) * pictures, tokens)
        assert self.ratio is not None
        return min(tokens, max(1, round(self.ratio * tokens)))

    def ranked(self, count: int) -> int:
        """How many of `count` retained tokens are those with the highest scores."""
        if self.method == "topk":
            return count
        return 0 if self.important_ratio is None else int(count * float(self.important_ratio))

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
            **self.parameters,
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
            **self.parameters,
        )
        if feats.dtype != torch.float64 and not feats.requires_grad:
            return kept.feats, kept.indices
        return feats[kept.indices], kept.indices
