"""Measurements on disk: a line of JSON each, written before the next one begins.

A killed process, or a full disk, loses at most the current measurement. The next run continues
after the last complete line.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from .measuring import Measurement


class Records:
    """The measurements of a file, by key.

    Args:
        path: of the JSON lines file, which is created if missing. An incomplete last line, from a
            killed process, is removed.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: a line is not a measurement.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, Measurement] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        try:
            for line in content[:whole].splitlines():
                entry = json.loads(line)
                key = entry.pop("key")
                self._found[key] = Measurement(**entry)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: line {len(self._found) + 1} is not a measurement: move the file away"
            ) from error
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._end = whole
        os.ftruncate(self._file, whole)

    def get(self, key: str) -> Measurement | None:
        return self._found.get(key)

    def add(self, key: str, measurement: Measurement) -> None:
        """Stores a measurement durably. If an error is raised, the file is as before.

        Raises:
            OSError: it cannot be written, for instance because the disk is full.
        """
        entry: dict[str, Any] = {"key": key, **measurement.data()}
        line = json.dumps(entry).encode() + b"\n"
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)
        self._found[key] = measurement

    def close(self) -> None:
        os.close(self._file)

    def __len__(self) -> int:
        return len(self._found)

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
