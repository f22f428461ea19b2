"""The `vispruner` command: help, invalid input, and commands without a model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vispruner import cli, shapes
from vispruner.cli import common, numeric
from vispruner_cuda import methods


def _status(arguments: list[str]) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as error:  # from argparse
        return int(str(error.code))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _status([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"vispruner {command}" in said
    assert "None" not in said  # an uninformative default


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert _status(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in cli.COMMANDS)


def test_methods_are_those_of_the_operators() -> None:
    assert tuple(methods.METHODS) == common.METHODS
    assert set(common.PARAMETERS) == set(methods.PARAMETERS)
    for method in methods.METHODS.values():
        for parameter in method.parameters:
            kind, owner, default, _ = common.PARAMETERS[parameter.name]
            assert (owner, default) == (method.name, parameter.default)
            assert (kind is int) == (parameter.step == 1)


def test_a_missing_attention_does_not_blame_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object, **options: object) -> None:
        said = f"{options['attn_implementation']}: FlashAttention2 is not installed"
        raise ImportError(said)

    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", load)
    for attention, blamed in (("flash_attention_2", "--attention"), ("sdpa", "--model")):
        assert cli.main(["ask", "--device", "cpu", "--attention", attention]) == 2
        assert f"argument {blamed}: cannot load " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["show", "--k", "0"], "--k: must be at least 1, got 0"),
        (["show", "--k", "many"], "--k: invalid whole number or auto value: 'many'"),
        (["show", "--mass", "0.5"], "--mass: is a setting of k='auto', got mass=0.5 with k=64"),
        (["show", "--k", "auto", "--mass", "2"], r"--mass: must be in (0, 1], got 2.0"),
        (["show", "--k", "auto", "--max-k", "0"], "--max-k: must be at least 1, got 0"),
        (["flops", "--k", "auto"], "--k"),
        (["show", "--k", "3", "--ratio", "0.5"], "not allowed with argument"),
        (["show", "--ratio", "0"], "--ratio: must be in (0, 1], got 0.0"),
        (["ask", "--important-ratio", "1.5"], "--important-ratio: must be in [0, 1], got 1.5"),
        (["show", "--important-ratio", "nan"], "--important-ratio: must be in [0, 1], got nan"),
        (["show", "--step", "0"], "--step: must be at least 1"),
        (["show", "--method", "divprune"], "--method: invalid choice: 'divprune'"),
        (["show", "--seed", "3"], "--seed: is a parameter of method random, got 3 with method"),
        (["ask", "--method", "mmr", "--step", "2"], "--step: is a parameter of method vispruner"),
        (["ask", "--method", "mmr", "--mmr-lambda", "-1"], "--mmr-lambda: must be in [0, 100]"),
        (["ask", "--method", "scope", "--scope-alpha", "9"], "--scope-alpha: must be in [0, 4]"),
        (["show", "--dtype", "int8"], "--dtype"),
        (["ask", "--runs", "0"], "--runs"),
        (["ask", "photo.png"], "QUESTION"),
        (["show", "--device", "nonsense"], "--device: cannot use 'nonsense'"),
        (["show", "--device", "meta"], "--device: must be a cpu or cuda device"),
        (["show", "missing.jpg"], "cannot read image missing.jpg: no such file"),
        (["ask", "missing.jpg", "what?"], "cannot read image missing.jpg: no such file"),
        (["show", "."], "cannot read image ."),
        (["show", "-o", "no/such/directory/out.png"], "cannot write"),
        (["show", "-o", "out.nonsense"], "unknown image format '.nonsense'"),
        (["show", "-o", "out"], "unknown image format"),
        (["show", "--tower", "a", "--model", "b"], "--tower: not allowed with --model"),
        (
            ["show", "--tower", "random", "--attention", "eager"],
            "argument --attention: not allowed with --tower",
        ),
        (
            ["show", "--tower", "random", "--trust-remote-code"],
            "argument --trust-remote-code: not allowed with --tower",
        ),
        (["show", "--frobnicate"], "unrecognized arguments"),
        (["draw", "-o", "out"], "unknown image format"),
        (["flops", "--k", "0"], "--k: must be at least 1, got 0"),
        (["flops", "--ratio", "2"], "--ratio: must be in (0, 1], got 2.0"),
        (["flops", "--k", "3", "--ratio", "0.5"], "--ratio: not allowed with --k"),
        (["flops", "--image-size", "large"], "must be WIDTHxHEIGHT in pixels, got 'large'"),
        (["flops", "--image-size", "9999x3", "--model", "qwen2-vl-7b"], "aspect ratio"),
        (["flops", "--images", "1" + "0" * 20], "--images: must be at most 2147483647, got 1000"),
        (["flops", "--text-tokens", "9999999999"], "--text-tokens: must be at most 2147483647"),
        (["flops", "--new-tokens", "9999999999"], "--new-tokens: must be at most 2147483647"),
        (["flops", "--image-size", "9999999999x3"], "--image-size: must be at most 2147483647 pix"),
        (["flops", "--ratio", "nan"], "--ratio: must be in (0, 1], got nan"),
        (["ask", "--max-new-tokens", "9999999999"], "--max-new-tokens: must be at most 21474836"),
        (["show", "--step", "1" + "0" * 20], "--step: must be at most 9223372036854775807"),
        (["web", "--port", "70000"], "--port: must be at most 65535, got 70000"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "required: COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _status(arguments) == 2
    said = capsys.readouterr()
    assert complaint in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_broken_image(
    tmp_path: Path,
    photo: Image.Image,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    photo.save(tmp_path / "whole.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    for path in (text, cut):
        assert _status(["show", str(path)]) == 2
        said = capsys.readouterr().err
        assert f"cannot read image {path}" in said
        assert said.count("\n") == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # the photograph has 19 200
    assert _status(["show", str(tmp_path / "whole.png")]) == 2
    assert "decompression bomb" in capsys.readouterr().err


def test_invalid_checkpoints(
    tmp_path: Path, photo_path: Path, tiny_llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for option, complaint in (
        ("--tower", "argument --tower: cannot load a CLIP vision tower from"),
        ("--model", "argument --model: cannot load"),
    ):
        for name in (str(tmp_path / "empty"), str(tmp_path / "missing"), "not a/valid/name"):
            assert _status(["show", str(photo_path), option, name]) == 2
            said = capsys.readouterr().err
            assert complaint in said
            assert said.count("\n") == 1


def test_missing_weights_are_an_error_and_not_random(
    tmp_path: Path, photo_path: Path, tiny_llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_llava, tmp_path / "part")
    weights = tmp_path / "part" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "multi_modal_projector" in name)
    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert _status(["show", str(photo_path), "--model", str(tmp_path / "part")]) == 2
    assert "lacks 1 of its weights, such as" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tower", "--model"])
def test_hub_without_network(option: str, photo_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vispruner.cli", "show", str(photo_path)]
    command += [option, "openai/clip-vit-large-patch14-336", "-o", str(tmp_path / "out.png")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'openai/clip-vit-large-patch14-336'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("model", shapes.MODELS)
def test_flops(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _status(["flops", "--model", model, "--ratio", "0.25", "0.11"]) == 0
    said = capsys.readouterr().out
    assert "unpruned" in said
    assert "ratio 0.11" in said


def test_flops_of_llava_at_64_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert _status(["flops", "--k", "64"]) == 0
    said = capsys.readouterr().out
    assert "-89.2 %" in said  # visual tokens only, by the papers' formula
    assert "-80.0 %" in said  # cache of 64 + 64 instead of 576 + 64 tokens


def test_flops_of_the_largest_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    most = str(numeric.MOST)
    arguments = ["--images", most, "--text-tokens", most, "--new-tokens", most]
    arguments += ["--image-size", f"{most}x{most}", "--k", "1" + "0" * 20]
    assert _status(["flops", *arguments]) == 0
    assert str(576 * numeric.MOST)[:6] in capsys.readouterr().out


def test_flops_of_a_checkpoint(tiny_llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _status(["flops", "--model", str(tiny_llava), "--k", "16"]) == 0
    assert "64" in capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert _status(["info"]) == 0
    said = capsys.readouterr().out
    assert "vispruner_cuda" in said
    assert "llava_onevision" in said


def test_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (tmp_path / f"{name}.png" for name in ("first", "again", "other"))
    for path, seed in ((first, "3"), (again, "3"), (other, "4")):
        assert _status(["draw", "--seed", seed, "-o", str(path)]) == 0
        assert "?" in capsys.readouterr().out
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()
