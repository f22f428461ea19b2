"""Markdown tables, and the documents that they are written into.

A generated part lies between `<!-- table:NAME -->` and `<!-- /table -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/*.md", "python/vispruner/embedded/model/README.md")

_BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


class ResultsError(ValueError):
    """A results file that is missing or that cannot be read; the message is one line."""


def read_json(path: Path) -> Any:
    """The content of a results file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(
            f"{path}: {error.strerror}: restore it, or run its benchmark again"
        ) from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ResultsError(
            f"{path}: not JSON ({error}): restore it, or run its benchmark again"
        ) from error


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: first column left-aligned, the others right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def paths(root: Path = ROOT) -> Iterator[Path]:
    """Every document that may have generated parts."""
    for pattern in DOCUMENTS:
        yield from sorted(root.glob(pattern))


def render(text: str, part: Callable[[str], str]) -> str:
    """The text with every generated part replaced by `part(NAME)`."""
    return _BLOCK.sub(lambda match: f"{match[1]}\n{part(match['name'])}\n{match[3]}", text)
