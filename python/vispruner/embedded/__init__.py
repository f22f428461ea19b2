"""The embedded model: a small LLaVA, trained by this project, that answers questions about scenes.

    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from vispruner import embedded

    model = LlavaForConditionalGeneration.from_pretrained(embedded.path())
    processor = AutoProcessor.from_pretrained(embedded.path())
    example = embedded.example()

The directory is in Hugging Face format, so it loads as a model of the hub does. `scenes.draw` makes
more of the pictures that it understands; its model card (`README.md` there) says what it was
trained on, how well it answers and where it ends.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Example:
    """A picture and questions about it.

    Attributes:
        image: path of a PNG file.
        questions: pairs of a question and its answer.
    """

    image: str
    questions: list[tuple[str, str]]


def path() -> str:
    """The directory to give to `from_pretrained`."""
    return str(_HERE / "model")


def example() -> Example:
    """The bundled scene; its image and answers were not part of the training."""
    questions = json.loads((_HERE / "example.json").read_text())["questions"]
    return Example(str(_HERE / "example.png"), [(asked, answer) for asked, answer in questions])
