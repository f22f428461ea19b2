"""`python -m vispruner_cuda`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import vispruner_cuda
from vispruner_cuda import __main__ as report
from vispruner_cuda import _library


def run(*arguments: str, cwd) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vispruner_cuda", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_text(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in (vispruner_cuda.__version__, torch.__version__, "reference, cpu", "CPU kernels"):
        assert word in done.stdout


def test_json(tmp_path):
    data = json.loads(run("--json", cwd=tmp_path).stdout)
    assert data["version"] == vispruner_cuda.__version__
    assert data["torch"] == torch.__version__
    assert data["build"]["cpu_isa"] in data["build"]["cpu_isas"]
    assert len(data["devices"]) == torch.cuda.device_count()


def test_help(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "--json" in done.stdout
    assert "exit status is 1" in " ".join(done.stdout.split())


def test_bad_option(tmp_path):
    assert run("--wrong", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("80+PTX 86 90 120+PTX", (8, 0), "code"),
        ("80+PTX 86 90 120+PTX", (8, 6), "code"),
        ("80+PTX 86 90 120+PTX", (8, 7), "code"),  # the code of 8.6
        ("80+PTX 86 90 120+PTX", (10, 0), "PTX"),  # the PTX of 8.0
        ("80+PTX 86 90 120+PTX", (12, 1), "code"),
        ("80+PTX 86 90 120+PTX", (13, 0), "PTX"),
        ("80+PTX 86 90 120+PTX", (7, 5), "none"),
        ("90a", (9, 0), "code"),
        ("100a", (10, 3), "none"),
        ("100f", (10, 3), "code"),
        ("90", (10, 0), "none"),
        ("90a+PTX", (10, 0), "none"),
        ("", (8, 0), "none"),
    ],
)
def test_coverage(archs, capability, expected):
    assert report.coverage(archs, *capability) == expected


@pytest.fixture
def gpu(monkeypatch):
    """A simulated GPU of compute capability 9.0; returns a setter for the library's state."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Imagined")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    real = _library.load()

    def imagine(state: int, archs: str, problem: str | None = None) -> None:
        info = dataclasses.replace(
            real, cuda=bool(archs), cuda_archs=archs, cuda_runtime_state=state
        )
        monkeypatch.setattr(_library, "load", lambda: info)
        monkeypatch.setattr(report, "probe", lambda device: problem)

    return imagine


def test_gpu_that_works(gpu, capsys):
    gpu(_library.READY, "80+PTX 90")
    assert report.main([]) == 0
    assert "cuda:0         Imagined, compute capability 9.0: machine code, works" in (
        capsys.readouterr().out
    )
    assert report.report()["backends"] == ["reference", "cpu", "cuda"]


@pytest.mark.parametrize(
    ("state", "archs", "problem", "message"),
    [
        (_library.CPU_ONLY, "", None, "the library was built without CUDA kernels"),
        (_library.READY, "100 120", None, "no kernels for compute capability 9.0"),
        (_library.READY, "80+PTX", "driver too old", "driver too old"),
    ],
)
def test_gpu_that_cannot_be_used(gpu, capsys, state, archs, problem, message):
    gpu(state, archs, problem)
    assert report.main([]) == 1
    captured = capsys.readouterr()
    assert "UNUSABLE" in captured.out
    assert f"vispruner_cuda: cuda:0 (Imagined): {message}" in captured.err


@pytest.mark.parametrize(
    ("summary", "said"),
    [("  CPU kernels:  portable\n  CUDA kernels: NONE: no nvcc found\n", "NONE: no nvcc found"),
     ("", "none (built without nvcc)"), (None, "none (built without nvcc)")],
)  # fmt: skip
def test_reason_for_no_kernels(gpu, capsys, monkeypatch, tmp_path, summary, said):
    gpu(_library.CPU_ONLY, "")
    monkeypatch.setattr(_library, "PATH", tmp_path / "libvispruner.so")
    if summary is not None:
        (tmp_path / "libvispruner.txt").write_text(summary)
    report.main([])
    assert f"\nCUDA kernels   {said}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("compiler", "torch_cuda", "warns"),
    [("13.0", "12.8", True), ("13.0", "13.0", False), ("12.8", "13.0", False), ("", "12.8", False),
     ("13.0", None, False)],
)  # fmt: skip
def test_compiler_newer_than_torch(compiler, torch_cuda, warns):
    warning = report.compiler_warning(compiler, torch_cuda)
    assert (warning is not None) == warns
    if warns:
        assert "compiled with CUDA 13.0 and torch with CUDA 12.8" in warning
        assert "a driver for CUDA 13; otherwise reinstall with the nvcc" in warning


def test_text_has_the_warning(gpu, capsys, monkeypatch):
    gpu(_library.READY, "80+PTX 90")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    info = dataclasses.replace(_library.load(), cuda_version="13.0")
    monkeypatch.setattr(_library, "load", lambda: info)
    assert report.main([]) == 0
    assert "need a driver for CUDA 13" in capsys.readouterr().out


def test_probe_on_the_cpu():
    assert report.probe(torch.device("cpu")) is None


def test_probe_says_what_went_wrong():
    assert "\n" not in (report.probe(torch.device("cuda", 99)) or "\n")
