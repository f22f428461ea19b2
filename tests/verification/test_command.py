"""`python -m vispruner_cuda --verify`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vispruner_cuda
from vispruner_cuda import __main__ as main_module
from vispruner_cuda import _library, plans
from vispruner_cuda.__main__ import DEFAULT_OUTPUT
from vispruner_cuda.verification import OPERATORS, Backend, cases, command, inputs, machine


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command_line = [sys.executable, "-m", "vispruner_cuda", *map(str, arguments)]
    return subprocess.run(command_line, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """One quick run on the CPU, and its directory."""
    directory = tmp_path_factory.mktemp("verify")
    return run("--verify", "--quick", "--device", "cpu", cwd=directory), directory


def test_quick_run(quick: tuple[Any, Path]) -> None:
    done, _ = quick
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    columns = ["reference", *(f"cpu {isa}" for isa in plans.choices()["cpu"] if isa != "auto")]
    assert lines[0] == f"vispruner_cuda {vispruner_cuda.__version__}, torch {torch.__version__}"
    assert lines[2].split() == " ".join(columns).split()
    for name in ("known answers", *OPERATORS):
        (line,) = [line for line in lines if line.startswith(name + " ")]
        assert line.count(" equal") == (
            len(columns) if name == "known answers" else len(columns) - 1
        )
    assert "DIFFER" not in done.stdout
    assert lines[-1] == "Report: vispruner_verify.json"


def test_a_line_for_each_backend_where_stderr_is_no_terminal(quick: tuple[Any, Path]) -> None:
    done, _ = quick
    lines = done.stderr.splitlines()
    assert len(lines) == len(plans.choices()["cpu"])  # the reference instead of "auto"
    assert all(" cases, " in line and "equal" in line for line in lines)
    assert "\r" not in done.stderr


def test_file_of_a_quick_run(quick: tuple[Any, Path]) -> None:
    _, directory = quick
    data = json.loads((directory / DEFAULT_OUTPUT).read_text())
    assert data["format"] == 1
    assert data["version"] == vispruner_cuda.__version__
    assert data["torch"] == torch.__version__
    assert data["library"] == str(_library.PATH)
    assert data["build"]["cpu_isa"] in data["build"]["cpu_isas"]
    assert data["problems"] == []
    assert data["complete"]
    assert data["equal"]
    assert data["quick"]
    assert data["date"].endswith("+00:00")
    assert set(data["platform"]) == {"system", "python", "processor", "cores"}
    assert data["results"][0]["backend"] == "reference"
    for result in data["results"][1:]:
        assert list(result["operators"]) == list(OPERATORS)
        for counts in result["operators"].values():
            assert counts["cases"] > 5
            assert counts["runs"] >= counts["cases"]
            assert counts["wrong_cases"] == 0
            assert counts["differences"] == []
            assert counts["seconds"] > 0
        assert result["known_answers"]["cases"] > 10
    assert data["seconds"] > data["reference_seconds"] > 0
    assert len(json.dumps(data)) < 20_000


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.json"
    arguments = ["--verify", "--quick", "--device", "cpu", "--json", "-o", str(output)]
    assert main_module.main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(output.read_text())


@pytest.mark.slow
def test_all_cases(tmp_path: Path) -> None:
    done = run("--verify", "-o", "all.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "all.json").read_text())
    assert sum(c["cases"] for c in data["results"][1]["operators"].values()) > 500


WRONG = {
    "topk": lambda r: r._replace(indices=r.indices.flip(-1)),
    "pairwise_cosine": lambda r: r + 0.25,
    "dedup": lambda r: r - 1,
    "prune": lambda r: r._replace(feats=-r.feats),
    "prune_varlen": lambda r: r._replace(indices=r.indices + 1),
    "cls_attention": lambda r: r * 1.01,
    "received_attention": lambda r: r * 1.01,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_wrong_operator(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 1, and the first difference in words and in the file."""
    right = getattr(vispruner_cuda, name)
    monkeypatch.setattr(vispruner_cuda, name, lambda *a, **k: WRONG[name](right(*a, **k)))
    output = tmp_path / "out.json"
    monkeypatch.setattr(command, "cases", lambda: cases([name]))
    assert main_module.main(["--verify", "--quick", "--device", "cpu", "-o", str(output)]) == 1
    captured = capsys.readouterr()
    (row,) = [line for line in captured.out.splitlines() if line.startswith(name + " ")]
    assert "DIFFER" in row
    assert "DIFFERS" in captured.err
    isa = plans.choices()["cpu"][1]
    assert f"cpu {isa} differs first in\n  {name}: " in captured.out
    assert f"cpu={isa}" in captured.out
    assert ": got " in captured.out
    assert "open an issue and attach this file" in captured.out
    data = json.loads(output.read_text())
    assert not data["equal"]
    assert data["complete"]
    assert data["results"][1]["operators"][name]["differences"][0]["case"]["operator"] == name


def test_an_operator_that_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **keywords: Any) -> Any:
        raise RuntimeError("vispruner: invalid argument")

    monkeypatch.setattr(vispruner_cuda, "dedup", broken)
    monkeypatch.setattr(command, "cases", lambda: cases(["dedup"]))
    arguments = ["--verify", "--quick", "--device", "cpu", "-o", str(tmp_path / "out.json")]
    assert main_module.main(arguments) == 1
    assert "  RuntimeError: vispruner: invalid argument\n" in capsys.readouterr().out


def test_an_interrupted_run_leaves_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of the backend that it was interrupted in, at most some seconds old."""

    def interrupted(*args: Any, **keywords: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(vispruner_cuda, "dedup", interrupted)
    monkeypatch.setattr(command, "cases", lambda: cases(["topk", "dedup"]))
    monkeypatch.setattr(command, "_SECONDS_BETWEEN_SAVES", -1.0)
    output = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        main_module.main(["--verify", "--quick", "--device", "cpu", "-o", str(output)])
    data = json.loads(output.read_text())
    assert not data["complete"]
    reference, cpu = data["results"]
    assert reference["equal"]
    assert not cpu["equal"]
    assert cpu["operators"]["topk"]["cases"] > 0
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def test_a_file_behind_a_link_and_one_that_is_no_regular_file(tmp_path: Path) -> None:
    link, target, pipe = (tmp_path / name for name in ("link", "target", "pipe"))
    target.write_text("old")
    link.symlink_to(target)
    command._save(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    command._save(pipe, {"b": 2})
    assert json.loads(os.read(reader, 100)) == {"b": 2}
    os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.parametrize("target", ["missing/out.json", ".", "/proc/out.json"])
def test_an_unwritable_path_is_refused_before_the_work(target: str, tmp_path: Path) -> None:
    done = run("--verify", "-o", target, cwd=tmp_path)
    assert done.returncode == 2
    assert f"error: cannot write {target}: " in done.stderr
    assert " cases" not in done.stderr
    assert done.stdout == ""


def test_a_full_disk_and_an_interruption() -> None:
    command = [sys.executable, "-m", "vispruner_cuda", "--verify", "--quick", "--device", "cpu"]
    full = subprocess.run([*command, "-o", "/dev/full"], capture_output=True, text=True)
    assert full.returncode == 1
    assert "vispruner_cuda: [Errno 28] No space left on device" in full.stderr
    assert "Traceback" not in full.stderr
    with subprocess.Popen(
        [*command, "-o", os.devnull],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell may have started the tests with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()  # it is at work
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in said


def test_the_check_of_the_path_changes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    assert command.unwritable(output) is None
    assert not output.exists()
    output.write_text("kept")
    assert command.unwritable(output) is None
    assert output.read_text() == "kept"


def test_unknown_device(tmp_path: Path) -> None:
    done = run("--verify", "--device", "cpu", "cuda:77", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: --device: no device 'cuda:77' to verify here, only cpu" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [["--quick"], ["--device", "cpu"], ["-o", "x.json"]])
def test_options_of_verify_alone(option: list[str], tmp_path: Path) -> None:
    done = run(*option, cwd=tmp_path)
    assert done.returncode == 2
    assert "is an option of --verify" in done.stderr


def test_help(tmp_path: Path) -> None:
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("--verify", "--device DEVICE", "--quick", "-o FILE", "vispruner_verify.json"):
        assert word in done.stdout


# ------------------------------------------------------------------------------- imagined GPUs
def imagined(*covered: str, state: int = _library.READY) -> dict[str, Any]:
    """A report of a machine with GPUs of compute capability 8.0, 9.0, ..."""
    return {
        "build": {"cuda_runtime_state": state},
        "devices": [
            {"index": i, "capability": f"{8 + i}.0", "covered_by": how}
            for i, how in enumerate(covered)
        ],
    }


def test_devices_of_a_machine() -> None:
    assert machine.device_names(imagined("code", "none", "PTX")) == ["cpu", "cuda:0", "cuda:2"]
    assert machine.device_names(imagined("code", state=_library.CPU_ONLY)) == ["cpu"]
    assert machine.device_names(imagined()) == ["cpu"]


def test_choice_of_devices() -> None:
    here = ["cpu", "cuda:0", "cuda:1"]
    choose = main_module._chosen_devices
    assert choose(None, here) == here
    assert choose(["cuda"], here) == ["cuda:0", "cuda:1"]
    assert choose(["cuda:1", "cpu", "cuda"], here) == ["cuda:1", "cpu", "cuda:0"]
    with pytest.raises(ValueError, match="no device 'cud' to verify here, only cpu, cuda:0"):
        choose(["cud"], here)


def test_backends_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {"cpu": ("auto", "portable", "avx2"), "gram": ("auto", "tiles_32")}
    monkeypatch.setattr(plans, "choices", lambda: choices)
    report = imagined("code", "code")
    found = machine.backends(machine.device_names(report), report)
    assert [backend.name for backend in found] == ["cpu portable", "cpu avx2", "cuda:0", "cuda:1"]
    assert found[1].fixed == {"cpu": "avx2", "gram": "auto"}
    assert found[2].fixed == {"cpu": "auto"}  # the stages of the GPU are tried in turn
    assert [backend.dependent_launches for backend in found[2:]] == [False, True]


def test_an_instruction_set_that_takes_no_effect_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    used = plans.choices()["cpu"][1]
    backend = Backend("cpu", machine.operators("cpu"), plans, {"cpu": used})
    assert machine.wrong_instruction_set(backend) is None
    monkeypatch.setattr(plans, "use", lambda **stages: contextlib.nullcontext())
    other = dataclasses.replace(backend, fixed={"cpu": "sse"})
    wrong = machine.wrong_instruction_set(other)
    assert wrong is not None
    assert wrong.startswith("the instruction set sse was forced, ")


def test_a_gpu_that_cannot_be_used_fails_unless_others_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {**main_module.report(), "problems": ["cuda:0 (Imagined): driver too old"]}
    monkeypatch.setattr(main_module, "report", lambda: data)
    monkeypatch.setattr(command, "cases", lambda: cases(["topk"]))
    arguments = ["--verify", "--quick", "-o", str(tmp_path / "out.json")]
    assert main_module.main(arguments) == 1
    assert main_module.main([*arguments, "--device", "cpu"]) == 0


def test_driver_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.driver_version() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    tool.chmod(0o755)
    assert command.driver_version() == "580.65.06"
    tool.write_text("#!/bin/sh\necho no driver\nexit 9\n")
    assert command.driver_version() is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal() -> None:
    stream = Terminal()
    progress = command.Progress(stream)
    progress.begin("cuda:0")
    progress.update(3, 500)
    assert stream.getvalue() == "\r\033[Kcuda:0: 3 of 500 cases"
    progress.update(4, 500)  # too soon to be shown
    assert "4 of 500" not in stream.getvalue()


def test_wide_tables_are_split() -> None:
    counts = {"cases": 3, "wrong_cases": 0, "skipped": 1}
    results = [
        {"backend": f"cuda:{i}", "operators": {"topk": counts}, "known_answers": counts}
        for i in range(8)
    ]
    table = command._table(results)  # type: ignore[arg-type]
    assert "3 equal, 1 skipped" in table
    assert table.splitlines()[0].split() == [f"cuda:{i}" for i in range(6)]
    assert "cuda:7" in table
    assert max(map(len, table.splitlines())) < 160


@pytest.mark.parametrize("layout", inputs.HEAD_LAYOUTS)
def test_moved_tensors_keep_strides_and_alignment(layout: str) -> None:
    x = inputs.laid_out(inputs.normal((2, 3, 5, 8), 1).half(), layout, 2)
    y = machine._moved(x, torch.device("meta"))
    assert (y.device.type, y.shape, y.stride()) == ("meta", x.shape, x.stride())
    assert y.storage_offset() % 8 == x.storage_offset() % 8
    kept = machine._moved(vispruner_cuda.TopkResult(x, x[:0]), torch.device("meta"))
    assert kept.scores.stride() == x.stride()
    assert kept.indices.shape == (0, 3, 5, 8)
