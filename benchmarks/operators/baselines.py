"""The method in plain PyTorch: the baselines of the operators, under the same names.

Written from the description of the method (docs/numerics.md, "The method"), with the steps and the
dtype handling of an ordinary eager implementation: features are normalized once in their own
dtype, and every round multiplies A with B and sorts. Lists of odd length are split by this
project's rule. Nothing here is canonical: in another precision it retains other tokens, which
rounding_sensitivity.py measures.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_scores(cls_attn: Tensor) -> Tensor:
    """(B, N) or (B, H, N) attention to (B, N) scores: the mean over heads."""
    return cls_attn if cls_attn.dim() == 2 else cls_attn.mean(dim=1)


def dedup_list(normalized: Tensor, residual: Tensor, keep: int, step: int = 8) -> Tensor:
    """The loop for one image.

    Args:
        normalized: (N, C) unit features.
        residual: (R,) token indices in ranking order.
        keep: number of tokens to retain.

    Returns:
        (min(keep, R),) token indices.
    """
    while len(residual) > keep:
        a, b = residual[0::2], residual[1::2]
        redundancy = (normalized[a] @ normalized[b].T).amax(dim=1)
        drop = min(step, len(residual) - keep, len(a))
        survivors = redundancy.argsort(descending=True)[drop:]
        residual = torch.cat([a[survivors], b])
    return residual


def prune_one(
    feats: Tensor, scores: Tensor, k: int, important_ratio: float = 0.5, step: int = 8
) -> Tensor:
    """Retained token indices of one image, ascending: feats (N, C), scores (N,)."""
    if k >= len(scores):
        return torch.arange(len(scores), device=scores.device)
    ranking = scores.argsort(descending=True)
    k_important = int(k * important_ratio)
    important, residual = ranking[:k_important], ranking[k_important:]
    if k == k_important:
        return important.sort().values
    diverse = dedup_list(F.normalize(feats, dim=-1), residual, k - k_important, step)
    return torch.cat([important, diverse]).sort().values


def prune_each(
    feats: Tensor, cls_attn: Tensor, k: int, *, important_ratio: float = 0.5, step: int = 8
) -> tuple[Tensor, Tensor]:
    """The eager loop, one image after another: (features, indices) as `prune` returns them."""
    scores = mean_scores(cls_attn)
    images = zip(feats, scores, strict=True)
    indices = torch.stack([prune_one(x, s, k, important_ratio, step) for x, s in images])
    return feats.gather(1, indices.unsqueeze(-1).expand(-1, -1, feats.shape[-1])), indices


def prune(
    feats: Tensor, cls_attn: Tensor, k: int, *, important_ratio: float = 0.5, step: int = 8
) -> tuple[Tensor, Tensor]:
    """The eager loop on all images at once; every list has the same length."""
    scores = mean_scores(cls_attn)
    k_important = int(k * important_ratio)
    ranking = scores.argsort(dim=1, descending=True)
    important, residual = ranking[:, :k_important], ranking[:, k_important:]
    keep = min(k, scores.shape[1]) - k_important
    normalized = F.normalize(feats, dim=-1)

    def rows(tokens: Tensor) -> Tensor:
        return normalized.gather(1, tokens.unsqueeze(-1).expand(-1, -1, feats.shape[-1]))

    while residual.shape[1] > keep:
        a, b = residual[:, 0::2], residual[:, 1::2]
        if keep == 0:
            residual = residual[:, :0]
            break
        redundancy = (rows(a) @ rows(b).transpose(1, 2)).amax(dim=2)
        drop = min(step, residual.shape[1] - keep, a.shape[1])
        survivors = redundancy.argsort(dim=1, descending=True)[:, drop:]
        residual = torch.cat([a.gather(1, survivors), b], dim=1)
    indices = torch.cat([important, residual], dim=1).sort(dim=1).values
    return feats.gather(1, indices.unsqueeze(-1).expand(-1, -1, feats.shape[-1])), indices


def topk(cls_attn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Highest scores: mean over heads, then torch.topk."""
    values, indices = mean_scores(cls_attn).topk(min(k, cls_attn.shape[-1]), dim=1)
    return values, indices


def pairwise_cosine(feats: Tensor) -> Tensor:
    """(B, N, N) cosines from one matrix product in the features' dtype."""
    normalized = F.normalize(feats, dim=-1)
    return normalized @ normalized.transpose(1, 2)


def dedup(feats: Tensor, k: int, *, step: int = 8) -> Tensor:
    """The loop without ranking, on tokens in ranking order."""
    order = torch.arange(feats.shape[1], device=feats.device)
    kept = [dedup_list(F.normalize(x, dim=-1), order, k, step).sort().values for x in feats]
    return torch.stack(kept)


def cls_attention(q_cls: Tensor, k: Tensor, scale: float) -> Tensor:
    """(B, N) scores from q_cls (B, H, D) and k (B, H, 1 + N, D)."""
    logits = q_cls.unsqueeze(2) @ k.transpose(2, 3) * scale
    return logits.softmax(-1)[:, :, 0, 1:].float().mean(1)


def received_attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(T,) scores of one image from q and k (T, H, D), with the whole attention matrix."""
    logits = q.transpose(0, 1) @ k.permute(1, 2, 0) * scale
    return logits.softmax(-1).float().mean((0, 1))
