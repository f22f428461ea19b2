"""Stage 1: the vision tower learns to recognize and locate objects, and [CLS] to attend to them.

Two multi-label losses predict the content of the image from [CLS], in the last and in the
penultimate layer: the penultimate layer provides the features, so its [CLS] attention must be
meaningful. A dense loss predicts the object of each patch in that layer, so that its features are
useful.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vispruner.embedded import scenes

from .data import Batch, label_patches, normalize, stack_pixels
from .recipe import Recipe
from .training import Task, autocast, device

_BACKGROUND_WEIGHT = 0.1  # most patches are background
_PRESENT_WEIGHT = 3.0  # an image has few of the colour-shape pairs
_VALIDATION = 256


class Heads(nn.Module):
    """Prediction heads, used only in training."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        width = recipe.vision.hidden_size
        colors, shapes = len(scenes.COLORS), len(recipe.style.shapes)
        self.sizes = (1 + colors, 1 + shapes, 5)
        self.norm_cls, self.norm_patches = nn.LayerNorm(width), nn.LayerNorm(width)
        self.early = nn.Linear(width, colors * shapes + colors + shapes)
        self.late = nn.Linear(width, colors * shapes + colors + shapes)
        self.dense = nn.Linear(width, sum(self.sizes))


class TowerTask(Task):
    """Trains a `CLIPVisionModel`."""

    name = "tower"

    def __init__(self, tower: nn.Module, recipe: Recipe) -> None:
        self.tower, self.heads = tower, Heads(recipe)
        self.module = nn.ModuleDict({"tower": tower, "heads": self.heads})
        self._recipe = recipe

    def _forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Early and late [CLS] logits, and colour, shape and box of each patch."""
        with autocast():
            output = self.tower(normalize(pixels), output_hidden_states=True)
        early = output.hidden_states[-2].float()
        dense = self.heads.dense(self.heads.norm_patches(early[:, 1:]))
        return (
            self.heads.early(self.heads.norm_cls(early[:, 0])),
            self.heads.late(output.pooler_output.float()),
            dense.split(self.heads.sizes, -1),
        )

    def losses(self, batch: Batch, noise: torch.Generator) -> dict[str, Tensor]:
        want = batch.patches
        early, late, (color, shape, box) = self._forward(batch.pixels)
        foreground = (want.owner > 0).float()
        weight = foreground + _BACKGROUND_WEIGHT

        def classes(logits: Tensor, labels: Tensor) -> Tensor:
            each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            return (each * weight.flatten()).sum() / weight.sum()

        def present(logits: Tensor) -> Tensor:
            boost = torch.tensor(_PRESENT_WEIGHT, device=logits.device)
            return F.binary_cross_entropy_with_logits(logits, want.present, pos_weight=boost)

        distance = F.smooth_l1_loss(box, want.box, reduction="none").mean(-1)
        return {
            "cls": 3 * (present(early) + present(late)),
            "patches": classes(color, want.color) + classes(shape, want.shape),
            "boxes": (distance * foreground).sum() / foreground.sum(),
        }

    def evaluate(self) -> dict[str, float]:
        """Accuracy of object and background patches, and F1 of the pairs predicted from [CLS]."""
        style = self._recipe.style
        drawn = [scenes.draw(i, style, split="validation") for i in range(_VALIDATION)]
        want = label_patches(drawn, self._recipe)
        early, late, (color, shape, _) = self._forward(stack_pixels(drawn).to(device()))
        right = (color.argmax(-1).cpu() == want.color) & (shape.argmax(-1).cpu() == want.shape)
        foreground = want.owner > 0
        pairs = len(scenes.COLORS) * len(style.shapes)
        truth = want.present[:, :pairs] > 0

        def f1(logits: Tensor) -> float:
            named = logits[:, :pairs].cpu() > 0
            return float(2 * (named & truth).sum() / (named.sum() + truth.sum()))

        figures = {
            "objects": right[foreground].float().mean().item(),
            "background": right[~foreground].float().mean().item(),
            "f1_early": f1(early),
            "f1_late": f1(late),
        }
        return {name: round(value, 4) for name, value in figures.items()}
