"""Shapes and dtypes of the operators without data: for FakeTensor, meta and torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("vispruner::topk")
def _topk(cls_attn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (cls_attn.shape[0], min(k, cls_attn.shape[-1]))
    return (
        cls_attn.new_empty(shape, dtype=torch.float32),
        cls_attn.new_empty(shape, dtype=torch.int64),
    )


@torch.library.register_fake("vispruner::pairwise_cosine")
def _pairwise_cosine(feats: Tensor) -> Tensor:
    batch, n, _ = feats.shape
    return feats.new_empty((batch, n, n), dtype=torch.float32)


@torch.library.register_fake("vispruner::dedup")
def _dedup(feats: Tensor, k: int, step: int) -> Tensor:
    return feats.new_empty((feats.shape[0], min(k, feats.shape[1])), dtype=torch.int64)


@torch.library.register_fake("vispruner::prune")
def _prune(
    feats: Tensor, cls_attn: Tensor, k: int, important_ratio: float, step: int
) -> tuple[Tensor, Tensor]:
    batch, n, channels = feats.shape
    kept = min(k, n)
    return (
        feats.new_empty((batch, kept, channels)),
        feats.new_empty((batch, kept), dtype=torch.int64),
    )


@torch.library.register_fake("vispruner::prune_by")
def _prune_by(
    feats: Tensor, cls_attn: Tensor, k: int, method: str, parameter: float
) -> tuple[Tensor, Tensor]:
    return _prune(feats, cls_attn, k, 0.5, 1)


@torch.library.register_fake("vispruner::prune_varlen")
def _prune_varlen(
    feats: Tensor,
    cls_attn: Tensor,
    cu_seqlens: list[int],
    k: list[int],
    important_ratio: float,
    step: int,
) -> tuple[Tensor, Tensor]:
    lengths = zip(cu_seqlens[:-1], cu_seqlens[1:], k, strict=True)
    kept = sum(min(k_image, end - start) for start, end, k_image in lengths)
    return feats.new_empty((kept, feats.shape[1])), feats.new_empty((kept,), dtype=torch.int64)


@torch.library.register_fake("vispruner::prune_varlen_by")
def _prune_varlen_by(
    feats: Tensor,
    cls_attn: Tensor,
    cu_seqlens: list[int],
    k: list[int],
    method: str,
    parameter: float,
) -> tuple[Tensor, Tensor]:
    return _prune_varlen(feats, cls_attn, cu_seqlens, k, 0.5, 1)


@torch.library.register_fake("vispruner::cls_attention")
def _cls_attention(q_cls: Tensor, k: Tensor, scale: float) -> Tensor:
    return k.new_empty((k.shape[0], k.shape[2] - 1), dtype=torch.float32)


@torch.library.register_fake("vispruner::received_attention")
def _received_attention(
    q: Tensor, k: Tensor, scale: float, cu_seqlens: list[int], lse: Tensor | None
) -> Tensor:
    return q.new_empty((q.shape[0],), dtype=torch.float32)
