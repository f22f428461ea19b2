"""`python -m vispruner.demo` from end to end, and what it says of bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import vispruner_cuda
from vispruner import demo


@pytest.fixture
def photo_path(photo: Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    photo.save(path)
    return path


def _arguments(tower: Path, photo: Path, output: Path, *more: str) -> list[str]:
    return ["--tower", str(tower), "--image", str(photo), "-o", str(output), "--runs", "1", *more]


def test_writes_a_picture_and_says_what_happened(
    tiny_tower: Path, photo_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.png"
    assert demo.main(_arguments(tiny_tower, photo_path, output, "--k", "12")) == 0
    said = capsys.readouterr()
    assert "64 -> 12 (6 important, 6 diverse)" in said.out
    assert "yes, torch.equal" in said.out
    assert "[CLS] attention" in said.out
    assert "random" not in said.out
    with Image.open(output) as picture:
        few = picture.convert("RGB")
    demo.main(_arguments(tiny_tower, photo_path, output, "--k", "40"))
    with Image.open(output) as picture:
        many = picture.convert("RGB")
    assert few.size == many.size
    assert few.tobytes() != many.tobytes()
    right = (2 * few.width // 3, 0, few.width, few.height)

    def brightness(image: Image.Image) -> float:
        pixels = image.crop(right).convert("L").tobytes()
        return sum(pixels) / len(pixels)

    assert brightness(many) > brightness(few)  # fewer dimmed patches


@pytest.mark.parametrize("k", [1, 63, 64, 1000])
@pytest.mark.parametrize("ratio", ["0", "0.5", "1"])
def test_every_k_and_ratio(
    tiny_tower: Path, photo_path: Path, tmp_path: Path, k: int, ratio: str
) -> None:
    more = ("--k", str(k), "--important-ratio", ratio)
    assert demo.main(_arguments(tiny_tower, photo_path, tmp_path / "out.jpg", *more)) == 0


def test_several_images_and_dtype(tiny_tower: Path, photo_path: Path, tmp_path: Path) -> None:
    arguments = ["--tower", str(tiny_tower), "--image", str(photo_path), str(photo_path)]
    arguments += ["--dtype", "bfloat16", "--runs", "1", "-o", str(tmp_path / "out.png")]
    assert demo.main(arguments) == 0


def test_random_weights_are_announced(
    photo_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vispruner import clip

    from .conftest import TINY

    monkeypatch.setattr(clip, "LLAVA_1_5", TINY)  # the real shape takes seconds: `make demo`
    pytest.importorskip("skimage")
    assert demo.main(["-o", str(tmp_path / "out.png"), "--runs", "1"]) == 0
    said = capsys.readouterr().out
    assert "weights are random" in said
    assert "3" in said.split("images")[1].splitlines()[0]


def test_split_kept_agrees_with_prune() -> None:
    feats = torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(0))
    attention = torch.rand(1, 2, 30, generator=torch.Generator().manual_seed(1))
    indices = vispruner_cuda.prune(feats, attention, 10, important_ratio=0.3).indices[0]
    important, diverse = demo.split_kept(indices, attention[0], 10, 0.3)
    assert (len(important), len(diverse)) == (3, 7)
    assert sorted(important + diverse) == indices.tolist()
    assert set(important) == set(vispruner_cuda.topk(attention, 3).indices[0].tolist())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--k", "0"], "--k: must be at least 1, got 0"),
        (["--k", "many"], "--k"),
        (["--important-ratio", "1.5"], r"--important-ratio: must be in [0, 1], got 1.5"),
        (["--important-ratio", "nan"], r"--important-ratio: must be in [0, 1], got nan"),
        (["--dtype", "int8"], "--dtype"),
        (["--runs", "0"], "--runs"),
        (["--device", "nonsense"], "--device: cannot use 'nonsense'"),
        (["--device", "meta"], "--device: must be a cpu or cuda device"),
        (["--image", "missing.jpg"], "cannot read missing.jpg: no such file"),
        (["--image", "."], "cannot read ."),
        (["-o", "no/such/directory/out.png"], "cannot write"),
        (["-o", "out.nonsense"], "unknown image format '.nonsense'"),
        (["-o", "out"], "unknown image format"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = demo.main(arguments)
    except SystemExit as error:  # from argparse
        status = error.code  # type: ignore[assignment]
    said = capsys.readouterr()
    assert status == 2
    assert complaint in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_broken_image(
    tmp_path: Path, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    photo.save(tmp_path / "whole.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    for path in (text, cut):
        assert demo.main(["--image", str(path)]) == 2
        said = capsys.readouterr().err
        assert f"cannot read {path}" in said
        assert said.count("\n") == 1


def test_tower_that_is_none(
    tmp_path: Path, photo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), str(tmp_path / "missing"), "not a/valid/name"):
        assert demo.main(_arguments(Path(name), photo_path, tmp_path / "out.png")) == 2
        said = capsys.readouterr().err
        assert "argument --tower: cannot load a CLIP vision tower from" in said
        assert said.count("\n") == 1


def test_hub_without_network(photo_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vispruner.demo", "--image", str(photo_path)]
    command += ["--tower", "openai/clip-vit-large-patch14-336", "-o", str(tmp_path / "out.png")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot load a CLIP vision tower from 'openai/" in done.stderr
    assert done.stderr.count("\n") == 1


def test_help() -> None:
    command = [sys.executable, "-m", "vispruner.demo", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for option in ("--image", "--tower", "--k", "--important-ratio", "--seed", "--device", "-o"):
        assert option in done.stdout
