"""`vispruner show` from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

import vispruner
from vispruner import cli, clip
from vispruner.cli.common import model_inputs, read_image
from vispruner.cli.show import pictures_of

from .conftest import TINY


def _show(photo: Path, output: Path, *more: str) -> int:
    return cli.main(["show", str(photo), "-o", str(output), *more])


def _right_third(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    return picture.crop((2 * picture.width // 3, 0, picture.width, picture.height))


def _brightness(image: Image.Image) -> float:
    pixels = image.convert("L").tobytes()
    return sum(pixels) / len(pixels)


@pytest.mark.parametrize("source", ["--tower", "--model"])
def test_draws_the_retained_tokens(
    source: str,
    tiny_tower: Path,
    tiny_llava: Path,
    photo_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = str(tiny_tower if source == "--tower" else tiny_llava)
    output = tmp_path / "out.png"
    assert _show(photo_path, output, source, name, "--k", "12") == 0
    said = capsys.readouterr().out
    assert "8 x 8 tokens: 64 -> 12 (6 important, 6 diverse)" in said
    assert str(output) in said.replace("\n", "")
    few = _right_third(output)
    assert _show(photo_path, output, source, name, "--k", "40") == 0
    many = _right_third(output)
    assert few.size == many.size
    assert _brightness(many) > _brightness(few)  # fewer dimmed patches


@pytest.mark.parametrize("k", [1, 63, 64, 1000])
@pytest.mark.parametrize("ratio", ["0", "0.5", "1"])
def test_every_k_and_ratio(
    tiny_tower: Path, photo_path: Path, tmp_path: Path, k: int, ratio: str
) -> None:
    more = ("--tower", str(tiny_tower), "--k", str(k), "--important-ratio", ratio)
    assert _show(photo_path, tmp_path / "out.jpg", *more) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--step", "3"), "(5 important, 5 diverse)"),
        (("--method", "topk"), "(topk)"),
        (("--method", "random", "--seed", "4"), "(random)"),
        (("--method", "maxmin"), "(maxmin)"),
        (("--method", "scope", "--scope-alpha", "0.5"), "(scope)"),
        (("--method", "mmr", "--mmr-lambda", "0.5"), "(mmr)"),
    ],
)
def test_methods(
    tiny_tower: Path,
    photo_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    text: str,
) -> None:
    more = ("--tower", str(tiny_tower), "--k", "10", *options)
    assert _show(photo_path, tmp_path / "out.png", *more) == 0
    assert f"-> 10 {text}" in capsys.readouterr().out


def test_several_images_and_dtype(tiny_tower: Path, photo_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    arguments = ["show", str(photo_path), str(photo_path), "-o", str(output)]
    arguments += ["--tower", str(tiny_tower), "--dtype", "bfloat16"]
    assert cli.main(arguments) == 0


def test_random_tower_is_announced(
    photo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip, "LLAVA_1_5", TINY)  # the real shape takes seconds
    output, named = tmp_path / "random.png", tmp_path / "named.png"
    assert _show(photo_path, output, "--tower", "random") == 0
    clip.ClipTower.random().model.save_pretrained(tmp_path / "tower")
    assert _show(photo_path, named, "--tower", str(tmp_path / "tower")) == 0
    with Image.open(output) as announced, Image.open(named) as plain:
        assert announced.height > plain.height  # by a line of text


def test_pictures_show_the_encoder_input(tiny_llava_next: Path, photo_path: Path) -> None:
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    processor = AutoProcessor.from_pretrained(tiny_llava_next)
    model = LlavaNextForConditionalGeneration.from_pretrained(tiny_llava_next)
    image = read_image(photo_path)
    inputs = model_inputs(processor, image, "", torch.device("cpu"))
    with vispruner.apply(model, k=10, important_ratio=0.3) as pruner, torch.no_grad():
        vispruner.prepare(model, inputs)
    assert pruner.last is not None
    item = pruner.last.items[0]
    found = pictures_of(item, image, inputs, processor.image_processor)
    assert len(found) == item.grid[0] == inputs["pixel_values"].shape[1]
    # The overview is the whole image, resized, with its original colours.
    overview = found[0].seen
    assert overview.size == (112, 112)
    wanted = image.resize((112, 112), Image.Resampling.BICUBIC)
    difference = ImageChops.difference(overview, wanted).convert("L").tobytes()
    assert sum(difference) / len(difference) < 12
    for number, picture in enumerate(found):
        assert picture.grid == (8, 8)
        assert len(picture.important) <= 3
        own = {i - 64 * number for i in item.indices.tolist() if i // 64 == number}
        assert set(picture.important) | set(picture.diverse) == own
        assert not set(picture.important) & set(picture.diverse)
        assert torch.equal(picture.scores, item.scores[64 * number : 64 * (number + 1)])
    assert len(found[0].important) == 3
