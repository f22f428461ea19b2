"""The description for the package index is the README, with absolute links if a URL is set."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import shutil
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
URL = "https://example.org/project"
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture
def readme(monkeypatch, tmp_path):
    """Calls `readme` of setup.py in a tree with this repository URL."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("README.md", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    project = (ROOT / "pyproject.toml").read_text()
    project = re.sub(r"^Repository = .*\n", "", project, flags=re.MULTILINE)
    head = "[project.urls]\n"
    assert head in project

    def call(repository: str | None) -> str:
        line = "" if repository is None else f'Repository = "{repository}"\n'
        (tmp_path / "pyproject.toml").write_text(project.replace(head, head + line))
        return runpy.run_path(str(tmp_path / "setup.py"))["readme"]()

    return call


def test_links_are_unchanged_without_a_url(readme):
    assert readme(None) == (ROOT / "README.md").read_text()


@pytest.mark.parametrize("repository", [URL, f"{URL}/"])
def test_links_are_absolute_with_a_url(readme, repository):
    before = LINK.findall((ROOT / "README.md").read_text())
    after = LINK.findall(readme(repository))
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        if old.startswith(("https://", "#")):
            assert new == old
        else:
            view = "raw" if old.endswith(".webp") else "blob"
            assert new == f"{URL}/{view}/HEAD/{old}"
    assert any("/raw/" in link for link in after)
    assert any("/blob/" in link for link in after)


def test_the_installed_description():
    metadata = importlib.metadata.metadata("vispruner-cuda")
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload() or metadata["Description"]
    assert text.strip().startswith("# vispruner_cuda\n")
