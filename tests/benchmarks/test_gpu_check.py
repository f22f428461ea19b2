"""benchmarks/gpu_check.sh with fake programs: time limits and written files.

The fake programs are first on the PATH of a tree with copies of the two scripts. SLEEP_<step> sets
the duration of a step, STATUS_<step> its exit status; both are 0 by default.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import compiled_kernels

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "timeout", "tar"))), reason="needs bash and coreutils"
)

PRETEND = """
pretend() { local sleep=SLEEP_$1 status=STATUS_$1; sleep "${!sleep:-0}"; exit "${!status:-0}"; }
"""
PYTHON = f"""#!/usr/bin/env bash
{PRETEND}
echo "$*" >>"$CALLS"
case "$*" in
  *write_report.py*) exec {sys.executable} "$@" ;;
  *provenance.describe*)
    echo '{{"device": {{"gpu": {{"name": "Imagined"}}}}, "versions": {{}}}}' >"${{@: -1}}" ;;
  *find_spec*) echo /nowhere ;;
  *capability*) echo 90 ;;
  *--verify*)
    echo '{{"complete": false, "results": []}}' >"$5"
    pretend verify ;;
  "-m pytest "*) echo '... [ 50%]'; pretend tests ;;
  "-m vispruner_cuda") pretend probe ;;
  *stress.py*) echo '{{"repeats": {{}}, "differed": []}}'; pretend stress ;;
  *operators.gpu*) echo '{{}}' >"${{@: -1}}/kernels.json"; pretend benchmarks ;;
  *sanitize.py*) pretend sanitize ;;
esac
"""
CMAKE = f"""#!/usr/bin/env bash
{PRETEND}
mkdir -p build/gpu_check
touch build/gpu_check/libvispruner.so
pretend build
"""
SANITIZER = """#!/usr/bin/env bash
echo "sanitizer $*" >>"$CALLS"
case "$*" in *sanitizer_probe*) sleep "${SLEEP_faulty:-0}"; exit "${STATUS_faulty:-9}" ;; esac
while [[ "$1" == --* ]]; do shift 2; done
"$@" || exit 9
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with the scripts, and the fake programs in bin/."""
    for name in ("benchmarks/verify", "vispruner_cuda", "bin"):
        (tmp_path / name).mkdir(parents=True)
    for script in ("gpu_check.sh", "verify/write_report.py"):
        shutil.copy(BENCHMARKS / script, tmp_path / "benchmarks" / script)
    programs = {
        "python": PYTHON,
        "cmake": CMAKE,
        "nvcc": "#!/bin/sh\n",
        "compute-sanitizer": SANITIZER,
    }
    for name, text in programs.items():
        program = tmp_path / "bin" / name
        program.write_text(text)
        program.chmod(0o755)
    return tmp_path


def _trappable() -> None:
    """A shell cannot trap signals ignored at its start: SIGHUP under nohup, SIGINT after `&`."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def begin(
    tree: Path, *, arguments: Sequence[str] | None = None, **variables: object
) -> subprocess.Popen[str]:
    """Starts the script in `tree`; its argument is the absolute path of out/ by default."""
    own = {
        "PATH": f"{tree / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(tree / "bin" / "python"),
        "CALLS": str(tree / "calls"),
        "TMPDIR": str(tree),
        **{name: str(value) for name, value in variables.items()},
    }
    return subprocess.Popen(
        [
            "bash",
            str(tree / "benchmarks" / "gpu_check.sh"),
            *([str(tree / "out")] if arguments is None else arguments),
        ],
        cwd=tree.parent,
        env={**{k: v for k, v in os.environ.items() if k != "DRY_RUN"}, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_trappable,
    )


def run(tree: Path, **variables: object) -> tuple[int, str, dict[str, Any]]:
    """Exit status, output and report."""
    process = begin(tree, **variables)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output, report(tree)


def report(tree: Path) -> Any:
    return json.loads((tree / "out" / "gpu_verified.json").read_text())


def logs(tree: Path) -> set[str]:
    with tarfile.open(tree / "out" / "gpu_check_logs.tar.gz") as archive:
        return {Path(name).name for name in archive.getnames()}


def test_clean_run(tree: Path) -> None:
    status, output, found = run(tree)
    assert status == 0, output
    assert found["clean"]
    assert found["device"] == "Imagined"
    assert all(tool["status"] == 0 for tool in found["sanitizers"].values())
    assert all(step["status"] == 0 for step in found["steps"].values())
    files = sorted(file.name for file in (tree / "out").rglob("*"))
    assert files == [
        "gpu_check_logs.tar.gz",
        "gpu_verified.json",
        "kernels.json",
        "vispruner_verify.json",
    ]
    assert {"build.log", "memcheck.log", "tests.status", "benchmarks.seconds"} <= logs(tree)
    assert not list(tree.glob("tmp.*"))


def test_the_report_is_written_before_the_benchmarks(tree: Path) -> None:
    calls = run(tree) and (tree / "calls").read_text().splitlines()
    benchmarks = next(i for i, call in enumerate(calls) if "operators.gpu" in call)
    assert sum("write_report.py" in call for call in calls[:benchmarks]) >= 10
    assert any("write_report.py" in call for call in calls[benchmarks:])


def test_sanitizers_check_only_kernels_of_this_library(tree: Path) -> None:
    run(tree)
    calls = [c for c in (tree / "calls").read_text().splitlines() if c.startswith("sanitizer ")]
    assert len(calls) == 5
    assert all("--kernel-name kns=vispruner " in call for call in calls)
    ports = [call.split("--port ")[1].split()[0] for call in calls if "--port" in call]
    assert len(set(ports)) == len(ports) == 3  # the fourth tool has the default, 49152
    assert all(int(port) % 20 == 12 for port in ports)
    (memcheck,) = [call for call in calls if "memcheck" in call and "sanitize.py" in call]
    assert "--report-api-errors no" in memcheck


@pytest.mark.parametrize("missing", [True, False])
def test_sanitizers_that_are_missing_or_do_not_work(tree: Path, missing: bool) -> None:
    if missing:
        (tree / "bin" / "compute-sanitizer").unlink()
        if shutil.which("compute-sanitizer"):
            pytest.skip("this machine has a compute-sanitizer")
    status, output, found = run(tree, STATUS_faulty=0)
    assert status == 0, output
    assert found["clean"]
    memcheck = found["sanitizers"]["memcheck"]
    assert memcheck["status"] == "unavailable"
    assert ("there is no" if missing else "does not find the fault") in memcheck["summary"]


def test_a_sanitizer_that_does_not_answer_leaves_no_clean_run(tree: Path) -> None:
    """It is not known to be unavailable."""
    status, output, found = run(tree, SLEEP_faulty=100, TIME_LIMIT=20)
    assert status == 1, output
    assert found["sanitizers"]["memcheck"]["status"] == 124
    assert not found["clean"]


@pytest.mark.parametrize("step", ["probe", "verify", "tests", "stress", "sanitize"])
def test_a_step_that_fails(tree: Path, step: str) -> None:
    status, output, found = run(tree, **{f"STATUS_{step}": 3})
    assert status == 1, output
    assert not found["clean"]
    assert found["steps"]["benchmarks"]["status"] == 0  # the other steps still run


def test_a_build_that_fails_ends_it(tree: Path) -> None:
    status, _, found = run(tree, STATUS_build=1)
    assert status == 1
    assert not found["clean"]
    assert found["steps"]["tests"]["status"] is None


def test_benchmarks_that_fail_do_not_count(tree: Path) -> None:
    status, _, found = run(tree, STATUS_benchmarks=1)
    assert status == 0
    assert found["clean"]


def test_the_time_limit(tree: Path) -> None:
    """A step gets the remaining time, later steps do not start, and the report is in time."""
    start = time.monotonic()
    status, _, found = run(tree, TIME_LIMIT=16, SLEEP_tests=100)
    assert time.monotonic() - start < 16
    assert status == 1
    assert found["steps"]["tests"]["status"] == 124
    assert found["tests"]["passed"] == 3
    assert found["steps"]["stress"]["status"] == "not run"
    assert found["steps"]["benchmarks"]["status"] == "not run"


def test_benchmarks_that_take_too_long_leave_a_clean_run(tree: Path) -> None:
    status, _, found = run(tree, TIME_LIMIT=16, SLEEP_benchmarks=100)
    assert status == 0
    assert found["clean"]
    assert found["steps"]["benchmarks"]["status"] == 124
    assert (tree / "out" / "kernels.json").exists()


def wait_for(tree: Path, call: str) -> None:
    for _ in range(300):
        if (tree / "calls").exists() and call in (tree / "calls").read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"{call} was not called")


def children(tree: Path) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if str(tree / "bin") in line]


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_an_interrupted_run_leaves_its_results(
    tree: Path, sent: signal.Signals, status: int
) -> None:
    process = begin(tree, SLEEP_tests=100, SLEEP_sanitize=100)
    wait_for(tree, "-m pytest ")
    start = time.monotonic()
    process.send_signal(sent)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - start < 5
    assert process.returncode == status, output
    found = report(tree)
    assert not found["clean"]
    assert found["steps"]["verify"]["status"] == 0
    assert found["steps"]["tests"]["status"] == "stopped"
    assert found["sanitizers"]["memcheck"]["status"] == "stopped"
    assert found["tests"]["passed"] == 3
    assert {"build.log", "tests.log", "verify.log"} <= logs(tree)
    assert len(list((tree / "out").iterdir())) == 3
    time.sleep(0.5)
    assert children(tree) == []


def test_a_killed_run_leaves_earlier_results(tree: Path) -> None:
    """Even if no trap can run."""
    process = begin(tree, SLEEP_tests=5)
    wait_for(tree, "-m pytest ")
    process.kill()
    process.wait()
    found = report(tree)
    assert found["steps"]["verify"]["status"] == 0
    assert found["steps"]["tests"]["status"] is None
    assert "verify.log" in logs(tree)


def test_a_report_of_an_earlier_run_is_not_read(tree: Path) -> None:
    (tree / "out").mkdir()
    (tree / "out" / "vispruner_verify.json").write_text('{"complete": true, "results": []}')
    _, _, found = run(tree, STATUS_build=1)
    assert found["verify"] is None


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["--nosuch"], {}, "unknown option --nosuch: "),
        (["-o"], {}, "unknown option -o: "),
        (["out", "more"], {}, "unexpected argument more: "),
        (["/dev/null/x"], {}, "cannot write to the output directory /dev/null/x: "),
        (["/proc"], {}, "cannot write to the output directory /proc: "),
        (["out"], {"TIME_LIMIT": "10min"}, "TIME_LIMIT must be a whole number of seconds "),
        (["out"], {"TIME_LIMIT": "-5"}, "TIME_LIMIT must be a whole number of seconds "),
        (["out"], {"TIME_LIMIT": "3"}, "TIME_LIMIT must be a whole number of seconds from 12 "),
        (["out"], {"DRY_RUN": "yes"}, "DRY_RUN must be 1 (on a CPU) or 0 (on a GPU), got yes"),
        (["out"], {"PYTHON": "nosuch"}, "PYTHON: there is no program nosuch: "),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(
    tree: Path, arguments: list[str], variables: dict[str, str], said: str
) -> None:
    process = begin(tree, arguments=arguments, **variables)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert output.startswith(f"gpu_check.sh: {said}")
    assert output.count("\n") == 1
    assert not (tree / "calls").exists()
    assert not list(tree.rglob("gpu_check_logs*"))


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_runs_nothing(tree: Path, option: str) -> None:
    process = begin(tree, arguments=[option])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "bash benchmarks/gpu_check.sh [OUTPUT_DIRECTORY]" in output
    assert "#" not in output
    assert "pipefail" not in output
    assert not (tree / "calls").exists()


def test_paths_are_relative_to_the_current_directory(tree: Path) -> None:
    python = f"{tree.name}/bin/python"
    process = begin(tree, arguments=[f"{tree.name}/out"], PYTHON=python)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert report(tree)["clean"]


def test_a_dry_run_of_0_is_none(tree: Path) -> None:
    status, output, found = run(tree, DRY_RUN=0)
    assert status == 0, output
    assert found["clean"]


@pytest.mark.parametrize(
    ("gpu", "asked", "expected"),
    [(False, "", True), (True, "", False), (True, "0", False), (True, "1", True)],
)
def test_compiled_kernels_are_skipped_on_a_machine_with_a_gpu(
    gpu: bool, asked: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take most of the time in tests/ops."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(compiled_kernels.build(), "find_nvcc", lambda: None)
    monkeypatch.setenv("VISPRUNER_TEST_COMPILED_KERNELS", asked)
    assert (compiled_kernels.not_tested() is None) == expected
