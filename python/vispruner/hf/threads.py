"""State of one call, separate for each thread and each nested call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerThread(Generic[T]):
    """A separate value per thread, None until it is set.

    Copies, and objects loaded from a pickle, start empty.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def value(self) -> T | None:
        return getattr(self._local, "value", None)

    @value.setter
    def value(self, value: T | None) -> None:
        self._local.value = value

    @contextmanager
    def set(self, value: T | None) -> Iterator[None]:
        """Sets the value inside the block, and restores it afterwards."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread[T]:
        return PerThread()

    def __reduce__(self) -> tuple[Any, ...]:
        return PerThread, ()
