"""The attention scores, as the model families ask for them: one place that picks the operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import vispruner_cuda as _ops


def _computable(x: Tensor) -> Tensor:
    """The operators take half and single precision; a float64 model is scored in float32."""
    return x.float() if x.dtype == torch.float64 else x


def cls_attention(q_cls: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention of [CLS] to every patch, averaged over heads.

    Args:
        q_cls: (B, H, D) query of [CLS]; k: (B, H, 1 + N, D) keys, [CLS] first; any float dtype.
        scale: factor of the attention logits.

    Returns:
        (B, N) float32.
    """
    return _ops.cls_attention(_computable(q_cls.detach()), _computable(k.detach()), scale)


def received_attention(q: Tensor, k: Tensor, scale: float, cu_seqlens: Sequence[int]) -> Tensor:
    """Attention every token receives, averaged over the queries and heads of its own picture.

    Args:
        q, k: (T, H, D) after rotary embedding, pictures packed one after the other.
        scale: factor of the attention logits.
        cu_seqlens: picture i is rows cu_seqlens[i] to cu_seqlens[i + 1].

    Returns:
        (T,) float32.
    """
    return _ops.received_attention(
        _computable(q.detach()), _computable(k.detach()), scale, cu_seqlens
    )
