"""Pictures and questions, with answers where the data have them."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
QUESTION = "Describe the image in one sentence."


class DataError(ValueError):
    """The data cannot be read; the message is one line that names the file."""


@dataclass(frozen=True)
class Item:
    """A question about a picture.

    Attributes:
        name: of the picture, for people.
        source: its file, or the bytes of one.
        question: the text that the model is asked.
        answer: the right answer, None if it is unknown.
    """

    name: str
    source: Path | bytes
    question: str
    answer: str | None = None

    @functools.cached_property
    def picture(self) -> str:
        """Hash of the picture's content, or of its path if it cannot be read."""
        content = self.source
        if isinstance(content, Path):
            try:
                content = content.read_bytes()
            except (OSError, ValueError):  # ValueError: a NUL, or no UTF-8
                content = os.fsencode(content)
        return hashlib.sha256(content).hexdigest()[:16]


def read(source: str | None, question: str | None, limit: int | None = None) -> Iterator[Item]:
    """Items of a source.

    Args:
        source: a JSON lines file whose objects have `image` (a path, relative to the file),
            `question` and optionally `answer`; a directory of pictures; the name of a Hugging Face
            dataset with these columns, NAME[[:CONFIGURATION]:SPLIT] ("test" by default); None:
            drawn scenes (`vispruner.embedded.scenes`).
        question: for pictures without one.
        limit: number of items to read, None for all; scenes have no end, so 8 of them then.

    Raises:
        DataError: the source does not exist, or a line is invalid.
    """
    if source is None:
        yield from _scenes(limit or 8)
        return
    path = Path(source)
    if path.is_dir():
        items = _directory(path, question or QUESTION)
    elif path.is_file():
        items = _lines(path, question)
    elif importlib.util.find_spec("datasets") is not None:
        items = _dataset(source, question)
    else:
        raise DataError(
            f"{source} is not a file or directory; for a Hugging Face dataset, pip install datasets"
        )
    count = 0
    for item in items:
        if limit is not None and count == limit:
            return
        count += 1
        yield item
    if count == 0:
        raise DataError(f"{source} has no pictures")


def _directory(path: Path, question: str) -> Iterator[Item]:
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in SUFFIXES:
            yield Item(str(file.relative_to(path)), file, question)


def _lines(path: Path, question: str | None) -> Iterator[Item]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    # Not splitlines(): a JSON string may hold the other line separators of Unicode.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: no JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:  # very long numbers, very deep lists
            raise DataError(f"{where}: cannot read the JSON: {error}") from error
        if not isinstance(entry, dict) or not _is_text(entry.get("image")):
            raise DataError(f'{where}: expected an object with "image", a path')
        asked = entry.get("question", question)
        if not _is_text(asked) or not asked.strip():
            raise DataError(f'{where}: expected "question", a text (or --question for all)')
        answer = entry.get("answer")
        if answer is not None and not _is_text(answer):
            raise DataError(f'{where}: "answer" must be a text, got {answer!r}')
        yield Item(entry["image"], path.parent / entry["image"], asked, answer)


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it is a str that can be encoded: JSON may have lone surrogates."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def _dataset(source: str, question: str | None) -> Iterator[Item]:
    import datasets  # type: ignore[import-not-found]

    name, *parts = source.split(":")
    if len(parts) > 2:
        raise DataError(f"expected NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT, got {source!r}")
    split = parts.pop() if parts else "test"
    try:
        rows: Any = datasets.load_dataset(name, *parts, split=split)
    except Exception as error:  # of the hub, of files, of formats
        raise DataError(
            f"cannot load the dataset {name}: {' '.join(str(error).split())}"
        ) from error
    for number, row in enumerate(rows):
        asked = row.get("question", question)
        if "image" not in row or not asked:
            raise DataError(
                f'{name}: expected the columns "image" and "question", got {", ".join(row)}'
            )
        content = io.BytesIO()
        row["image"].convert("RGB").save(content, "PNG")
        answer = row.get("answer")
        right = None if answer is None else str(answer)
        yield Item(f"{name} {number}", content.getvalue(), str(asked), right)


def _scenes(count: int) -> Iterator[Item]:
    from ..embedded import scenes

    for number in range(count):
        scene = scenes.draw(10_000 + number)
        content = io.BytesIO()
        scene.image.save(content, "PNG")
        for question, answer in scene.questions:
            yield Item(f"scene {number}", content.getvalue(), question, answer)
