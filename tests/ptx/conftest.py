"""The executor, built incrementally into build/ptx."""

from __future__ import annotations

from pathlib import Path

import pytest
from ptx import build
from ptx.programs import Runner

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "ptx"


@pytest.fixture(scope="session")
def executor_path() -> Path:
    return build.build_executor(BUILD)


@pytest.fixture(scope="session")
def executor(executor_path: Path):
    """The module ptx_executor."""
    return build.load(executor_path)


@pytest.fixture
def runner(executor) -> Runner:
    executor.set_device()
    return Runner(executor)
