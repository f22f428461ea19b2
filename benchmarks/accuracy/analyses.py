"""Analyses of the two kinds of attention, and ablations of VisPruner's two settings.

These are the paper's analyses on the embedded model. "Text attention" is the attention of the last
prompt token to the visual tokens in a layer of the language model, which FastV uses; [CLS]
attention is that in the vision tower, which VisPruner uses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import provenance
import torch
from rich.progress import track
from torch import Tensor

from vispruner.embedded.scenes import Scene

from . import fastv
from .evaluation import Subject, describe, flat, in_batches, shipped, test_scenes
from .language import right_answers
from .recipe import Recipe
from .rules import Rule, highest, vispruner
from .statistics import clustered_mean
from .train import load_model

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS = (1, 2, 4, 8, 16, 32)
_ABLATION_BUDGETS = slice(1, 5)  # of the recipe's budgets; the largest loses nothing
_SHIFT_BUDGET = 2
_CURVE_POINTS = 20


class _Means:
    """Running means of arrays, added in batches."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, name: str, values: Tensor) -> None:
        """values: (B, ...)."""
        total = values.double().sum(0)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] += len(values)

    def result(self) -> dict[str, Any]:
        return {
            name: np.round((total / self._counts[name]).tolist(), 5).tolist()
            for name, total in self._sums.items()
        }


def _rows(values: Tensor, grid: int) -> Tensor:
    """(B, N) to shares of the rows of the image, (B, rows)."""
    rows = values.unflatten(-1, (grid, grid)).sum(-1)
    return rows / rows.sum(-1, keepdim=True)


def _mask(tokens: Tensor, patches: int) -> Tensor:
    return torch.zeros(len(tokens), patches, device=tokens.device).scatter(1, tokens, 1.0)


def _cumulative(values: Tensor) -> Tensor:
    """Share of the attention on the most attended 1/20, 2/20, ... of the tokens."""
    ordered = values.sort(-1, descending=True).values.cumsum(-1)
    ordered = ordered / ordered[:, -1:]
    at = torch.linspace(0, values.shape[1], _CURVE_POINTS + 1)[1:].round().long() - 1
    return ordered[:, at]


def _entropy(values: Tensor) -> Tensor:
    """Entropy relative to that of uniform attention, (B,)."""
    shares = values / values.sum(-1, keepdim=True)
    nats = -torch.special.xlogy(shares, shares).sum(-1)
    return nats / np.log(values.shape[1])


@torch.no_grad()
def attention(subject: Subject, drawn: Sequence[Scene]) -> dict[str, Any]:
    """Shift by position, dispersion, and mass on objects, for both kinds of attention.

    The shift is measured twice: with the unchanged model, and with one position id for all visual
    tokens, so that the rotary embedding cannot favour those close to the question.
    """
    recipe, means, auroc = subject.recipe, _Means(), _Means()
    k = recipe.budgets[_SHIFT_BUDGET]
    patches = recipe.patches
    for first, some in track(list(in_batches(drawn)), description="attention"):
        cues = subject.cues(some, first)
        objects = (cues.owner > 0).float()
        packed = subject.single([replace(scene, asked=scene.asked[:1]) for scene in some])
        length = 1 + patches + packed.ids.shape[1]
        positions = torch.arange(length, device=cues.owner.device)
        level = positions.clone()
        level[1 : 1 + patches] = patches // 2
        means.add("rows/objects", _rows(objects + 1e-9, recipe.grid))
        kinds = {"cls": cues.scores}
        for decay, ids in (("decay", positions), ("no decay", level)):
            for number, layer in enumerate(fastv.layers(subject.model, cues.features, packed, ids)):
                kinds[f"text {number + 1}, {decay}"] = layer.attention.mean(1)
        for name, values in kinds.items():
            means.add(f"rows/{name}", _rows(values, recipe.grid))
            chosen = _mask(highest(values, k), patches)
            means.add(f"selected rows/{name}", _rows(chosen, recipe.grid))
            means.add(f"cumulative/{name}", _cumulative(values))
            means.add(f"entropy/{name}", _entropy(values))
            shares = values / values.sum(-1, keepdim=True)
            means.add(f"mass on objects/{name}", (shares * objects).sum(-1))
            auroc.add(name, _auroc(values, objects))
        means.add("area of objects", objects.mean(-1))
        selected = vispruner()(cues, k)
        means.add("selected rows/vispruner", _rows(_mask(selected, patches), recipe.grid))
    return {"k": k, "images": len(drawn), **means.result(), "auroc": auroc.result()}


def _auroc(values: Tensor, objects: Tensor) -> Tensor:
    """Probability that an object patch has more attention than a background patch, (B',)."""
    results = []
    for row, truth in zip(values, objects > 0, strict=True):
        if truth.any() and not truth.all():
            ranks = row.argsort().argsort().double() + 1
            own = int(truth.sum())
            above = ranks[truth].sum() - own * (own + 1) / 2
            results.append(above / (own * (len(row) - own)))
    return torch.stack(results)


@torch.no_grad()
def by_attention(subject: Subject, drawn: Sequence[Scene]) -> dict[str, Any]:
    """Accuracy with the top k tokens by each kind of attention, from the first layer on.

    Only the selection differs: text attention comes from a separate run with all tokens, whose cost
    is not counted.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    budgets = subject.recipe.budgets
    for first, some in track(list(in_batches(drawn)), description="by attention"):
        cues, packed = subject.cues(some, first), subject.single(some)
        rows = torch.tensor([i for i, scene in enumerate(some) for _ in scene.asked])
        features = cues.features[rows.to(cues.features.device)]
        kinds = {"cls": cues.scores[rows.to(cues.scores.device)]}
        for number, layer in enumerate(fastv.layers(subject.model, features, packed)):
            kinds[f"text {number + 1}"] = layer.attention.mean(1)
        for name, values in kinds.items():
            for k in budgets:
                answers = subject.answers(features, highest(values, k), packed)
                right[f"{name}@{k}"] += answers.flatten().tolist()
    return _summary(right, drawn)


@torch.no_grad()
def ablations(subject: Subject, drawn: Sequence[Scene]) -> dict[str, Any]:
    """Accuracy for each important ratio (at step 8) and each step (at ratio 0.5)."""
    rules: dict[str, Rule] = {f"ratio {ratio}": vispruner(ratio) for ratio in RATIOS}
    rules |= {f"step {step}": vispruner(step=step) for step in STEPS}
    right: dict[str, list[bool]] = defaultdict(list)
    for first, some in track(list(in_batches(drawn)), description="ablations"):
        cues, packed = subject.cues(some, first), subject.packed(some)
        for name, rule in rules.items():
            for k in subject.recipe.budgets[_ABLATION_BUDGETS]:
                answers = subject.answers(cues.features, rule(cues, k), packed)
                right[f"{name}@{k}"] += flat(answers, some)
        right["full"] += flat(right_answers(subject.model, cues.features, packed), some)
    return _summary(right, drawn)


def _summary(right: dict[str, list[bool]], drawn: Sequence[Scene]) -> dict[str, Any]:
    clusters = np.array([asked.image for asked in describe(drawn)])
    means = {
        name: clustered_mean(np.array(answers, float), clusters) for name, answers in right.items()
    }
    return {
        "questions": len(clusters),
        "accuracy": {name: [round(m.value, 5), round(m.error, 5)] for name, m in means.items()},
    }


def analyze(recipe: Recipe, name: str, seed: int, directory: Path, count: int) -> Path:
    """Writes results/accuracy_analyses_NAME_seedS.json, for the final checkpoint."""
    subject = Subject(shipped(load_model(recipe, directory, "subset")), recipe)
    seen = len(recipe.style.backgrounds)
    drawn = test_scenes(recipe, count)[: count * seen]
    return provenance.write(
        f"accuracy_analyses_{name}_seed{seed}",
        {
            "recipe": name,
            "seed": seed,
            "attention": attention(subject, drawn),
            "by_attention": by_attention(subject, drawn[: len(drawn) // 2]),
            "ablations": ablations(subject, drawn),
        },
    )
