"""The training loop of all stages: AdamW with a cosine schedule, checkpoints, log, progress bar."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .data import Batch, batches
from .recipe import Recipe, settings

SAVE_SECONDS = 60
EVALUATIONS = 16  # per stage, if it is long enough
_SHORTEST_INTERVAL = 50
_FINAL_RATE = 0.02  # of the highest learning rate


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """bfloat16 where it is safe; weights stay in float32."""
    return torch.autocast(device().type, torch.bfloat16)


class Task(ABC):
    """A training stage.

    Attributes:
        name: of the stage.
        module: content of the checkpoint; its parameters that require grad are trained.
    """

    name: str
    module: nn.Module

    @abstractmethod
    def losses(self, batch: Batch, noise: torch.Generator) -> dict[str, Tensor]:
        """Terms of the loss; `noise` is the only source of randomness."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Validation figures for the log, from scenes that are not used in training."""


def _optimizer(module: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def _rate(step: int, steps: int, warmup: int) -> float:
    """Share of the highest learning rate."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1, (step + 1) / warmup) * (_FINAL_RATE + (1 - _FINAL_RATE) * cosine)


def checkpoint(directory: Path, stage: str) -> Path:
    return directory / f"{stage}.pt"


class CheckpointError(ValueError):
    """A checkpoint that is missing, unfinished, or of a different run."""


def load(directory: Path, stage: str) -> dict[str, Any]:
    """The checkpoint of a stage; its entry `finished` is True at the end of the stage.

    Raises:
        CheckpointError: there is none.
    """
    path = checkpoint(directory, stage)
    if not path.exists():
        raise CheckpointError(
            f"there is no {path}: train first (python -m accuracy train), or name the directory "
            "of the training runs with --runs"
        )
    # To the CPU: an optimizer's step counts stay where they are, and on a GPU each would be a wait.
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def check_recipe(found: dict[str, Any], recipe: Recipe, path: Path) -> None:
    """Refuses a checkpoint of a different recipe, even if its file has the same name.

    A checkpoint of an earlier version does not name its recipe, and passes.
    """
    own, other = settings(recipe), found.get("recipe", settings(recipe))
    for name in sorted(own.keys() | other.keys()):
        here, there = own.get(name, "missing"), other.get(name, "missing")
        if here != there:
            raise CheckpointError(
                f"{path} is of a different recipe: {name} is {there} there and {here} in "
                "--recipe: name another directory with --runs"
            )


def _check_run(found: dict[str, Any], recipe: Recipe, seed: int, steps: int, path: Path) -> None:
    """Refuses to continue a different run, whose weights would get this one's name."""
    if "recipe" not in found or "seed" not in found:
        raise CheckpointError(
            f"{path} does not name its recipe and seed, because an earlier version wrote it: "
            "train in another directory with --runs"
        )
    check_recipe(found, recipe, path)
    if found["seed"] != seed:
        raise CheckpointError(
            f"{path} is of seed {found['seed']}, not of --seed {seed}: name another directory "
            "with --runs"
        )
    if found["step"] > steps:
        raise CheckpointError(
            f"{path} is at step {found['step']}, and --recipe has only {steps}: name another "
            "directory with --runs"
        )


def _save(path: Path, content: dict[str, Any]) -> None:
    """Writes atomically, because the run may be interrupted at any time."""
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


class _Log:
    """Writes means of the added terms to DIRECTORY/log.jsonl."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        self._count = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        for name, term in terms.items():
            # not item(), which would wait for the GPU in every step
            self._sums[name] = self._sums[name].to(term.device) + term.detach().double()
        self._count += 1

    def write(self, **facts: Any) -> dict[str, Any]:
        means = {name: round(total.item() / self._count, 4) for name, total in self._sums.items()}
        line = {**facts, "loss": means}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._sums.clear()
        self._count = 0
        return line


def run(task: Task, recipe: Recipe, seed: int, directory: Path) -> None:
    """Trains a stage, resuming from its checkpoint in `directory` if there is one.

    Raises:
        CheckpointError: the checkpoint is of a different recipe or seed.
    """
    stage = recipe.stages[task.name]
    path = checkpoint(directory, task.name)
    task.module.to(device())
    optimizer = _optimizer(task.module, stage.weight_decay)
    start, seconds = 0, 0.0
    if path.exists():
        found = load(directory, task.name)
        _check_run(found, recipe, seed, stage.steps, path)
        task.module.load_state_dict(found["module"])
        optimizer.load_state_dict(found["optimizer"])
        start, seconds = found["step"], found["seconds"]
    if start == stage.steps:
        return

    log = _Log(directory / "log.jsonl")
    interval = max(_SHORTEST_INTERVAL, stage.steps // EVALUATIONS)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    begun = saved = time.monotonic()
    with Progress(*columns, TimeRemainingColumn()) as bar:
        shown = bar.add_task(task.name, total=stage.steps, completed=start)
        for step, batch in enumerate(batches(recipe, task.name, seed, start), start):
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * _rate(step, stage.steps, stage.warmup)
            noise = torch.Generator().manual_seed(1_000_000_007 * seed + step)
            terms = task.losses(batch.to(device()), noise)
            optimizer.zero_grad()
            sum(terms.values(), torch.zeros((), device=device())).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            log.add(terms)
            bar.advance(shown)

            done, now = step + 1, time.monotonic()
            evaluates = done % interval == 0 or done == stage.steps
            if evaluates:
                task.module.eval()
                with torch.no_grad():
                    figures = task.evaluate()
                task.module.train()
                elapsed = round(seconds + now - begun)
                line = log.write(
                    stage=task.name, seed=seed, step=done, seconds=elapsed, figures=figures
                )
                bar.console.print(json.dumps(line), soft_wrap=True, highlight=False)
            if evaluates or now - saved > SAVE_SECONDS:
                saved = now
                _save(
                    path,
                    {
                        "recipe": settings(recipe),
                        "seed": seed,
                        "module": task.module.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": done,
                        "seconds": seconds + now - begun,
                        "finished": done == stage.steps,
                    },
                )
