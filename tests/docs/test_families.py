"""The table of families in docs/integration.md matches the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from vispruner import models

ROOT = Path(__file__).resolve().parents[2]
TABLE = re.findall(r"^\| .*\|$", (ROOT / "docs" / "integration.md").read_text(), re.MULTILINE)


def test_every_model_type_is_listed() -> None:
    text = "\n".join(TABLE)
    for model_type in models.supported():
        assert f"`{model_type}`" in text, model_type


def test_lines_of_a_family() -> None:
    rows = [row.split("|") for row in TABLE]
    counted = {}
    for row in rows:
        lines = row[-2].strip()
        named = re.findall(r"`(\w+)`", row[1])
        if lines.isdigit() and named and named[0] in models.supported():
            module = models.families()[named[0]].__module__.rsplit(".", 1)[1]
            counted[module] = int(lines)
    assert len(counted) == 9
    for module, lines in counted.items():
        path = ROOT / "python" / "vispruner" / "models" / f"{module}.py"
        assert lines == len(path.read_text().splitlines()), module
