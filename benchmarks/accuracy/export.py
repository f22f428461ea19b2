"""Copies a trained model into the package, with its processor, model card and example."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from vispruner import embedded
from vispruner.embedded import scenes

from . import regression
from .model import processor
from .recipe import Recipe
from .train import load_model

CARD = Path(__file__).with_name("model_card.md")
LIMIT = 8_000_000  # bytes of the model in the package
EXAMPLE_SEED = 42
EXAMPLE_SPLIT = "example"


def export(recipe: Recipe, seed: int, directory: Path, target: Path | None = None) -> Path:
    """Writes the model after the subset stage to `target`, by default into the package.

    For a model in the package, also writes its example and its record of the regression test.

    Raises:
        ValueError: the model is too large for the package.
    """
    packaged = Path(embedded.path())
    target = target or packaged
    load_model(recipe, directory, "subset").half().save_pretrained(target)
    with_published_names(target / "model.safetensors")
    processor(recipe).save_pretrained(target)
    card = CARD.read_text(encoding="utf-8")
    (target / "README.md").write_text(card.replace("{seed}", str(seed)), encoding="utf-8")
    size = sum(file.stat().st_size for file in target.iterdir())
    if size > LIMIT:
        raise ValueError(f"{target} has {size} bytes, more than {LIMIT}")
    for file in target.iterdir():
        file.chmod(0o644)  # safetensors writes files that only the owner can read
    if target == packaged:
        write_example(recipe, packaged.parent)
        regression.record(str(packaged))
    return target


def with_published_names(weights: Path) -> None:
    """Renames the tower's weights as in published LLaVA checkpoints.

    transformers reads these names and its own, vLLM only these.
    """
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    prefix, published = "vision_tower.", "vision_tower.vision_model."
    renamed = {
        published + name.removeprefix(prefix)
        if name.startswith(prefix) and not name.startswith(published)
        else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, weights, metadata=metadata)


def write_example(recipe: Recipe, directory: Path) -> None:
    """example.png and example.json."""
    scene = scenes.draw(EXAMPLE_SEED, recipe.style, split=EXAMPLE_SPLIT, background="leaves")
    scene.image.save(directory / "example.png", optimize=True)
    text = json.dumps({"questions": scene.questions}, indent=1)
    (directory / "example.json").write_text(text + "\n")
