"""The installed library, and tools to inspect it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vispruner_cuda import _library


@pytest.fixture(scope="session")
def library() -> Path:
    return _library.PATH


@pytest.fixture(scope="session")
def build() -> _library.BuildInfo:
    return _library.load()


@pytest.fixture(scope="session")
def cuda_build(build: _library.BuildInfo) -> _library.BuildInfo:
    """For tests of the CUDA code: skips them only if there was no compiler to build it."""
    if not build.cuda:
        if os.environ.get("CI") and shutil.which("nvcc"):
            pytest.fail("there is an nvcc, but the library has no CUDA kernels")
        pytest.skip("the library was built without CUDA kernels")
    return build


@pytest.fixture(scope="session")
def tool() -> Callable[..., str]:
    """Runs a program and returns its output; CUDA's may come from the toolkit or from PyPI."""

    def run(name: str, *arguments: object) -> str:
        program = shutil.which(name)
        if program is None:
            try:
                import nvidia
            except ImportError:
                nvidia = None
            packages = nvidia.__path__ if nvidia else []
            found = [path for root in packages for path in Path(root).glob(f"*/bin/{name}")]
            program = str(found[0]) if found else None
        if program is None:
            message = f"{name} is not installed (pip install '.[test]')"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        command = [program, *map(str, arguments)]
        # PyPI's cuobjdump looks for nvdisasm on the PATH; they lie side by side.
        path = os.pathsep.join([str(Path(program).parent), os.environ["PATH"]])
        done = subprocess.run(
            command,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
        )
        return done.stdout + done.stderr

    return run
