"""Trains the model of a recipe and a seed, stage by stage, from wherever an earlier run stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import training
from .language import LanguageTask, SubsetTask
from .model import build
from .recipe import Recipe
from .tower import TowerTask


def train(recipe: Recipe, seed: int, directory: Path) -> None:
    """Leaves tower.pt, language.pt, subset.pt and log.jsonl in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    model = build(recipe, seed)
    training.run(TowerTask(model.model.vision_tower, recipe), recipe, seed, directory)
    training.run(LanguageTask(model, recipe), recipe, seed, directory)
    # Stage 3 begins where stage 2 ended: `model` has its weights, loaded or just trained.
    training.run(SubsetTask(model, recipe), recipe, seed, directory)


def load_model(recipe: Recipe, directory: Path, stage: str) -> Any:
    """The model after "language" or "subset".

    Raises:
        FileNotFoundError, ValueError: that stage has not begun, or not ended.
    """
    found = training.load(directory, stage)
    if not found["finished"]:
        raise ValueError(f"{directory}: stage {stage!r} has stopped at step {found['step']}")
    model = build(recipe, seed=0)
    model.load_state_dict(found["module"])
    return model.to(training.device()).eval()
