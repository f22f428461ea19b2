"""Writes the tables into docs/ and into the model card, and draws the plots.

A table lies between `<!-- accuracy:NAME -->` and `<!-- /accuracy -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

import provenance

from vispruner import embedded

from . import plots
from .recipe import Recipe
from .results import Results, load_analyses
from .tables import Tables

DOCS = provenance.ROOT / "docs"
_BLOCK = re.compile(r"(<!-- accuracy:(?P<name>[\w-]+) -->\n).*?(<!-- /accuracy -->)", re.DOTALL)


def documents() -> list[Path]:
    """Every file that may have a table."""
    root = provenance.ROOT
    return [root / "README.md", *sorted(DOCS.glob("*.md")), Path(embedded.path()) / "README.md"]


def render(text: str, tables: Tables) -> str:
    """The text with every table made anew; KeyError for a table that nobody makes."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables.makers[match['name']]()}\n{match[3]}"

    return _BLOCK.sub(table, text)


def report(recipe: Recipe, name: str, *, check: bool = False) -> int:
    """Rewrites what is out of date, or with `check` only says so; 1 if something is then."""
    results, analyses = Results.load(name), load_analyses(name)
    tables = Tables(recipe, results, analyses)
    stale = []
    for path in documents():
        old = path.read_text()
        new = render(old, tables)
        if new != old:
            stale.append(path)
            if not check:
                path.write_text(new)
    for path in stale:
        print(f"{path}: {'out of date' if check else 'written'}")
    if check:
        return 1 if stale else 0
    for path in plots.draw_all(recipe, results, analyses, DOCS):
        print(path)
    return 0
