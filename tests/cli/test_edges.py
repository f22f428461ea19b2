"""Edge cases of images, texts and paths, and the command without torch."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vispruner import cli, embedded
from vispruner.cli.common import CommandError, check_picture_path, read_image


@pytest.fixture
def grey() -> np.ndarray:
    return np.asarray(Image.open(embedded.example().image).convert("L"))


@pytest.mark.parametrize(
    ("name", "dtype", "factor"),
    [
        ("sixteen.png", np.uint16, 257),
        ("sixteen.tif", np.uint16, 257),
        ("thirty_two.tif", np.int32, 257),
        ("fractions.tif", np.float32, 1 / 255),
        ("counts.tif", np.int32, 1),
    ],
)
def test_pictures_of_more_than_eight_bits(
    name: str, dtype: type, factor: float, grey: np.ndarray, tmp_path: Path
) -> None:
    Image.fromarray((grey.astype(np.float64) * factor).astype(dtype)).save(tmp_path / name)
    seen = np.asarray(read_image(tmp_path / name))
    assert seen.shape == (*grey.shape, 3)
    assert abs(seen[..., 0].astype(int) - grey).max() <= 1


def test_float_images_are_scaled_from_minimum_to_maximum(tmp_path: Path) -> None:
    depth = np.linspace(-3.5, 700, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(depth).save(tmp_path / "depth.tif")
    seen = np.asarray(read_image(tmp_path / "depth.tif"))[..., 0]
    assert (seen.min(), seen.max()) == (0, 255)
    assert (np.diff(seen.flatten().astype(int)) >= 0).all()
    depth[0, 0] = np.nan
    Image.fromarray(depth).save(tmp_path / "hole.tif")
    with pytest.raises(CommandError, match=r"hole\.tif: pixels that are not finite"):
        read_image(tmp_path / "hole.tif")


def test_square_brackets_are_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "photo[red].png"
    picture.write_bytes(Path(embedded.example().image).read_bytes())
    for question in ("what does [/INST] mean ?", "what is in the [box] ?"):
        assert cli.main(["ask", str(picture), question, "--k", "22"]) == 0
        said = capsys.readouterr().out
        assert "photo[red].png" in said
        assert question in said
    target = tmp_path / "out[bold].png"
    assert cli.main(["show", str(picture), "--k", "22", "-o", str(target)]) == 0
    assert "out[bold].png" in capsys.readouterr().out.replace("\n", "")


def test_questions_that_cannot_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    picture = embedded.example().image
    assert cli.main(["ask", str(picture), "what <image> is this?"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vispruner ask: a question must not contain <image>, which stands for")
    assert said.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["ask", str(picture), "\udcff"])
    assert "argument QUESTION: not UTF-8" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("output", ["closed", "full", "ascii", "none"])
def test_outputs(output: str, unbuffered: str) -> None:
    """Nobody reads it, its disk is full, it cannot show a character, or there is none."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    if output == "ascii":
        environment["PYTHONIOENCODING"] = "ascii"
    name = "flops" if output == "ascii" else "info"
    command = [sys.executable, "-m", "vispruner.cli", name]
    if output == "none":
        command = ["sh", "-c", f"{shlex.join(command)} >&-"]
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as closed, open("/dev/full", "wb") as full:
        stdout = {"closed": closed, "full": full}.get(output, subprocess.DEVNULL)
        done = subprocess.run(
            command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
        )
    status, said = {
        "closed": (128 + signal.SIGPIPE, ""),
        "full": (2, r"vispruner( info)?: \[Errno 28\] No space left on device\n"),
        "ascii": (0, ""),
        "none": (0, ""),
    }[output]
    assert done.returncode == status
    assert re.fullmatch(said, done.stderr)


def test_a_file_that_a_command_cannot_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> int:
        raise FileNotFoundError(2, "No such file", "weights")

    monkeypatch.setattr("vispruner.cli.info.run", fails)
    assert cli.main(["info"]) == 2
    print("after")
    said = capsys.readouterr()
    assert said.err == "vispruner info: [Errno 2] No such file: 'weights'\n"
    assert said.out == "after\n"


def test_paths_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["show", "--k", "22"], ["draw"]):
        assert cli.main([*command, "-o", "/proc/out.png"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"vispruner {command[0]}: argument -o: cannot write /proc/out.png:")
        assert said.count("\n") == 1
    check_picture_path(tmp_path / "new.png")
    assert not (tmp_path / "new.png").exists()
    (tmp_path / "old.png").write_bytes(b"old")
    check_picture_path(tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    "arguments", ["--help", "ask --help", "flops --help", "web --help", "--version"]
)
def test_without_torch(arguments: str) -> None:
    program = f"""
import sys
from vispruner import cli
try:
    cli.main({arguments.split()!r})
except SystemExit as ended:
    assert not ended.code
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if arguments == "--version":
        assert done.stdout == f"vispruner {version('vispruner-cuda')}\n"


@pytest.mark.parametrize(
    ("missing", "command", "install"),
    [
        ("rich_argparse", "flops", "'transformers>=5.17' pillow rich rich-argparse"),
        ("transformers", "flops", "'transformers>=5.17' pillow rich rich-argparse"),
        ("gradio", "web", "'gradio>=6'"),
    ],
)
def test_install_hint(missing: str, command: str, install: str) -> None:
    """The hint names the required packages, because this one may not be in an index."""
    program = f"""
import sys
sys.modules[{missing!r}] = None
from vispruner import cli
sys.exit(cli.main([{command!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith(f"pip install {install}\n")
