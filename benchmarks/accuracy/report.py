"""Tables and plots of the documentation, from the result files of a recipe."""

from __future__ import annotations

import provenance
import tables

from . import plots
from .recipe import Recipe
from .results import Results, load_analyses

DOCS = provenance.ROOT / "docs"


def report(recipe: Recipe, name: str) -> None:
    """Draws the plots, and updates all tables of the documentation."""
    for path in plots.draw_all(recipe, Results.load(name), load_analyses(name), DOCS):
        print(path)
    for path in tables.update(recipe=name):
        print(path)
