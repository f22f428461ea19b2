"""Smooth pictures: results that equal those of transformers, and results that are only close.

Patches of a smooth picture are similar to each other, so features that differ by a rounding error
between two implementations of a tower can lead to other diverse tokens. The important tokens are
the same, the engine's features give the engine's tokens, and equal tokens give equal answers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
import transformers
from support.engine_process import Engine
from support.engine_requests import Request, smooth_picture

import vispruner
from vispruner import embedded
from vispruner.selection import Budget

pytestmark = pytest.mark.engine

K, LENGTH, PICTURES = 8, 12, 16
PROMPT = Request("USER: {image}what is in the image? ASSISTANT:", [0])


@pytest.mark.parametrize("family", ["llava", "qwen25", "qwen3", "embedded"])
def test_smooth_pictures(checkpoint: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    folder = Path(embedded.path()) if family == "embedded" else checkpoint(family)
    budget = Budget(k=K)
    prompt, pictures = PROMPT.prompt(family), [smooth_picture(n) for n in range(PICTURES)]
    with Engine(
        folder, {"k": K}, record=tmp_path, mm_processor_cache_gb=0, max_model_len=512
    ) as engine:
        known = set(tmp_path.glob("choice*"))  # of the engine's profile run
        answers = [
            engine([{"prompt": prompt, "multi_modal_data": {"image": picture}}], LENGTH)[0]
            for picture in pictures
        ]
    choices = [torch.load(file) for file in sorted(set(tmp_path.glob("choice*")) - known)]
    assert len(choices) == PICTURES
    same = 0
    expected = _transformers(folder, prompt, pictures, budget)
    for answer, own, (tokens, kept) in zip(answers, choices, expected, strict=True):
        torch.testing.assert_close(own["scores"], kept.scores, rtol=1e-3, atol=1e-6)
        # Its features give its tokens.
        _, rows, _ = budget.select(own["features"][None], own["scores"][None])
        assert torch.equal(own["rows"], rows[0])
        count = budget.ranked(K)
        important = own["scores"].topk(count).indices.tolist()
        assert set(important) == set(kept.scores.topk(count).indices.tolist())
        assert set(important) <= set(own["rows"].tolist())
        if torch.equal(own["rows"], kept.indices):
            same += 1
            assert answer.tokens == tokens
    assert same >= PICTURES // 2  # and equal tokens do occur


def _transformers(
    folder: Path, prompt: str, pictures: list[Any], budget: Budget
) -> list[tuple[list[int], Any]]:
    """The answer in transformers and the retained tokens, for each picture."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.eval().generation_config.eos_token_id = None  # as with ignore_eos
    answers = []
    with vispruner.apply(model, budget) as pruner, torch.no_grad():
        for picture in pictures:
            inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)
            tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
            answers.append((tokens, pruner.last.items[0]))
    return answers
