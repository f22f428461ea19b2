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
from vispruner_cuda._checks import describe, shown
from vispruner_cuda.functional import differentiated


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


#: The share of the attention that k="auto" retains by default.
AUTO_MASS = 0.8


@dataclass(frozen=True)
class Budget:
    """How many tokens to retain per picture (an image, a tile of one, or a frame of a video).

    Attributes:
        k: tokens to retain, at least 1; a picture with fewer retains all. Not together with ratio.
            "auto": as many as hold the share `mass` of the attention, per picture
            (`counts` has the definition).
        ratio: share of the tokens to retain, in (0, 1]: the nearest whole number, at least 1.
        important_ratio, step, seed, scope_alpha, mmr_lambda: of one method each, as in
            `vispruner_cuda.prune`. Those of this method have their defaults where None is passed,
            those of the others are None.
        method: which tokens: a name in `vispruner_cuda.methods.METHODS`.
        mass: of k="auto": in (0, 1]; default AUTO_MASS.
        max_k: of k="auto": the largest k, at least 1; None: no limit.

    Raises:
        TypeError, ValueError: on a value out of these bounds, or of another method.
    """

    k: int | str | None = None
    ratio: float | None = None
    important_ratio: float | None = None
    step: int | None = None
    method: str = methods.DEFAULT
    seed: int | None = None
    scope_alpha: float | None = None
    mmr_lambda: float | None = None
    mass: float | None = None
    max_k: int | None = None

    def __post_init__(self) -> None:
        if (self.k is None) == (self.ratio is None):
            raise ValueError(
                f"give exactly one of k and ratio, got k={self.k!r} and ratio={self.ratio!r}"
            )
        if self.auto:
            self._set("mass", _share("mass", AUTO_MASS if self.mass is None else self.mass))
            if self.max_k is not None:
                self._set("max_k", _count("max_k", self.max_k))
        else:
            for name in ("mass", "max_k"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is a setting of k='auto', got {name}={getattr(self, name)!r} with "
                        f"k={self.k!r} and ratio={self.ratio!r}: leave it out"
                    )
            if self.k is not None:
                self._set("k", _count("k", self.k, " or 'auto'"))
            if self.ratio is not None:
                self._set("ratio", _share("ratio", self.ratio))
        given = {name: getattr(self, name) for name in methods.PARAMETERS}
        for name, value in methods.resolve(self.method, **given).items():
            self._set(name, value)

    def _set(self, name: str, value: float) -> None:
        """Replaces a given number by one of Python's, while the frozen budget is made."""
        object.__setattr__(self, name, value)

    @property
    def auto(self) -> bool:
        """Whether the number of tokens depends on the picture."""
        return isinstance(self.k, str) and self.k == "auto"

    @property
    def parameters(self) -> dict[str, Any]:
        """The method and its parameters, as keyword arguments of `vispruner_cuda.prune`."""
        own = methods.METHODS[self.method].parameters
        return {"method": self.method} | {p.name: getattr(self, p.name) for p in own}

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `vispruner.apply` for this budget, as plain data."""
        amount: dict[str, Any]
        if self.ratio is not None:
            amount = {"ratio": self.ratio}
        elif self.auto:
            amount = {"k": self.k, "mass": self.mass, "max_k": self.max_k}
        else:
            amount = {"k": self.k}
        return {**amount, **self.parameters}

    def count(self, tokens: int, pictures: int = 1) -> int:
        """Retained tokens of `pictures` pictures with `tokens` tokens in total; with k="auto" the
        most that they can retain."""
        if self.ratio is not None:
            return min(tokens, max(1, round(self.ratio * tokens)))
        most = self.max_k if self.auto else self.k
        return tokens if most is None else min(int(most) * pictures, tokens)

    def counts(
        self, scores: Tensor, lengths: Sequence[int], pictures: Sequence[int] | None = None
    ) -> list[int]:
        """Retained tokens of each of several packed pictures.

        With k="auto" they depend on the scores (docs/numerics.md, "Number of tokens"), and the
        host waits for the device once.

        Args:
            scores: (T,) float; lengths: tokens of each.
            pictures: if an entry of lengths holds several pictures, their number, for k and max_k.
        """
        shares = [1] * len(lengths) if pictures is None else pictures
        most = [self.count(n, p) for n, p in zip(lengths, shares, strict=True)]
        if not self.auto or not lengths:
            return most
        assert self.mass is not None
        alike = len(set(lengths)) == 1
        rows = [scores.reshape(len(lengths), -1)] if alike else scores.split(list(lengths))
        found = torch.hstack([_tokens_with_mass(row, self.mass) for row in rows]).tolist()
        return [min(own, limit) for own, limit in zip(found, most, strict=True)]

    def ranked(self, count: int) -> int:
        """How many of `count` retained tokens are those with the highest scores."""
        if self.method == "topk":
            return count
        return 0 if self.important_ratio is None else int(count * self.important_ratio)

    def select(self, feats: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Selects tokens of pictures of equal size.

        Args:
            feats: (B, N, C) any float dtype; scores: (B, N).

        Returns:
            (B, k, C) retained features, differentiable in feats; (B, k) int64 ascending indices;
            and the number of retained tokens of each picture. With k="auto", k is the largest of
            these numbers, and the others repeat their last token.
        """
        pictures, tokens = feats.shape[:2]
        if pictures == 0 or tokens == 0:
            indices = torch.arange(tokens, device=feats.device).expand(feats.shape[:2])
            return feats, indices, [tokens] * pictures
        if self.auto:
            return self._select_padded(feats, scores)
        count = self.count(tokens)
        kept = vispruner_cuda.prune(
            _computable(feats), scores.to(feats.device), count, **self.parameters
        )
        counts = [count] * pictures
        if feats.dtype != torch.float64 and not differentiated(feats):
            return kept.feats, kept.indices, counts
        return _rows(feats, kept.indices), kept.indices, counts

    def _select_padded(self, feats: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        pictures, tokens = feats.shape[:2]
        lengths = [tokens] * pictures
        counts = self.counts(scores.flatten(), lengths)
        _, rows = self.select_packed(
            feats.detach().flatten(0, 1), scores.flatten(), lengths, counts
        )
        starts = [0, *itertools.accumulate(counts)][:-1]
        padded = torch.tensor(
            [
                [start + min(i, count - 1) for i in range(max(counts))]
                for start, count in zip(starts, counts, strict=True)
            ]
        )
        indices = rows[padded.to(rows.device)] % tokens
        return _rows(feats, indices), indices, counts

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
        if feats.dtype != torch.float64 and not differentiated(feats):
            return kept.feats, kept.indices
        return feats[kept.indices], kept.indices


def _rows(feats: Tensor, indices: Tensor) -> Tensor:
    """(B, k, C): rows of feats (B, N, C), differentiable, by indices (B, k)."""
    return feats.gather(1, indices.unsqueeze(-1).expand(-1, -1, feats.shape[-1]))


def _tokens_with_mass(scores: Tensor, mass: float) -> Tensor:
    """(...) int64: tokens that hold a share of the weights of scores (..., N), at least 1."""
    weights = vispruner_cuda.reference.importance(scores.detach().float()) * 2.0**24
    sums = weights.round().long().sort(descending=True).values.cumsum(-1)
    return (sums.double() < mass * sums[..., -1:].double()).sum(-1) + 1


def _count(name: str, value: object, also: str = "") -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int{also}, got {describe(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {shown(value)}")
    return int(value)


def _share(name: str, value: object) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {describe(value)}")
    if not 0 < value <= 1:  # type: ignore[operator]  # false for NaN as well
        raise ValueError(f"{name} must be in (0, 1], got {shown(value)}")
    return float(value)
