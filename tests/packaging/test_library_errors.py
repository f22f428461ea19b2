"""An unusable library gives a one-line error at import."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from vispruner_cuda import _environment, _library, plans

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the installed package, for damaging."""
    return shutil.copytree(Path(_library.__file__).parent, tmp_path / "vispruner_cuda")


def import_error(package: Path, before: str = "") -> str:
    """The message of the ImportError from importing a package."""
    program = f"""
import torch
{before}
try:
    import vispruner_cuda
except ImportError as error:
    assert error.__cause__ is None and error.__context__ is None
    print("ImportError:", error)
else:
    print("imported", vispruner_cuda.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        cwd=package.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    kind, _, message = line.partition(": ")
    assert kind == "ImportError", line
    return message


def test_missing_library(package):
    (package / "libvispruner.so").unlink()
    message = import_error(package)
    assert f"the compiled library {package / 'libvispruner.so'} is missing" in message
    assert "pip install ." in message


def test_library_of_another_machine(package):
    path = package / "libvispruner.so"
    data = bytearray(path.read_bytes())
    name, machine = ("x86_64", 62) if platform.machine() == "aarch64" else ("aarch64", 183)
    data[18:20] = machine.to_bytes(2, "little")
    path.write_bytes(data)
    message = import_error(package)
    assert f"built for {name}, and this machine is {platform.machine()}" in message


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs...", b"MZ" + bytes(100)])
def test_a_file_that_is_not_a_library(package, content):
    (package / "libvispruner.so").write_bytes(content)
    assert "it is not a Linux library" in import_error(package)


def test_truncated_library(package):
    path = package / "libvispruner.so"
    path.write_bytes(path.read_bytes()[:5000])
    assert "it is truncated" in import_error(package)


def test_library_that_does_not_link(package):
    path = package / "libvispruner.so"
    # A nonexistent torch function with a name of the same length.
    path.write_bytes(path.read_bytes().replace(b"torch_library_impl", b"torch_library_1mpl"))
    assert "undefined symbol: torch_library_1mpl" in import_error(package)


def test_old_torch(package):
    message = import_error(package, before="torch.__version__ = '2.9.1+cu128'")
    assert "needs torch >= 2.10, but this is torch 2.9.1+cu128" in message


def test_library_of_another_version(package):
    (package / "_version.py").write_text('__version__ = "99.0"\n')
    message = import_error(package)
    assert "vispruner_cuda 99.0 found a library of version" in message


def test_library_of_other_sources(package):
    """As in a clone after `git pull`."""
    csrc = shutil.copytree(ROOT / "csrc", package.parent / "csrc")
    (csrc / ".ops.cpp.swp").touch()
    (csrc / ".#ops.cpp").touch()
    program = [sys.executable, "-c", "import vispruner_cuda"]
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    subprocess.run(program, cwd=package.parent, env=environment, check=True)
    (csrc / "plan.cpp").write_text("// changed\n")
    message = import_error(package)
    assert f"was built from sources {_library.load().sources}, and {csrc} has " in message
    assert message.endswith(": run `pip install .` again")


@pytest.mark.parametrize(
    ("variable", "known"),
    [
        ("LAUNCH_PLAN", "LAUNCH"),
        ("CPUISA", "CPU_ISA"),
        ("CPU_IS", "CPU_ISA"),
        ("RANK", "RANK_PLAN"),
    ],
)
def test_misspelt_variable(info, monkeypatch, variable, known):
    monkeypatch.setenv(f"VISPRUNER_{variable}", "auto")
    with pytest.raises(
        ImportError,
        match=f"^vispruner_cuda: there is no variable VISPRUNER_{variable}, but "
        rf".*\bVISPRUNER_{known}\b.*: correct it or unset it$",
    ):
        _library._check(info)


def test_variables_of_others(info, monkeypatch):
    """Of the build, the tests, Kubernetes and other programs."""
    for variable in (
        *("CUDA", "CUDA_ARCHS", "NVCC", "TEST_COMPILED_KERNELS", "RANDOM_CASES", "PTX_TIMES"),
        *("PTX_BUILD", "PORT", "PORT_80_TCP", "SERVICE_HOST", "SERVICE_PORT_HTTP", "MODEL", "HOME"),
        *("CPU", "CPUS", "CPU_LIMIT", "ARCH", "ATTENTION", "CUDA_VERSION", "TORCH_VERSION"),
    ):
        monkeypatch.setenv(f"VISPRUNER_{variable}", "1")
    _library._check(info)


def test_every_variable_of_a_plan_is_known():
    known = {f"VISPRUNER_{name}" for name in _environment.RUN}
    assert set(plans.variables().values()) <= known
    sources = (ROOT / "csrc" / "plan.cpp").read_text()
    assert set(re.findall(r'"(VISPRUNER_\w+)"', sources)) == known


@pytest.fixture
def info() -> _library.BuildInfo:
    """A library with CUDA kernels that works with torch's CUDA."""
    return dataclasses.replace(
        _library.load(),
        cuda=True,
        cuda_version="13.0",
        cuda_archs="80+PTX 120+PTX",
        cuda_runtime_state=_library.READY,
    )


def test_kernels_that_cannot_find_the_stream(info, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    info = dataclasses.replace(info, cuda_runtime_state=_library.NO_CUDA_TORCH)
    with pytest.raises(ImportError, match="does not find its current-stream function"):
        _library._check(info)


@pytest.mark.parametrize(
    ("torch_cuda", "gpus", "state", "expected"),
    [
        ("13.0", 1, _library.CPU_ONLY, True),
        ("13.0", 0, _library.CPU_ONLY, False),
        ("13.0", 1, _library.READY, False),
        (None, 0, _library.CPU_ONLY, False),
        (None, 0, _library.NO_CUDA_TORCH, False),
    ],
)
def test_warning_if_a_gpu_is_not_used(info, monkeypatch, torch_cuda, gpus, state, expected):
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _library._check(dataclasses.replace(info, cuda_runtime_state=state))
    assert ["built without CUDA kernels" in str(w.message) for w in caught] == [True] * expected


def test_loaded_once():
    assert _library.load() is _library.load()
