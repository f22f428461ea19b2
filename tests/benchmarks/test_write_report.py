"""The report that benchmarks/verify/write_report.py makes from a run's logs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "verify" / "write_report.py"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """The logs of a clean run, next to `out`."""
    logs, out = tmp_path / "logs", tmp_path / "out"
    logs.mkdir()
    out.mkdir()
    for step in ("build", "probe", "verify", "tests", "stress", "benchmarks", *TOOLS):
        (logs / f"{step}.status").write_text("0\n")
        (logs / f"{step}.seconds").write_text("12\n")
    gpu = {"name": "Imagined", "driver": "580.1"}
    described = {
        "date": "2000-01-01",
        "device": {"gpu": gpu},
        "versions": {"torch": "2.13.0"},
        "csrc_tree": "0123456789abcdef",
    }
    (logs / "provenance.json").write_text(json.dumps(described))
    (logs / "tests.log").write_text("....s\n==== 4 passed, 1 skipped in 3.21s ====\n")
    (logs / "stress.log").write_text('{"repeats": {"alone": 8}, "differed": []}\n')
    for tool in TOOLS:
        (logs / f"{tool}.log").write_text("done\n========= ERROR SUMMARY: 0 errors\n")
    counts = {"cases": 5, "wrong_cases": 0, "runs": 20, "skipped": 1}
    result = {"backend": "cuda:0", "operators": {"topk": counts}, "known_answers": counts}
    report = {"complete": True, "equal": True, "results": [result]}
    (out / "vispruner_verify.json").write_text(json.dumps(report))
    return logs


def test_all_clean(report: ModuleType, logs: Path) -> None:
    found = report.report(logs, logs.parent / "out")
    assert found["clean"]
    assert (found["device"], found["driver"], found["torch"]) == ("Imagined", "580.1", "2.13.0")
    assert found["csrc_tree"] == "0123456789abcdef"
    assert found["tests"] == {"passed": 4, "failed": 0, "error": 0, "skipped": 1}
    assert found["stress"] == {"repeats": {"alone": 8}, "differed": []}
    assert found["verify"] == {
        "complete": True,
        "equal": True,
        "backends": ["cuda:0"],
        "cases": 10,
        "wrong_cases": 0,
        "runs": 40,
        "skipped": 2,
    }
    assert found["sanitizers"]["racecheck"]["summary"] == "ERROR SUMMARY: 0 errors"
    assert found["steps"]["tests"] == {"status": 0, "seconds": 12}


@pytest.mark.parametrize("step", ["build", "probe", "verify", "tests", "stress", *TOOLS])
@pytest.mark.parametrize("status", ["1", "124", "137", "stopped", "not run", None])
def test_steps_that_decide(report: ModuleType, logs: Path, step: str, status: str | None) -> None:
    """A failure, a time limit, an interrupted script, and a step that did not start."""
    file = logs / f"{step}.status"
    file.write_text(f"{status}\n") if status else file.unlink()
    assert not report.report(logs, logs.parent / "out")["clean"]


@pytest.mark.parametrize("status", ["1", "124", "stopped", "not run", None])
def test_benchmarks_do_not_decide(report: ModuleType, logs: Path, status: str | None) -> None:
    file = logs / "benchmarks.status"
    file.write_text(f"{status}\n") if status else file.unlink()
    found = report.report(logs, logs.parent / "out")
    assert found["clean"]
    assert found["steps"]["benchmarks"]["status"] == (
        int(status) if status and status.isdigit() else status
    )


def test_a_sanitizer_that_is_unavailable(report: ModuleType, logs: Path) -> None:
    for tool in TOOLS:
        (logs / f"{tool}.status").write_text("unavailable\n")
        (logs / f"{tool}.log").write_text("there is no compute-sanitizer\n")
    found = report.report(logs, logs.parent / "out")
    assert found["clean"]
    assert found["sanitizers"]["memcheck"] == {
        "status": "unavailable",
        "summary": "there is no compute-sanitizer",
    }
    # A tool that can run and reports errors still decides.
    (logs / "racecheck.status").write_text("9\n")
    (logs / "racecheck.log").write_text("========= RACECHECK SUMMARY: 3 hazards displayed\n")
    found = report.report(logs, logs.parent / "out")
    assert not found["clean"]
    assert found["sanitizers"]["racecheck"]["summary"].startswith("RACECHECK SUMMARY: 3")


def test_only_the_tools_may_be_unavailable(report: ModuleType, logs: Path) -> None:
    (logs / "tests.status").write_text("unavailable\n")
    assert not report.report(logs, logs.parent / "out")["clean"]


def test_a_failed_test(report: ModuleType, logs: Path) -> None:
    (logs / "tests.status").write_text("1\n")
    (logs / "tests.log").write_text("..F.E\n== 1 failed, 3 passed, 1 error in 9.00s ==\n")
    found = report.report(logs, logs.parent / "out")
    assert found["tests"] == {"passed": 3, "failed": 1, "error": 1, "skipped": 0}


def test_tests_that_were_cut_off_are_counted(report: ModuleType) -> None:
    log = "....................................ss [ 37%]\n..F."
    assert report.counts(log) == {"passed": 39, "failed": 1, "error": 0, "skipped": 2}
    assert report.counts("ImportError: No module named pytest\n")["passed"] == 0


def test_nothing_but_a_failed_build(report: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "build.status").write_text("2\n")
    found = report.report(tmp_path, tmp_path)
    assert not found["clean"]
    assert found["verify"] is None
    assert found["device"] is None


def test_an_incomplete_report(report: ModuleType, logs: Path) -> None:
    out = logs.parent / "out"
    (out / "vispruner_verify.json").write_text('{"complete": fal')
    assert report.report(logs, out)["verify"] is None


def run(logs: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # Without site-packages, because it must not need torch.
    command = [sys.executable, "-S", str(SCRIPT), str(logs), str(logs.parent / "out"), *options]
    return subprocess.run(command, capture_output=True, text=True)


def change(status: str) -> Callable[[Path], Any]:
    return lambda logs: (logs / "stress.status").write_text(status)


@pytest.mark.parametrize(("status", "code", "word"), [("0", 0, " clean"), ("1", 1, "NOT CLEAN")])
def test_script(logs: Path, status: str, code: int, word: str) -> None:
    change(status)(logs)
    done = run(logs)
    assert done.returncode == code, done.stderr
    assert word in done.stdout
    out = logs.parent / "out"
    assert json.loads((out / "gpu_verified.json").read_text())["clean"] == (code == 0)
    assert sorted(file.name for file in out.iterdir()) == [
        "gpu_verified.json",
        "vispruner_verify.json",
    ]


def test_script_between_the_steps(logs: Path) -> None:
    change("1")(logs)
    done = run(logs, "--quiet", "--dry-run")
    assert (done.returncode, done.stdout) == (0, "")
    assert not (logs.parent / "out" / "gpu_verified.json").exists()
    assert (logs.parent / "out" / "gpu_dry_run.json").exists()
