"""The tables in README and docs match the result files, and links between documents resolve."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    for needed in ("transformers", "yaml"):
        pytest.importorskip(needed)
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    return importlib.import_module("tables")


def test_tables_are_up_to_date(tables: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    status = tables.main(["--check"])
    assert status == 0, capsys.readouterr().out


def test_check_notices_a_changed_number(tables: ModuleType, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    assert "<!-- table:cpu-speed-summary -->" in text
    readme = tmp_path / "README.md"
    readme.write_text(text)
    root = ["--root", str(tmp_path)]
    assert tables.main([*root, "--check"]) == 0
    readme.write_text(text.replace(" ms |", "9 ms |", 1))
    assert tables.main([*root, "--check"]) == 1
    assert tables.main(root) == 0
    assert readme.read_text() == text


def test_gpu_status_without_a_tested_gpu(tables: ModuleType) -> None:
    assert "not yet" in tables.gpu_status(lambda name: None)
    run: dict[str, Any] = {
        "device": "GPU",
        "date": "2000-01-01",
        "torch": "2.10",
        "driver": "1",
        "tests": {"passed": 7, "failed": 0},
        "csrc_tree": "0123456789abcdef",
        "clean": True,
    }
    assert "| GPU | 2000-01-01 | 2.10, 1 | clean | 7 | 0 |" in tables.gpu_status(lambda name: run)
    run.update(clean=False, csrc_tree=None)
    shown = tables.gpu_status(lambda name: run)
    assert "| GPU | 2000-01-01 | 2.10, 1 | **NOT CLEAN** | 7 | 0 | `unknown` |" in shown


def test_numbers_in_the_readme_are_those_of_the_table_they_link_to() -> None:
    readme = (ROOT / "README.md").read_text()
    text = (ROOT / "docs/benchmarks.md").read_text()
    measured = text.partition("<!-- table:end-to-end-cpu -->")[2].partition("<!-- /table -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in measured.splitlines()]
    rows = [row for row in rows if row and row[0].startswith("llava")]

    [less] = re.findall(
        r"(\d+) % less time to first token for LLaVA-1.5 at k = 64, batch 4", readme
    )
    [first] = [row[6] for row in rows if row[:2] == ["llava-1.5-7b, batch 4", "k = 64"]]
    assert f"(-{less} %)" in first

    [(low, high)] = re.findall(
        r"takes (\d+) to (\d+) % of the vision encoder's time for LLaVA", readme
    )
    shares = [
        re.findall(r"\((.+) %\)", row[3]) for row in rows if row[1] not in ("unpruned", "k = 576")
    ]
    rounded = [round(float(share)) for [share] in shares]
    assert (int(low), int(high)) == (min(rounded), max(rounded))


DOCUMENTS = ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_between_files(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file) if file else path
        assert linked.exists(), f"{name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{name} links to {target}"
