"""The methods in plain PyTorch, which every kernel of this package is tested against.

Canonical numerics v1 (docs/numerics.md): every arithmetic step is either exact or one
correctly rounded IEEE operation, so the retained tokens are the same on every device, for every
batch size and in every implementation. The code is written to be read, not for speed. The functions
take the same arguments as their namesakes in `vispruner_cuda` and run on any device that has
float64.

Source: VisPruner, arXiv 2412.01818 (ICCV 2025), section 3; rules for odd list lengths and
very small k are this project's own, because the authors' code is undefined there. Sources of the
other methods are in `vispruner_cuda.methods`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from . import _checks, methods
from ._results import PruneResult, PruneVarlenResult, TopkResult

_QMAX = 2047.0  # 12-bit symmetric quantization: integers in [-2047, 2047]
_TINY = 1e-30  # a token whose largest magnitude is below this counts as zero


# ------------------------------------------------------------------------ the canonical steps
def ranking_scores(cls_attn: Tensor) -> Tensor:
    """Scores that tokens are ranked by.

    Args:
        cls_attn: (B, N) scores or (B, H, N) attention of each head.

    Returns:
        (B, N) float32: heads added in index order with plain float32 additions (no division:
        it cannot change the ranking); NaN replaced by -inf, so that it ranks last, and -0 by +0.
    """
    if cls_attn.dim() == 2:
        scores = cls_attn.float()
    else:
        scores = cls_attn[:, 0].float()
        for head in range(1, cls_attn.shape[1]):
            scores = scores + cls_attn[:, head].float()
    return torch.where(scores.isnan(), float("-inf"), scores + 0.0)  # -0 becomes +0


def quantize(feats: Tensor) -> Tensor:
    """12-bit integers of each token, (..., N, C) -> (..., N, C) float64 holding integers.

    A token with a non-finite element, or with max |x| < 1e-30, becomes all zeros.
    """
    x = feats.float()
    peak = x.abs().amax(dim=-1, keepdim=True)  # NaN and Inf propagate into the peak
    usable = torch.isfinite(peak) & (peak >= _TINY)
    scale = torch.full_like(peak, _QMAX) / torch.where(usable, peak, 1.0)
    q = torch.round(x * scale)  # round half to even
    return torch.where(usable, q, 0.0).double()


def gram(q: Tensor) -> Tensor:
    """Exact integer inner products q_i . q_j as float64, (..., N, C) -> (..., N, N).

    Every partial sum is an integer below 2**53, so float64 holds it exactly in any order.
    """
    return q @ q.transpose(-1, -2) + 0.0  # an integer has no -0


def inverse_norms(g: Tensor) -> Tensor:
    """float32(1 / sqrt(float64(G_ii))), 0 where G_ii = 0; (..., N, N) -> (..., N)."""
    squared = g.diagonal(dim1=-2, dim2=-1)
    inv = (1.0 / torch.sqrt(torch.where(squared > 0, squared, 1.0))).float()
    return torch.where(squared > 0, inv, 0.0)


def _similarities(feats: Tensor) -> tuple[Tensor, Tensor]:
    """s_ij = fl32(fl32(G_ij) * inv_j) and inv_i, the two factors of the cosine."""
    g = gram(quantize(feats))
    inv = inverse_norms(g)
    return g.float() * inv.unsqueeze(-2), inv


def _dedup_list(s: Tensor, inv: Tensor, residual: Tensor, k: int, step: int) -> Tensor:
    """The loop, for one image.

    Args:
        s: (R, R) similarities between residual tokens, inv: (R,) inverse norms.
        residual: (R,) rows of `s` in ranking order.

    Returns:
        (min(k, R),) the remaining entries of `residual`, in the list order of the last round.
    """
    while len(residual) > k:
        a, b = residual[0::2], residual[1::2]
        redundancy = s[a][:, b].amax(dim=1) * inv[a]
        order = torch.sort(redundancy, descending=True, stable=True).indices
        r = min(step, len(residual) - k, len(a))
        residual = torch.cat([a[order[r:]], b])
    return residual


# ------------------------------------------------------------------------------- the methods
# Each takes one image, feats (N, C) and scores (N,) float32, and k < N; it returns the (k,) indices
# of the retained tokens in any order.
def _ranking(keys: Tensor) -> Tensor:
    """Highest key first, equal ones by index."""
    return torch.sort(keys, descending=True, stable=True).indices


def _vispruner(
    feats: Tensor, scores: Tensor, k: int, important_ratio: float, step: float
) -> Tensor:
    k_important = int(k * important_ratio)
    ranking = _ranking(scores)
    important, residual = ranking[:k_important], ranking[k_important:]
    if k == k_important:
        return important
    s, inv = _similarities(feats[residual])
    rows = torch.arange(len(residual), device=scores.device)
    diverse = residual[_dedup_list(s, inv, rows, k - k_important, int(step))]
    return torch.cat([important, diverse])


def _topk(feats: Tensor, scores: Tensor, k: int) -> Tensor:
    return _ranking(scores)[:k]


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer on int64 that hold 32 bits."""
    low = 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x85EBCA6B & low
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & low
    return x ^ (x >> 16)


def _random(feats: Tensor, scores: Tensor, k: int, seed: float) -> Tensor:
    low = 0xFFFFFFFF
    bits = scores.view(torch.int32).long() & low
    keys = torch.where(bits > 0x7FFFFFFF, bits ^ low, bits | 0x80000000)  # in the order of scores
    tokens = torch.arange(len(scores), device=scores.device)
    mixed = _mix((int(seed) + tokens * 0x9E3779B9) & low)
    return _ranking(_mix(mixed ^ keys))[:k]


def _first_highest(values: Tensor, taken: Tensor) -> Tensor:
    """The index of the highest value that is not taken, the lowest of equal ones."""
    left = torch.where(taken, float("-inf"), values)
    return ((left == left.max()) & ~taken).nonzero()[0, 0]


def _maxmin(feats: Tensor, scores: Tensor, k: int) -> Tensor:
    """Farthest-point selection on the distance 1 - cosine. It is not computed: the smallest cosine
    is the largest distance."""
    s, inv = _similarities(feats)
    cosines = s * inv.unsqueeze(1)
    taken = torch.zeros(len(feats), dtype=torch.bool, device=feats.device)
    picks: list[Tensor] = []
    # The first pick is the token whose nearest other token is farthest.
    itself = torch.eye(len(feats), dtype=torch.bool, device=feats.device)
    nearest = cosines.masked_fill(itself, float("-inf")).amax(dim=1)
    for _ in range(k):
        pick = _first_highest(-nearest, taken)
        nearest = torch.maximum(nearest, cosines[pick]) if picks else cosines[pick]
        taken[pick] = True
        picks.append(pick)
    return torch.stack(picks)


def importance(scores: Tensor) -> Tensor:
    """Scores (..., N) float32 divided by the highest one, in [0, 1]; NaN and those below 0 count as
    0 (docs/numerics.md, "mmr")."""
    positive = scores.nan_to_num(0.0).clamp_min(0.0)
    highest = positive.amax(-1, keepdim=True)
    return torch.where(highest > 0, positive / highest, 0.0)


def _power(x: Tensor, alpha: float) -> Tensor:
    """x ** alpha for multiples of 1/4, by multiplications and square roots in a fixed order."""
    quarters = int(4 * alpha)
    result = torch.ones_like(x)
    for _ in range(quarters // 4):
        result = result * x
    root = x.sqrt()
    if quarters & 2:
        result = result * root
    if quarters & 1:
        result = result * root.sqrt()
    return result


def _coverage(feats: Tensor) -> Tensor:
    """(N, C) -> (N, N) int64, symmetric: cosines with 16 binary digits, 0 where negative."""
    g = gram(quantize(feats))
    inv = inverse_norms(g)
    # The inverse norm of the later token of a pair is multiplied first.
    cosines = (g.float() * inv.unsqueeze(0) * inv.unsqueeze(1)).triu()
    cosines = cosines + cosines.triu(1).T
    return torch.round(cosines.clamp_min(0.0) * 65536.0).long()


def _scope(feats: Tensor, scores: Tensor, k: int, scope_alpha: float) -> Tensor:
    """Greedy maximum of the coverage gain times the importance."""
    covers = _coverage(feats)
    weights = _power(importance(scores), scope_alpha)
    taken = torch.zeros(len(feats), dtype=torch.bool, device=feats.device)
    covered = torch.zeros(len(feats), dtype=torch.int64, device=feats.device)
    picks = []
    for _ in range(k):
        gains = (covers - covered).clamp_min(0).sum(dim=1)
        pick = _first_highest(gains.float() * weights, taken)
        covered = torch.maximum(covered, covers[pick])
        taken[pick] = True
        picks.append(pick)
    return torch.stack(picks)


def _mmr(feats: Tensor, scores: Tensor, k: int, mmr_lambda: float) -> Tensor:
    """Greedy maximum of importance - lambda * the largest cosine to a retained token."""
    s, inv = _similarities(feats)
    cosines = s * inv.unsqueeze(1)
    relevance = importance(scores)
    weight = torch.tensor(mmr_lambda, dtype=torch.float32, device=feats.device)
    taken = torch.zeros(len(feats), dtype=torch.bool, device=feats.device)
    picks: list[Tensor] = []
    values = relevance  # as long as nothing is retained
    largest = torch.full_like(relevance, float("-inf"))
    for _ in range(k):
        pick = _first_highest(values, taken)
        largest = torch.maximum(largest, cosines[pick])
        values = relevance - weight * largest
        taken[pick] = True
        picks.append(pick)
    return torch.stack(picks)


_METHODS: dict[str, Callable[..., Tensor]] = {
    "vispruner": _vispruner,
    "topk": _topk,
    "random": _random,
    "maxmin": _maxmin,
    "scope": _scope,
    "mmr": _mmr,
}


def _select(
    feats: Tensor, scores: Tensor, k: int, method: str, values: Mapping[str, float]
) -> Tensor:
    """Retained token indices of one image, ascending: feats (N, C), scores (N,) -> (min(k, N),)."""
    if k >= len(scores):
        return torch.arange(len(scores), device=scores.device)
    return _METHODS[method](feats, scores, k, **values).sort().values


def gather_tokens(feats: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` (B, k) of feats (B, N, C): (B, k, C). Differentiable in feats."""
    return feats.gather(1, indices.unsqueeze(-1).expand(-1, -1, feats.shape[-1]))


# ----------------------------------------------------------------------------- the public API
def topk(cls_attn: Tensor, k: int) -> TopkResult:
    """See :func:`vispruner_cuda.topk`."""
    (k,) = _checks.topk(cls_attn, k)
    scores = ranking_scores(cls_attn)
    values, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
    return TopkResult(values[:, :k].contiguous(), indices[:, :k].contiguous())


def pairwise_cosine(feats: Tensor) -> Tensor:
    """See :func:`vispruner_cuda.pairwise_cosine`."""
    _checks.pairwise_cosine(feats)
    s, inv = _similarities(feats)
    return s * inv.unsqueeze(-1)


def dedup(feats: Tensor, k: int, *, step: int = 8) -> Tensor:
    """See :func:`vispruner_cuda.dedup`."""
    k, step = _checks.dedup(feats, k, step)
    batch, n = feats.shape[:2]
    rows = torch.arange(n, device=feats.device)
    kept = rows.new_empty((batch, min(k, n)))
    for image in range(batch):
        s, inv = _similarities(feats[image])
        kept[image] = _dedup_list(s, inv, rows, k, step).sort().values
    return kept


def prune(
    feats: Tensor,
    cls_attn: Tensor,
    k: int,
    *,
    method: str = methods.DEFAULT,
    **parameters: float | None,
) -> PruneResult:
    """See :func:`vispruner_cuda.prune`."""
    values = methods.resolve(method, **parameters)
    (k,) = _checks.prune(feats, cls_attn, k)
    scores = ranking_scores(cls_attn)
    batch, n = scores.shape
    indices = torch.empty((batch, min(k, n)), dtype=torch.int64, device=feats.device)
    for image in range(batch):
        indices[image] = _select(feats[image], scores[image], k, method, values)
    return PruneResult(gather_tokens(feats, indices), indices)


def prune_varlen(
    feats: Tensor,
    cls_attn: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    k: int | Sequence[int] | Tensor,
    *,
    method: str = methods.DEFAULT,
    **parameters: float | None,
) -> PruneVarlenResult:
    """See :func:`vispruner_cuda.prune_varlen`."""
    values = methods.resolve(method, **parameters)
    bounds, ks = _checks.prune_varlen(feats, cls_attn, cu_seqlens, k)
    attn = cls_attn.unsqueeze(0)
    kept, kept_bounds = [], [0]
    for start, end, k_image in zip(bounds[:-1], bounds[1:], ks, strict=True):
        scores = ranking_scores(attn[..., start:end])[0]
        local = _select(feats[start:end], scores, k_image, method, values)
        kept.append(local + start)
        kept_bounds.append(kept_bounds[-1] + len(local))
    indices = torch.cat(kept) if kept else torch.empty(0, dtype=torch.int64, device=feats.device)
    return PruneVarlenResult(feats[indices], indices, tuple(kept_bounds))


def cls_attention(q_cls: Tensor, k: Tensor, scale: float) -> Tensor:
    """See :func:`vispruner_cuda.cls_attention`."""
    (scale,) = _checks.cls_attention(q_cls, k, scale)
    logits = torch.einsum("bhd,bhtd->bht", q_cls.float(), k.float()) * scale
    return logits.softmax(dim=-1)[..., 1:].mean(dim=1)


def received_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """See :func:`vispruner_cuda.received_attention`. Holds H x N x N logits of one image."""
    scale, bounds = _checks.received_attention(q, k, scale, cu_seqlens, lse)
    parts = []
    for start, end in itertools.pairwise(bounds):
        q_image, k_image = q[start:end].float(), k[start:end].float()
        logits = torch.einsum("qhd,khd->hqk", q_image, k_image) * scale
        if lse is None:
            weights = logits.softmax(dim=-1)
        else:
            weights = (logits - lse[:, start:end].unsqueeze(-1)).exp()
        parts.append(weights.mean(dim=(0, 1)))
    return torch.cat(parts) if parts else q.new_empty(0, dtype=torch.float32)
