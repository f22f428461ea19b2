"""Interrupted training resumes with equal results; tests of its parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("yaml")

from accuracy import recipe, training
from accuracy.data import Batch, Training
from accuracy.language import LanguageTask, SubsetTask
from accuracy.model import build
from accuracy.tower import TowerTask
from accuracy.train import load_model, train

STEPS = 4


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> recipe.Recipe:
    """Four steps of two images per stage, saved after each step; no evaluation."""
    for task in (TowerTask, LanguageTask):
        monkeypatch.setattr(task, "evaluate", lambda self: {})
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    smoke = recipe.load("smoke")
    stages = {
        name: replace(stage, steps=STEPS, batch=2, warmup=2) for name, stage in smoke.stages.items()
    }
    return replace(smoke, stages=stages)


def weights(directory: Path, stage: str) -> dict[str, Any]:
    return dict(training.load(directory, stage)["module"])


def test_an_interrupted_run_ends_with_the_same_weights(
    small: recipe.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small, 0, tmp_path / "whole")

    original = training.batches

    def interrupted(some: recipe.Recipe, stage: str, seed: int, start: int) -> Iterator[Batch]:
        for step, batch in enumerate(original(some, stage, seed, start), start):
            if step == 2 and start < 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(training, "batches", interrupted)
    stops = 0
    while True:
        try:
            train(small, 0, tmp_path / "pieces")
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == len(recipe.STAGES)

    for stage in recipe.STAGES:
        whole, pieces = (weights(tmp_path / name, stage) for name in ("whole", "pieces"))
        assert whole.keys() == pieces.keys()
        assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    logged = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in logged] == list(recipe.STAGES)


def test_stages_build_on_each_other(small: recipe.Recipe, tmp_path: Path) -> None:
    """The language stages do not change the tower, and both models can be loaded."""
    train(small, 0, tmp_path)
    tower = weights(tmp_path, "tower")
    for stage in ("language", "subset"):
        model = load_model(small, tmp_path, stage)
        for name, value in model.model.vision_tower.state_dict().items():
            assert torch.equal(value, tower[f"tower.{name}"])
    assert not torch.equal(
        weights(tmp_path, "language")["lm_head.weight"],
        weights(tmp_path, "subset")["lm_head.weight"],
    )


def test_an_unfinished_stage_is_not_a_model(small: recipe.Recipe, tmp_path: Path) -> None:
    train(small, 0, tmp_path)
    path = training.checkpoint(tmp_path, "subset")
    torch.save({**training.load(tmp_path, "subset"), "finished": False, "step": 3}, path)
    with pytest.raises(ValueError, match="step 3"):
        load_model(small, tmp_path, "subset")


def test_a_run_of_another_recipe_or_seed_is_not_continued(
    small: recipe.Recipe, tmp_path: Path
) -> None:
    train(small, 0, tmp_path)
    path = training.checkpoint(tmp_path, "tower")
    before = path.read_bytes()

    tower = replace(small.stages["tower"], learning_rate=0.5)
    other = replace(small, stages={**small.stages, "tower": tower})
    with pytest.raises(training.CheckpointError, match=r"tower\.learning_rate is 0.0015 there"):
        train(other, 0, tmp_path)
    with pytest.raises(training.CheckpointError, match=r"learning_rate"):
        load_model(other, tmp_path, "subset")
    with pytest.raises(training.CheckpointError, match="is of seed 0, not of --seed 1"):
        train(small, 1, tmp_path)
    assert path.read_bytes() == before

    train(replace(small, workers=0, budgets=(8,)), 0, tmp_path)  # the same model

    found = training.load(tmp_path, "tower")
    torch.save({**found, "step": 5}, path)
    with pytest.raises(training.CheckpointError, match="at step 5, and --recipe has only 4"):
        train(small, 0, tmp_path)


def test_a_run_of_an_earlier_version_is_evaluated_but_not_continued(
    small: recipe.Recipe, tmp_path: Path
) -> None:
    """Its checkpoints do not name a recipe."""
    train(small, 0, tmp_path)
    for stage in recipe.STAGES:
        found = training.load(tmp_path, stage)
        old = {key: value for key, value in found.items() if key not in ("recipe", "seed")}
        torch.save(old, training.checkpoint(tmp_path, stage))
    load_model(small, tmp_path, "subset")
    with pytest.raises(training.CheckpointError, match="does not name its recipe and seed"):
        train(small, 0, tmp_path)


def test_seeds_and_stages_see_different_scenes(small: recipe.Recipe) -> None:
    first = Training(small, "tower", 0)
    assert torch.equal(first[3].pixels, first[3].pixels)
    for other in (first[2], Training(small, "tower", 1)[3], Training(small, "language", 0)[3]):
        assert not torch.equal(first[3].pixels, other.pixels)


def test_patches_are_labelled_by_their_object(small: recipe.Recipe) -> None:
    patches = Training(small, "tower", 0)[0].patches
    assert ((patches.owner > 0) == (patches.color > 0)).all()
    assert ((patches.owner > 0) == (patches.shape > 0)).all()
    assert patches.box[patches.owner > 0].abs().max() < 5  # scaled to be of order one


def test_subsets_are_random_and_prefer_objects_at_random(small: recipe.Recipe) -> None:
    task = SubsetTask(build(small, 0), small)
    batch = Training(small, "subset", 0)[0]
    patches = torch.arange(small.patches, dtype=torch.float32)
    features = patches[None, :, None].expand(2, -1, 1)
    shown = [
        task.show(features, batch, torch.Generator().manual_seed(seed))[0].squeeze(-1)
        for seed in range(200)
    ]
    counts = [len(kept[0]) for kept in shown]
    assert set(counts) == {*small.subset_tokens, small.patches}
    assert counts.count(small.patches) == pytest.approx(200 * (1 - small.subset_share), abs=25)
    shares = [
        (batch.patches.owner[0][kept[0].long()] > 0).float().mean().item()
        for kept in shown
        if len(kept[0]) == 8
    ]
    objects = (batch.patches.owner[0] > 0).float().mean().item()
    assert min(shares) < 2 * objects
    assert max(shares) > 0.6
