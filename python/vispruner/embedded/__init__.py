"""The embedded model: a small LLaVA, trained by this project, for questions about drawn scenes.

    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from vispruner import embedded

    model = LlavaForConditionalGeneration.from_pretrained(embedded.path())
    processor = AutoProcessor.from_pretrained(embedded.path())
    example = embedded.example()

The directory is in Hugging Face format and loads like a model from the hub. `scenes.draw` draws
more scenes for it. The model card (`README.md` in the directory) describes its training, accuracy
and limits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Example:
    """An image and questions about it.

    Attributes:
        image: path of a PNG file.
        questions: (question, answer) pairs.
    """

    image: str
    questions: list[tuple[str, str]]


def path() -> str:
    """The directory, for `from_pretrained`."""
    return str(_HERE / "model")


def example() -> Example:
    """The bundled scene, which was not used in training."""
    questions = json.loads((_HERE / "example.json").read_text())["questions"]
    return Example(str(_HERE / "example.png"), [(asked, answer) for asked, answer in questions])
