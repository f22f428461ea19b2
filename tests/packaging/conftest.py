"""A copy of the sources, and an environment without a CUDA compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
IGNORED = (".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "tests", "benchmarks")


class Wheel(NamedTuple):
    path: Path
    log: str


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """A copy of the package's sources, without build outputs."""
    return shutil.copytree(
        ROOT, tmp_path_factory.mktemp("sources") / "tree", ignore=shutil.ignore_patterns(*IGNORED)
    )


@pytest.fixture(scope="session")
def without_nvcc(tmp_path_factory) -> dict[str, str]:
    """Environment variables that hide this machine's nvcc."""
    directory = tmp_path_factory.mktemp("bin")
    for entry in os.environ["PATH"].split(os.pathsep):
        for program in Path(entry).glob("*") if entry else ():
            link = directory / program.name
            if program.name != "nvcc" and not link.is_symlink() and os.access(program, os.X_OK):
                link.symlink_to(program)
    hidden = ("CUDACXX", "CUDA_PATH", "VISPRUNER_CUDA", "VISPRUNER_CUDA_ARCHS")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    # A CUDA_HOME is searched instead of the usual places.
    return {
        **environment,
        "PATH": str(directory),
        "CUDA_HOME": str(tmp_path_factory.mktemp("no-cuda")),
    }


@pytest.fixture(scope="session")
def cpu_wheel(sources, without_nvcc, tmp_path_factory) -> Wheel:
    """The wheel from an isolated build without nvcc."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", out, sources]
    done = subprocess.run(
        command,
        env=without_nvcc,
        cwd=out,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return Wheel(next(out.glob("*.whl")), done.stdout)
