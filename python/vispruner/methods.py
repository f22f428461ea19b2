"""Temporary replacements of methods of one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_METADATA = ("__name__", "__qualname__", "__doc__", "__module__")


class Replacement:
    """Replaces one method of one object: same signature, different body.

    It is an object and not a closure, so that a deep copy of the owner calls into the copy, and the
    owner can be pickled.

    Args:
        owner, name: the method to replace.
        body: called instead.
    """

    def __init__(self, owner: Any, name: str, body: Callable[..., Any]) -> None:
        self._owner, self._name, self._body = owner, name, body
        self._was_own = name in vars(owner)
        self._active = True
        self.__wrapped__ = getattr(owner, name)  # inspect.signature follows it
        for attribute in _METADATA:
            if hasattr(self.__wrapped__, attribute):
                setattr(self, attribute, getattr(self.__wrapped__, attribute))
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        body = self._body if self._active else self.__wrapped__
        return body(*args, **kwargs)

    def remove(self) -> None:
        """Restores the owner. If this object has been wrapped since, it only forwards calls."""
        self._active = False
        if vars(self._owner).get(self._name) is not self:
            return
        if self._was_own:
            setattr(self._owner, self._name, self.__wrapped__)
        else:
            delattr(self._owner, self._name)
