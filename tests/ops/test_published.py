"""The other methods choose as in their papers: the formulas in float64, where rounding has no
effect.

Features are small integers, which quantize without loss if the largest magnitude of each token is
2047. A problem counts only if the best value of every pick is clearly above the next one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vispruner_cuda

MARGIN = 1e-3  # of float32 values and of coverage in steps of 2^-16, summed over 60 tokens
TOKENS, CHANNELS, K = 60, 12, 20


class UnclearError(Exception):
    """Two tokens have equal values."""


def pick(values: Tensor, taken: list[int]) -> int:
    left = values.clone()
    left[taken] = -torch.inf
    best, second = left.topk(2).values
    if best - second < MARGIN:
        raise UnclearError
    return int(left.argmax())


def cosines(feats: Tensor) -> Tensor:
    unit = feats.double() / feats.double().norm(dim=1, keepdim=True)
    return unit @ unit.T


def divprune(feats: Tensor, scores: Tensor) -> list[int]:
    """DivPrune, arXiv 2503.02175: max-min distances, beginning with the token farthest from its
    nearest."""
    distances = 1 - cosines(feats)
    off_diagonal = distances + torch.diag(torch.full((TOKENS,), torch.inf))
    picks = [pick(off_diagonal.min(dim=1).values, [])]
    while len(picks) < K:
        picks.append(pick(distances[picks].min(dim=0).values, picks))
    return picks


def scope(feats: Tensor, scores: Tensor, alpha: float = 1.0) -> list[int]:
    """SCOPE, arXiv 2510.24214: saliency^alpha times the increase of sum_u max_v sim(u, v)."""
    similarity = cosines(feats)
    covered = torch.zeros(TOKENS, dtype=torch.float64)
    weights = (scores.double() / scores.max()) ** alpha
    picks: list[int] = []
    while len(picks) < K:
        gains = (similarity - covered).clamp_min(0).sum(dim=1)
        picks.append(pick(gains * weights, picks))
        covered = torch.maximum(covered, similarity[picks[-1]])
    return picks


def mmr(feats: Tensor, scores: Tensor, weight: float = 1.0) -> list[int]:
    """Carbonell and Goldstein, SIGIR 1998; the importance is the similarity to the query."""
    similarity = cosines(feats)
    importance = scores.double() / scores.max()
    picks = [pick(importance, [])]
    while len(picks) < K:
        picks.append(pick(importance - weight * similarity[picks].max(dim=0).values, picks))
    return picks


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """(N, C) features and (N,) scores in (0, 1)."""
    g = torch.Generator().manual_seed(seed)
    feats = torch.randint(-2047, 2048, (TOKENS, CHANNELS), generator=g).float()
    feats[:, 0] = 2047  # cosines of both signs, more of them positive
    return feats, torch.rand(TOKENS, generator=g) + 0.05


@pytest.mark.parametrize(
    ("method", "options", "published"),
    [
        ("maxmin", {}, divprune),
        ("scope", {}, scope),
        ("scope", {"scope_alpha": 0.5}, lambda f, s: scope(f, s, 0.5)),
        ("scope", {"scope_alpha": 2.75}, lambda f, s: scope(f, s, 2.75)),
        ("scope", {"scope_alpha": 0.0}, lambda f, s: scope(f, s, 0.0)),
        ("mmr", {}, mmr),
        ("mmr", {"mmr_lambda": 0.3}, lambda f, s: mmr(f, s, 0.3)),
    ],
)
def test_published(
    method: str, options: dict[str, float], published: Callable[[Tensor, Tensor], list[int]]
) -> None:
    compared = 0
    for seed in range(400):
        feats, scores = problem(seed)
        try:
            want = published(feats, scores)
        except UnclearError:
            continue
        got = vispruner_cuda.prune(feats[None], scores[None], K, method=method, **options)
        assert got.indices[0].tolist() == sorted(want), seed
        compared += 1
        if compared == 20:
            return
    pytest.fail(f"only {compared} clear problems")


def test_topk_is_the_important_half() -> None:
    feats, scores = problem(0)
    got = vispruner_cuda.prune(feats[None], scores[None], K, method="topk")
    want = vispruner_cuda.prune(feats[None], scores[None], K, important_ratio=1.0)
    assert torch.equal(got.indices, want.indices)


def test_random_is_uniform_and_differs_between_images_and_seeds() -> None:
    images = 2000
    g = torch.Generator().manual_seed(0)
    feats, scores = torch.zeros(images, TOKENS, 1), torch.rand(images, TOKENS, generator=g)
    kept = {
        seed: vispruner_cuda.prune(feats, scores, K, method="random", seed=seed).indices
        for seed in (0, 1)
    }
    for indices in kept.values():
        counts = indices.flatten().bincount(minlength=TOKENS)
        expected = images * K / TOKENS
        spread = (expected * (1 - K / TOKENS)) ** 0.5
        assert (counts - expected).abs().max() < 4 * spread
        assert len({tuple(row) for row in indices.tolist()}) == images
    same = sum(
        len(set(a) & set(b)) for a, b in zip(*(k.tolist() for k in kept.values()), strict=True)
    )
    assert abs(same / (images * K) - K / TOKENS) < 0.02
    # The random order depends on the scores, but not on a token's rank.
    ranks = scores.argsort(dim=1).argsort(dim=1).float()
    assert abs(ranks.gather(1, kept[0]).mean() - (TOKENS - 1) / 2) < 0.5
