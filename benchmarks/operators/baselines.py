"""The methods in plain PyTorch: the baselines of the operators, under the same names.

Written from the descriptions of the methods, with the steps and the dtype handling of an ordinary
eager implementation: features are normalized once in their own dtype. VisPruner (docs/numerics.md,
"The method") multiplies A with B and sorts in every round; lists of odd length are split by this
project's rule. The greedy methods evaluate their authors' formula for all tokens before every pick.
Nothing here is canonical: in another precision it retains other tokens, which
rounding_sensitivity.py measures.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_scores(cls_attn: Tensor) -> Tensor:
    """(B, N) or (B, H, N) attention to (B, N) scores: the mean over heads."""
    return cls_attn if cls_attn.dim() == 2 else cls_attn.mean(dim=1)


def retained(feats: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` (B, k) of feats (B, N, C). Indexing is faster than an expanded gather."""
    return feats[torch.arange(len(feats), device=feats.device).unsqueeze(1), indices]


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


def topk_one(feats: Tensor, scores: Tensor, k: int) -> Tensor:
    """The k highest scores of one image."""
    return scores.topk(k).indices


def random_one(feats: Tensor, scores: Tensor, k: int) -> Tensor:
    """k random tokens of one image."""
    return torch.randperm(len(scores), device=scores.device)[:k]


def maxmin_one(feats: Tensor, scores: Tensor, k: int) -> Tensor:
    """Farthest points (DivPrune) of one image, by 1 - cosine.

    The smallest distance of a token is the one to itself, so the first pick goes by the second
    smallest.
    """
    unit = F.normalize(feats, dim=-1)
    distances = 1 - unit @ unit.T
    picks = torch.empty(k, dtype=torch.int64, device=feats.device)
    nearest = distances.topk(2, dim=0, largest=False).values[1]
    for i in range(k):
        if i > 0:
            nearest = distances.index_select(0, picks[:i]).amin(dim=0)
        picks[i] = nearest.argmax()
    return picks


def scope_one(feats: Tensor, scores: Tensor, k: int) -> Tensor:
    """Largest attention times coverage gain (SCOPE) of one image."""
    unit = F.normalize(feats, dim=-1)
    cosines = unit @ unit.T
    covered = torch.zeros_like(cosines[0])
    left = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    picks = torch.empty(k, dtype=torch.int64, device=feats.device)
    for i in range(k):
        gains = (cosines - covered).clamp_min(0).sum(dim=1) * scores
        picks[i] = pick = gains.masked_fill(~left, float("-inf")).argmax()
        left[pick] = False
        covered = torch.maximum(covered, cosines[pick])
    return picks


def mmr_one(feats: Tensor, scores: Tensor, k: int) -> Tensor:
    """Largest importance minus the largest cosine to a pick (lambda = 1) of one image."""
    unit = F.normalize(feats, dim=-1)
    cosines = unit @ unit.T
    importance = scores / scores.max()
    largest = torch.zeros_like(importance)
    left = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    picks = torch.empty(k, dtype=torch.int64, device=feats.device)
    for i in range(k):
        values = importance - largest
        picks[i] = pick = values.masked_fill(~left, float("-inf")).argmax()
        left[pick] = False
        largest = cosines[pick] if i == 0 else torch.maximum(largest, cosines[pick])
    return picks


_ONE: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "vispruner": prune_one,
    "topk": topk_one,
    "random": random_one,
    "maxmin": maxmin_one,
    "scope": scope_one,
    "mmr": mmr_one,
}


def prune_each(
    feats: Tensor, cls_attn: Tensor, k: int, *, method: str = "vispruner"
) -> tuple[Tensor, Tensor]:
    """The eager loop, one image after another: (features, indices) as `prune` returns them."""
    scores = mean_scores(cls_attn)
    images = zip(feats, scores, strict=True)
    indices = torch.stack([_ONE[method](x, s, k).sort().values for x, s in images])
    return retained(feats, indices), indices


def greedy_batched(feats: Tensor, scores: Tensor, k: int, method: str) -> Tensor:
    """maxmin, scope or mmr on all images at once: (B, k) picks."""
    cosines = pairwise_cosine(feats)
    images = torch.arange(len(feats), device=feats.device)
    importance = scores / scores.amax(dim=1, keepdim=True)
    covered = torch.zeros_like(cosines[:, 0])
    taken = torch.zeros_like(scores, dtype=torch.bool)
    picks = torch.empty((len(feats), k), dtype=torch.int64, device=feats.device)
    for i in range(k):
        if method == "scope":
            values = (cosines - covered.unsqueeze(1)).clamp_min(0).sum(dim=2) * scores
        elif method == "mmr":
            values = importance - covered
        else:
            values = -(cosines.topk(2, dim=1).values[:, 1] if i == 0 else covered)
        picks[:, i] = pick = values.masked_fill(taken, float("-inf")).argmax(dim=1)
        taken[images, pick] = True
        row = cosines[images, pick]
        covered = row if i == 0 and method != "scope" else torch.maximum(covered, row)
    return picks


def prune(
    feats: Tensor,
    cls_attn: Tensor,
    k: int,
    *,
    method: str = "vispruner",
    important_ratio: float = 0.5,
    step: int = 8,
) -> tuple[Tensor, Tensor]:
    """The eager loop on all images at once; every list has the same length."""
    scores = mean_scores(cls_attn)
    if method != "vispruner":
        if method == "topk":
            indices = scores.topk(k, dim=1).indices
        elif method == "random":
            indices = torch.rand(scores.shape, device=scores.device).topk(k, dim=1).indices
        else:
            indices = greedy_batched(feats, scores, k, method)
        indices = indices.sort(dim=1).values
        return retained(feats, indices), indices
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
    return retained(feats, indices), indices


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
