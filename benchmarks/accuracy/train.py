"""Trains the model of a recipe and a seed stage by stage, and resumes interrupted runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import training
from .language import LanguageTask, SubsetTask
from .model import build
from .recipe import Recipe
from .tower import TowerTask


def train(recipe: Recipe, seed: int, directory: Path) -> None:
    """Writes tower.pt, language.pt, subset.pt and log.jsonl to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    model = build(recipe, seed)
    training.run(TowerTask(model.model.vision_tower, recipe), recipe, seed, directory)
    training.run(LanguageTask(model, recipe), recipe, seed, directory)
    # Stage 3 continues from stage 2: `model` has its weights, loaded or just trained.
    training.run(SubsetTask(model, recipe), recipe, seed, directory)


def load_model(recipe: Recipe, directory: Path, stage: str) -> Any:
    """The model after the stage "language" or "subset".

    Raises:
        training.CheckpointError: the stage has not started, is not finished, or is of another
            recipe.
    """
    found = training.load(directory, stage)
    if not found["finished"]:
        raise training.CheckpointError(
            f"{training.checkpoint(directory, stage)} stopped at step {found['step']}: train on "
            "(python -m accuracy train)"
        )
    training.check_recipe(found, recipe, training.checkpoint(directory, stage))
    model = build(recipe, seed=0)
    model.load_state_dict(found["module"])
    return model.to(training.device()).eval()
