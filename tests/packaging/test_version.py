"""The version is written in one place."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import vispruner_cuda
from vispruner_cuda import _library

ROOT = Path(__file__).resolve().parents[2]


def test_one_version_everywhere():
    assert importlib.metadata.version("vispruner-cuda") == vispruner_cuda.__version__
    assert _library.load().version == vispruner_cuda.__version__


def test_written_in_one_place():
    version = f'"{vispruner_cuda.__version__}"'
    assert version in (ROOT / "vispruner_cuda" / "_version.py").read_text()
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "vispruner_cuda/__init__.py"):
        assert version not in (ROOT / name).read_text(), name
