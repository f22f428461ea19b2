"""The provenance of results files."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
from pathlib import Path

import pytest

from vispruner_cuda import _library

ROOT = Path(__file__).resolve().parents[2]


def test_without_git_the_sources_have_the_same_hash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    provenance = importlib.import_module("provenance")
    with_git = provenance.tree_hash(ROOT / "csrc")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("git") is None
    described = provenance.describe()
    assert described["commit"] is None
    assert described["csrc_tree"] == with_git


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    provenance = importlib.import_module("provenance")
    info = dataclasses.replace(_library.load(), sources="0123456789ab")
    monkeypatch.setattr(_library, "load", lambda: info)
    with pytest.raises(RuntimeError, match=r"built from sources 0123456789ab, and \S+/csrc has"):
        provenance.describe()
