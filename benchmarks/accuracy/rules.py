"""The compared rules for selecting k of N tokens.

VisPruner and its halves are the operators of this project, with the same scores as in
`vispruner.apply`. The other rules are implemented here. None of them is used in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vispruner_cuda
from vispruner.taps import tower_tap

from .data import normalize


@dataclass(frozen=True)
class Cues:
    """The inputs of a rule.

    Attributes:
        features: (B, N, C) patch features that the model projects.
        scores: (B, N) attention of [CLS] in the feature layer.
        owner: (B, N) ground truth: 1 + index of the object of a patch, 0 for background.
        seed: for random rules; equal for equal images.
    """

    features: Tensor
    scores: Tensor
    owner: Tensor
    seed: int


Rule = Callable[[Cues, int], Tensor]  # (B, k) int64, ascending


def read_cues(model: Any, pixels: Tensor, owner: Tensor, seed: int) -> Cues:
    """Runs the tower in the model's precision; pixels uint8."""
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    # In earlier transformers the layers are one module deeper.
    attention = getattr(tower, "vision_model", tower).encoder.layers[layer].self_attn
    with torch.no_grad(), tower_tap(attention, has_cls=True) as tap:
        states = tower(normalize(pixels), output_hidden_states=True)
        scores = tap.scores()
    return Cues(states.hidden_states[layer][:, 1:], scores, owner, seed)


def vispruner(important_ratio: float = 0.5, step: int = 8) -> Rule:
    """The operator; ratio 1 retains only important tokens, 0 only diverse ones."""

    def rule(cues: Cues, k: int) -> Tensor:
        return vispruner_cuda.prune(
            cues.features, cues.scores, k, important_ratio=important_ratio, step=step
        ).indices

    return rule


def method(name: str, **parameters: Any) -> Rule:
    """A method of the operator, with its defaults for parameters that are not given."""

    def rule(cues: Cues, k: int) -> Tensor:
        pruned = vispruner_cuda.prune(cues.features, cues.scores, k, method=name, **parameters)
        return pruned.indices

    return rule


def highest(scores: Tensor, k: int) -> Tensor:
    """(B, k) tokens with the highest scores (B, N), ascending."""
    return scores.topk(k).indices.sort().values


def random(draw: int) -> Rule:
    """k random tokens; a smaller k retains a subset of a larger one."""

    def rule(cues: Cues, k: int) -> Tensor:
        noise = torch.Generator().manual_seed(1000 * cues.seed + draw)
        return highest(torch.rand(cues.scores.shape, generator=noise), k).to(cues.scores.device)

    return rule


def grid(cues: Cues, k: int) -> Tensor:
    """Rows and columns as evenly spaced as k allows, independent of the image."""
    side = math.isqrt(cues.scores.shape[1])
    rows = max(divisor for divisor in range(1, math.isqrt(k) + 1) if k % divisor == 0)

    def spread(count: int) -> Tensor:
        return ((torch.arange(count) + 0.5) * side / count).long()

    cells = spread(rows)[:, None] * side + spread(k // rows)
    return cells.flatten().expand(len(cues.scores), -1).to(cues.scores.device)


def oracle(cues: Cues, k: int) -> Tensor:
    """Uses the ground truth: one patch of each object in turn, then background."""
    noise = torch.Generator().manual_seed(1000 * cues.seed)
    chance = torch.rand(cues.owner.shape, generator=noise)
    order = torch.full_like(chance, math.inf)
    for thing in range(1, int(cues.owner.max()) + 1):
        mine = (cues.owner == thing).cpu()
        place = chance.masked_fill(~mine, math.inf).argsort().argsort()
        order = torch.where(mine, place + chance, order)
    order = torch.where(order.isinf(), cues.owner.shape[1] + chance, order)
    return highest(-order, k).to(cues.scores.device)


RANDOM_DRAWS = 5
RULES: dict[str, Rule] = {
    "vispruner": vispruner(),
    "important": vispruner(important_ratio=1.0),
    "diverse": vispruner(important_ratio=0.0),
    "grid": grid,
    "oracle": oracle,
    **{f"random/{draw}": random(draw) for draw in range(RANDOM_DRAWS)},
}

#: The values of `method=`, and other values of their parameters.
METHODS: dict[str, Rule] = {
    "vispruner": method("vispruner"),
    "diverse": vispruner(important_ratio=0.0),
    "topk": method("topk"),
    "maxmin": method("maxmin"),
    "scope": method("scope"),
    "scope, alpha 0.5": method("scope", scope_alpha=0.5),
    "scope, alpha 2": method("scope", scope_alpha=2.0),
    "mmr": method("mmr"),
    "mmr, lambda 0.25": method("mmr", mmr_lambda=0.25),
    "mmr, lambda 4": method("mmr", mmr_lambda=4.0),
    **{f"random/{seed}": method("random", seed=seed) for seed in range(RANDOM_DRAWS)},
}
