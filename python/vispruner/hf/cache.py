"""Stores the layout of a pruned prompt on its cache.

The layout is an attribute of the cache, so a deep copy has it as well, and operations that change
the rows of the cache also change the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import releases
from .layout import Layout

_ATTRIBUTE = "_vispruner_layout"
_ROW_OPERATIONS = ("batch_repeat_interleave", "batch_select_indices", "reorder_cache", "reset")


class _RowOperation:
    """A method of a cache that also applies to the layout."""

    def __init__(self, cache: Any, name: str) -> None:
        self._cache, self._name = cache, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = getattr(type(self._cache), self._name)(self._cache, *args, **kwargs)
        layout = layout_of(self._cache)
        if layout is None:
            return result
        if self._name == "reset":
            forget(self._cache)
            return result
        (argument,) = (*args, *kwargs.values())
        repeats = self._name == "batch_repeat_interleave"
        changed = layout.repeat(int(argument)) if repeats else layout.select(argument)
        setattr(self._cache, _ATTRIBUTE, changed)
        return result


def layout_of(cache: Any) -> Layout | None:
    """The layout of the prompt in a cache, None if the prompt was not pruned."""
    return getattr(cache, _ATTRIBUTE, None)


def remember(cache: Any, layout: Layout) -> None:
    """Stores the layout of the prompt whose beginning a cache holds."""
    setattr(cache, _ATTRIBUTE, layout)
    for name in _ROW_OPERATIONS:
        if hasattr(type(cache), name):
            setattr(cache, name, _RowOperation(cache, name))


@contextmanager
def remembered_if_interrupted(cache: Any, layout: Layout | None) -> Iterator[None]:
    """Stores the layout if the block raises an exception after it has filled the cache."""
    if layout is None:  # a decoding step, which must not wait for the length of a static cache
        yield
        return
    held = releases.cached_columns(cache)
    try:
        yield
    except BaseException:  # such as a streamer that stops, or Ctrl-C
        if releases.cached_columns(cache) > held:
            remember(cache, layout)
        raise


def forget(cache: Any) -> None:
    """Removes the layout, which makes the cache an ordinary one."""
    if layout_of(cache) is not None:
        delattr(cache, _ATTRIBUTE)
