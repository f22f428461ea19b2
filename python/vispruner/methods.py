"""Temporary replacements of methods of one object."""

from __future__ import annotations

import inspect
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

    Attributes:
        original: the replaced method. Not named `__wrapped__`: libraries that remove wrappers, such
            as accelerate's `unwrap_model`, would remove this one.
    """

    def __init__(self, owner: Any, name: str, body: Callable[..., Any]) -> None:
        self._owner, self._name, self._body = owner, name, body
        self._was_own = name in vars(owner)
        self._active = True
        self.original: Callable[..., Any] = getattr(owner, name)
        for attribute in _METADATA:
            if hasattr(self.original, attribute):
                setattr(self, attribute, getattr(self.original, attribute))
        setattr(owner, name, self)

    @property
    def __signature__(self) -> inspect.Signature:  # of an instance
        return inspect.signature(self.original)

    @property
    def __code__(self) -> Any:  # without it, torch.export fails before `body` can refuse
        return type(self).__call__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self._owner:  # accelerate's unwrap_model binds it to the model
            args = args[1:]
        body = self._body if self._active else self.original
        return body(*args, **kwargs)

    def remove(self) -> None:
        """Restores the owner. If this object has been wrapped since, it only forwards calls."""
        self._active = False
        if vars(self._owner).get(self._name) is not self:
            return
        if self._was_own:
            setattr(self._owner, self._name, self.original)
        else:
            delattr(self._owner, self._name)
