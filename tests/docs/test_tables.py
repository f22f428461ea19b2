"""The tables in README and docs match the result files, and links between documents resolve."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from dataclasses import asdict
from itertools import pairwise
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
        "sanitizers": {"memcheck": {"status": 0}, "racecheck": {"status": 0}},
    }
    assert "| GPU | 2000-01-01 | 2.10, 1 | clean | 7 | 0 |" in tables.gpu_status(lambda name: run)
    run["sanitizers"]["racecheck"]["status"] = "unavailable"
    assert "| clean, but without racecheck |" in tables.gpu_status(lambda name: run)
    run["sanitizers"]["memcheck"]["status"] = "unavailable"
    assert "| clean, but without compute-sanitizer |" in tables.gpu_status(lambda name: run)
    run.update(clean=False, csrc_tree=None)
    shown = tables.gpu_status(lambda name: run)
    assert "| GPU | 2000-01-01 | 2.10, 1 | **NOT CLEAN** | 7 | 0 | `unknown` |" in shown


def test_an_unfinished_gpu_benchmark_says_so(tables: ModuleType) -> None:
    goals = importlib.import_module("operators.workloads").GOALS
    rows = [
        {
            **asdict(goal),
            **asdict(goal.case),
            "us": 8.0,
            "us_per_image": 8.0,
            "floor_us": {"memory": 1.0},
            "baselines_us": {goal.relative_to or "eager loop": 2.0, "torch.compile": None},
        }
        for goal in goals
    ]
    data: dict[str, Any] = {
        "complete": True,
        "rows": rows,
        "no_baseline": {},
        "host_us": 1.0,
        "csrc_tree": "0123456789abcdef",
        "device": {"gpu": {"name": "GPU", "driver": "1"}},
        "versions": {"torch": "2.10"},
        "date": "2000-01-01",
    }
    whole = tables.gpu_goals(lambda name: data)
    assert whole.startswith("| work |")
    assert "not measured" not in whole

    data.update(complete=False, rows=rows[:3], no_baseline={"torch.compile": "no result in 60 s"})
    shown = tables.gpu_goals(lambda name: data)
    assert shown.startswith(f"**incomplete: 3 of {len(goals)} goals**\n")
    assert "No result of the baseline torch.compile: no result in 60 s.\n" in shown

    [relative] = [row for row in rows if row["relative_to"] not in (None, "", "floor")][:1]
    relative["baselines_us"] = {}
    data.update(rows=[relative])
    assert "| not measured |" in tables.gpu_goals(lambda name: data)


@pytest.fixture
def results(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the results, which the tables read; the documents are an empty directory."""
    copy = tmp_path / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", copy)
    monkeypatch.setattr(tables, "RESULTS", copy)
    return copy


def check(tables: ModuleType, root: Path) -> int:
    return int(tables.main(["--check", "--root", str(root)]))


@pytest.mark.parametrize("name", ["kernel_counts", "occupancy", "compiled_kernels"])
def test_check_notices_results_of_other_kernels(
    name: str, tables: ModuleType, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tables, results) == 0, capsys.readouterr().out
    path = results / f"{name}.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "csrc_tree": "5eed" * 10, "sources": "5eed" * 3}))
    assert check(tables, results) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path}: of csrc 5eed5eed5eed, not of the current ")


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", b"\xff"])
def test_a_broken_results_file_is_named(
    content: str | bytes | None,
    tables: ModuleType,
    results: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (results / "page").mkdir()
    (results / "page" / "README.md").write_text("<!-- table:host -->\n<!-- /table -->\n")
    path = results / "host.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert check(tables, results / "page") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: ")


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


def test_the_gain_of_smaller_steps_is_that_of_the_table() -> None:
    text = (ROOT / "docs/choosing-k.md").read_text()
    measured = text.partition("<!-- table:accuracy-step -->")[2].partition("<!-- /table -->")[0]
    last = re.findall(r"^\| step \d+ .* \| ([\d.]+) ± [\d.]+ \|$", measured, re.MULTILINE)
    gains = [round(float(small) - float(large), 1) for small, large in pairwise(last)]
    [(low, high)] = re.findall(r"At k = 8 every\s+halving gains ([\d.]+) to ([\d.]+) points", text)
    assert (float(low), float(high)) == (min(gains), max(gains))


def test_the_methods_table_names_the_machine_of_every_seed() -> None:
    text = (ROOT / "docs/accuracy.md").read_text()
    [block] = re.findall(r"<!-- table:accuracy-methods -->(.*?)<!-- /table -->", text, re.DOTALL)
    for path in sorted((ROOT / "benchmarks/results").glob("accuracy_methods_cpu_seed*.json")):
        run = json.loads(path.read_text())
        processor, torch = run["device"]["processor"], run["versions"]["torch"]
        line = f"- Seed {run['seed']}: {processor}, torch {torch}, {run['date']}.\n"
        assert line in block


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
