"""The model in the package can be served directly, as at the beginning of docs/serving.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from PIL import Image
from support.engine_process import Engine
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vispruner
from vispruner import embedded

pytestmark = pytest.mark.engine

K, LENGTH = 32, 6


def test_the_embedded_model_answers_as_in_transformers() -> None:
    processor: Any = AutoProcessor.from_pretrained(embedded.path())
    model = LlavaForConditionalGeneration.from_pretrained(embedded.path(), dtype=torch.float32)
    example = embedded.example()
    picture = Image.open(example.image).convert("RGB")
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question, _ in example.questions
    ]
    expected = []
    with vispruner.apply(model, k=K), torch.inference_mode():
        for prompt in prompts:
            inputs = processor(text=prompt, images=picture, return_tensors="pt")
            tokens = model.generate(
                **inputs, do_sample=False, min_new_tokens=LENGTH, max_new_tokens=LENGTH
            )
            expected.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    with Engine(Path(embedded.path()), {"k": K}, max_model_len=512) as engine:
        answers = engine(
            [{"prompt": p, "multi_modal_data": {"image": picture}} for p in prompts], LENGTH
        )
    ends = processor.tokenizer.eos_token_id
    for answer, tokens, (question, truth) in zip(answers, expected, example.questions, strict=True):
        length = answer.tokens.index(ends) if ends in answer.tokens else LENGTH
        said = processor.decode(answer.tokens[:length], skip_special_tokens=True).strip()
        assert said == truth, question
        assert answer.tokens[:length] == tokens[:length], question
        assert len(answer.prompt) < 196, question  # 32 visual tokens and the question
