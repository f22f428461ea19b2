"""`vispruner ask` from end to end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from vispruner import cli

QUESTION = "what is w20 ?"


def _ask(model: Path, photo: Path, *more: str) -> int:
    return cli.main(["ask", str(photo), QUESTION, "--model", str(model), *more])


def _row(said: str, name: str) -> list[str]:
    """The cells of a table's row, without the first."""
    lines = ([cell.strip() for cell in re.split("[│┃]", line)] for line in said.splitlines())
    return next(cells[2:-1] for cells in lines if len(cells) > 2 and cells[1] == name)


def test_answers_and_prints_costs(
    tiny_llava: Path, photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _ask(tiny_llava, photo_path, "--k", "12", "--max-new-tokens", "5") == 0
    said = capsys.readouterr().out
    assert "photo.png" in said
    assert QUESTION in said
    assert _row(said, "visual tokens") == ["64 -> 12"]
    times = {name: _row(said, name)[0] for name in ("vision", "prune", "prefill", "decode")}
    values = [float(time.removesuffix(" ms")) for time in times.values()]
    assert all(value > 0 for value in values)
    total = float(_row(said, "total")[0].removesuffix(" ms"))
    assert total == pytest.approx(sum(values), abs=0.05)


def test_number_of_tokens_of_the_picture(
    tiny_llava: Path, photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = []
    for more in (["--mass", "0.25"], ["--mass", "0.5"], ["--max-k", "7"]):
        assert _ask(tiny_llava, photo_path, "--k", "auto", *more, "--max-new-tokens", "2") == 0
        before, _, after = _row(capsys.readouterr().out, "visual tokens")[0].partition(" -> ")
        assert before == "64"
        counts.append(int(after))
    assert 0 < counts[0] < counts[1] < 64
    assert counts[2] == 7


def test_compares_with_the_unpruned_model(
    tiny_llava: Path, photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--ratio", "0.25", "--compare", "--runs", "2", "--max-new-tokens", "5")
    assert _ask(tiny_llava, photo_path, *more) == 0
    said = capsys.readouterr().out
    assert _row(said, "visual tokens") == ["64", "16", "75 %"]
    assert "medians of 2 runs" in said
    before, after = (float(cell.removesuffix(" ms")) for cell in _row(said, "total")[:2])
    assert before > 0 < after
    assert _row(said, "prune")[0] == ""  # nothing to compare with

    # The answers are those of the model itself.
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    import vispruner
    from vispruner.cli.common import model_inputs, read_image

    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tiny_llava)
    inputs = model_inputs(processor, read_image(photo_path), QUESTION, torch.device("cpu"))

    def answer() -> str:
        new = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        new = new[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(new, skip_special_tokens=True)[0].strip()

    whole = answer()
    with vispruner.apply(model, ratio=0.25):
        pruned = answer()
    assert f"unpruned: {whole}" in said
    assert f"pruned: {pruned}" in said
    assert whole != pruned  # otherwise the test would be meaningless


def test_retaining_all_tokens_gives_the_same_answer(
    tiny_llava_next: Path, photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--k", "64", "--compare", "--no-warmup", "--max-new-tokens", "5")
    assert _ask(tiny_llava_next, photo_path, *more) == 0
    said = capsys.readouterr().out
    answers = re.findall(r"pruned: (.*)", said)
    assert len(answers) == 2
    assert len(set(answers)) == 1
    assert _row(said, "visual tokens")[2] == "0 %"


def test_question_without_chat_template_has_llavas_form(tiny_llava: Path, photo_path: Path) -> None:
    from transformers import AutoProcessor

    from vispruner.cli.common import model_inputs, read_image

    processor = AutoProcessor.from_pretrained(tiny_llava)
    image, device = read_image(photo_path), torch.device("cpu")
    plain = model_inputs(processor, image, QUESTION, device)["input_ids"]
    text = processor.decode(plain[0])
    assert text.replace(" ", "") == "USER:" + 64 * "<image>" + "whatisw20?ASSISTANT:"
    processor.chat_template = (
        "{% for part in messages[0]['content'] %}"
        "{{ part['text'] if part['type'] == 'text' else '<image>' }} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT{% endif %}"
    )
    text = processor.decode(model_inputs(processor, image, QUESTION, device)["input_ids"][0])
    assert text.replace(" ", "") == 64 * "<image>" + "whatisw20?ASSISTANT"
