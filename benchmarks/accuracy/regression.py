"""The regression test: fixed questions to the embedded model, and how many it answers right.

They go the way that users' questions go: PNG pixels, processor, `vispruner.apply`, `generate`. The
export of a model records the numbers in tests/embedded/accuracy.json, where the tests find them.
"""

from __future__ import annotations

import json
from typing import Any

import provenance
import torch

from vispruner.embedded import scenes
from vispruner.embedded.scenes import Scene

from .evaluation import generated

RECORD = provenance.ROOT / "tests" / "embedded" / "accuracy.json"
QUESTIONS = 300
BUDGETS = (196, 32, 16)
#: Answers that another processor or version may round the other way. A wrong position or a broken
#: selection costs far more.
BAND = 6


def draw_scenes() -> list[Scene]:
    """300 scenes with a question each, as many of each background."""
    style = scenes.Style()
    return [
        scenes.draw(
            seed,
            style,
            split="guard",
            background=style.backgrounds[seed % len(style.backgrounds)],
            questions=1,
        )
        for seed in range(QUESTIONS)
    ]


def record(directory: str) -> None:
    """Writes what the model in `directory` does."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    reader = AutoProcessor.from_pretrained(directory)
    drawn = draw_scenes()
    right = {str(k): sum(generated(model.eval(), reader, drawn, k)) for k in BUDGETS}
    text = json.dumps({"questions": QUESTIONS, "right": right, "band": BAND}, indent=1)
    RECORD.write_text(text + "\n")
