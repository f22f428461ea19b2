"""The layout of a pruned prompt, kept on the cache that holds it.

It is an attribute of the cache, so a deep copy of the cache has it, and it follows the operations
of the cache that change its rows.
"""

from __future__ import annotations

from typing import Any

from .layout import Layout

_ATTRIBUTE = "_vispruner_layout"
_ROW_OPERATIONS = ("batch_repeat_interleave", "batch_select_indices", "reorder_cache", "reset")


class _RowOperation:
    """A method of a cache that does the same to the layout."""

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
    """What a pruner noted about the prompt in a cache, None if it was not pruned."""
    return getattr(cache, _ATTRIBUTE, None)


def remember(cache: Any, layout: Layout) -> None:
    """Notes the layout of the prompt that a cache holds the beginning of."""
    setattr(cache, _ATTRIBUTE, layout)
    for name in _ROW_OPERATIONS:
        if hasattr(type(cache), name):
            setattr(cache, name, _RowOperation(cache, name))


def forget(cache: Any) -> None:
    """The cache is an ordinary one from here on."""
    if layout_of(cache) is not None:
        delattr(cache, _ATTRIBUTE)
