"""Finding the place of a mutation."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations.faults import FAULTS
from mutations.mutation import RESULTS, Mutation
from support.compiled_kernels import ROOT


def in_file(directory: Path, text: str, old: str) -> str:
    (directory / "x.cu").write_text(text)
    return Mutation("name", "x.cu", old, "NEW", RESULTS).apply(directory).read_text()


@pytest.mark.parametrize(
    "text",
    ["a(b);c();", "a ( b );\n  c();", "a(  // why\n    b);\n\n  // and why\n  c();"],
    ids=["dense", "spaced", "commented"],
)
def test_found_in_any_format(text: str, tmp_path: Path) -> None:
    assert in_file(tmp_path, f"x; {text} y;", "a(b); c();") == "x; NEW y;"


@pytest.mark.parametrize("text", ["a(b); c(); a(b); c();", "a(b); d(); c();", "aa(b); c()"])
def test_one_place_or_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name: \d places in x.cu are 'a\(b\); c\(\);'"):
        in_file(tmp_path, text, "a(b); c();")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_has_its_place(fault: Mutation, tmp_path: Path) -> None:
    file = tmp_path / fault.file
    file.parent.mkdir(parents=True)
    original = (ROOT / "csrc" / fault.file).read_text()
    file.write_text(original)
    assert fault.apply(tmp_path).read_text() != original
