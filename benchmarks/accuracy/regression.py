"""The regression test: the embedded model's accuracy on fixed questions.

The questions use the same path as those of users: PNG pixels, processor, `vispruner.apply`,
`generate`. Exporting a model records the numbers in tests/embedded/accuracy.json for the tests.
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
#: Answers that may differ with another processor or version because of rounding. A wrong position
#: or selection changes far more.
BAND = 6


def draw_scenes() -> list[Scene]:
    """300 scenes with one question each, in equal numbers per background."""
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
    """Records the accuracy of the model in `directory`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    reader = AutoProcessor.from_pretrained(directory)
    drawn = draw_scenes()
    right = {str(k): sum(generated(model.eval(), reader, drawn, k)) for k in BUDGETS}
    text = json.dumps({"questions": QUESTIONS, "right": right, "band": BAND}, indent=1)
    RECORD.write_text(text + "\n")
