"""The examples run unchanged, with what the package installs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PRINTS = {
    "batch_with_different_k": r"image 2: 196 -> 16 tokens",
    "operators_with_compile": r"indices \(2, 64\)",
    "training": r"step 3: loss 0\.",
    "transformers_model": r"196 -> 32 visual tokens",
}
ELSEWHERE = {"vllm_client": "tests/engine/test_embedded.py"}  # needs a server


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PRINTS))
def test_example(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTS[name], done.stdout), done.stdout


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PRINTS, *ELSEWHERE}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
