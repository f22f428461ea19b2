"""The settings of a training run, from recipes/NAME.yaml."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from vispruner.embedded.scenes import Style

DIRECTORY = Path(__file__).with_name("recipes")
#: Settings that do not change which model is trained.
_NOT_TRAINED = ("workers", "compile", "budgets")
STAGES = ("tower", "language", "subset")


@dataclass(frozen=True)
class Transformer:
    """Sizes of the vision tower or the language model; only a tower has a patch size."""

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    patch_size: int = 0


@dataclass(frozen=True)
class Stage:
    """Optimizer settings of one stage."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int
    weight_decay: float


@dataclass(frozen=True)
class Recipe:
    """A training run without its seed.

    Attributes:
        style: of the scenes.
        questions: number of questions packed after an image.
        workers: processes that draw scenes; 0 draws them in the main process.
        compile: whether to compile the language model for training (needs a C++ compiler).
        subset_tokens: numbers of tokens in the subset stage.
        subset_share: share of its steps that use fewer than all tokens.
        budgets: numbers of retained tokens in the experiment, largest first.
    """

    style: Style
    vision: Transformer
    language: Transformer
    stages: dict[str, Stage]
    questions: int
    workers: int
    compile: bool
    subset_tokens: tuple[int, ...]
    subset_share: float
    budgets: tuple[int, ...]

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.style.image_size // self.vision.patch_size

    @property
    def patches(self) -> int:
        return self.grid**2

    def matched_budget(self, k: int, after: int) -> int | None:
        """Tokens to retain after layer `after`, with all N tokens in the layers before.

        The sum of visual tokens over the layers then equals that of k tokens in every layer. None
        if the first layers already cost more.
        """
        layers = self.language.layers
        retained = (layers * k - after * self.patches) // (layers - after)
        return retained if retained > 0 else None


def settings(recipe: Recipe) -> dict[str, str]:
    """The settings that a trained model depends on, such as {"stages.tower.steps": "3000"}."""

    def flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from flat(f"{name}.{key}" if name else key, inner)
        else:
            yield name, json.dumps(value)

    trained = {key: value for key, value in asdict(recipe).items() if key not in _NOT_TRAINED}
    return dict(flat("", trained))


def load(name: str) -> Recipe:
    """The recipe of a file: a name in recipes/, or a path."""
    path = Path(name) if name.endswith(".yaml") else DIRECTORY / f"{name}.yaml"
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    style: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in data.pop("style").items()
    }
    if set(data["stages"]) != set(STAGES):
        raise ValueError(f"{path}: stages must be {', '.join(STAGES)}, got {list(data['stages'])}")
    return Recipe(
        style=Style(**style),
        vision=Transformer(**data.pop("vision")),
        language=Transformer(**data.pop("language")),
        stages={stage: Stage(**values) for stage, values in data.pop("stages").items()},
        subset_tokens=tuple(data.pop("subset_tokens")),
        budgets=tuple(data.pop("budgets")),
        **data,
    )
