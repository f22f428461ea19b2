"""The embedded model loads like models from the hub, and matches its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open

import vispruner
from vispruner import embedded
from vispruner.embedded import scenes

LARGEST = 8_000_000  # bytes


def test_it_is_a_small_llava_in_half_precision(model: Any) -> None:
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    directory = Path(embedded.path())
    assert sum(file.stat().st_size for file in directory.iterdir()) <= LARGEST
    with safe_open(directory / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118
    assert (directory / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")


def test_the_processor_does_not_change_the_pixels(processor: Any) -> None:
    scene = scenes.draw(5)
    pixels = processor(images=scene.image, text="<image>", return_tensors="pt")["pixel_values"]
    want = (torch.from_numpy(scene.pixels).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(pixels[0], want, atol=1e-5, rtol=0)


def test_the_tokenizer_has_every_word_and_ignores_case(processor: Any) -> None:
    tokenizer = processor.tokenizer
    ids = tokenizer(" ".join(scenes.vocabulary())).input_ids
    assert tokenizer.unk_token_id not in ids
    assert (
        tokenizer("What Color is the Star?").input_ids
        == tokenizer("what color is the star ?").input_ids
    )
    assert tokenizer("a zebra").input_ids[-1] == tokenizer.unk_token_id


def test_the_chat_template_gives_the_training_prompt(processor: Any) -> None:
    question = "what color is the star?"
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    assert text == f"<image>\n{question}"


def test_it_answers_about_the_example(model: Any, processor: Any) -> None:
    example = embedded.example()
    image = Image.open(example.image)
    questions = [question for question, _ in example.questions]
    inputs = processor(
        images=[image] * len(questions),
        text=[f"<image>\n{question}" for question in questions],
        return_tensors="pt",
        padding=True,
    )
    for k in (196, 21):  # all, and 9 times fewer
        with vispruner.apply(model, k=k) as pruner:
            tokens = model.generate(**inputs, max_new_tokens=4)
            assert pruner.last is not None
            assert pruner.last.tokens_after == k * len(questions)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        assert answers == [answer for _, answer in example.questions]


def test_the_weights_have_the_names_of_published_checkpoints() -> None:
    """vLLM reads only these; transformers reads them as well, as the test above shows."""
    with safe_open(Path(embedded.path()) / "model.safetensors", "pt") as file:
        tower = [name for name in file.keys() if name.startswith("vision_tower.")]  # noqa: SIM118
    assert tower
    assert all(name.startswith("vision_tower.vision_model.") for name in tower)
