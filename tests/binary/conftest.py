"""The installed library, and tools to inspect it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import machine_code

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
    """Runs a program and returns its output (support.machine_code.run)."""

    def run(name: str, *arguments: object) -> str:
        try:
            return machine_code.run(name, *arguments)
        except FileNotFoundError as missing:
            if os.environ.get("CI"):
                pytest.fail(str(missing))
            pytest.skip(str(missing))

    return run
