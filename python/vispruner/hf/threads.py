"""State that belongs to one call: each thread has its own, and a call inside another its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerThread(Generic[T]):
    """A value that each thread has its own of, None until it is set.

    A copy, and what was pickled and loaded, begins empty.
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
        """Inside the block it is `value`, afterwards what it was before."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread[T]:
        return PerThread()

    def __reduce__(self) -> tuple[Any, ...]:
        return PerThread, ()
