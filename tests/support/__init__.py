"""Shared by several test directories: test problems, and implementations."""

from __future__ import annotations

import os
from pathlib import Path

import vispruner_cuda

TESTS = Path(__file__).resolve().parents[1]


def environment(**variables: str) -> dict[str, str]:
    """For a child interpreter that needs these tests and the package under test."""
    path = [str(TESTS), str(Path(vispruner_cuda.__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}
