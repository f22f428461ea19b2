"""The RoPE delta of a cache that was not pruned.

A model holds the RoPE delta of its latest prompt with pictures, for whatever cache it continues
with. A new picture after another cache would get wrong positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import releases
from ..models import Family
from .cache import layout_of

_ORIGIN = "_vispruner_origin"


@dataclass(frozen=True)
class _Origin:
    """An attribute of a cache that a prompt has filled since `apply`.

    Attributes:
        delta: (B, 1), the RoPE delta of the prompt; None for text.
    """

    delta: Tensor | None


class RopeDeltas:
    """Remembers the RoPE delta of each cache.

    Args:
        family: of the model.
    """

    def __init__(self, family: Family) -> None:
        self._family = family

    def note(self, call: Mapping[str, Any], cache: Any) -> None:
        """Notes the delta of a cache that a call has filled from its beginning."""
        if not self._family.has_grid_positions or cache is None or torch.compiler.is_compiling():
            return
        pictures = any(self._family.pixels_name(m, call) for m in self._family.encoders)
        text = not pictures and "input_ids" in call and not call.get("mm_encoder_outputs")
        setattr(cache, _ORIGIN, _Origin(None if text else self._family.rope_delta()))

    def noted(self, call: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """Runs an unpruned call, and notes it if it began without cached columns."""
        if not self._family.has_grid_positions:
            return run()
        cache = call.get("cache")
        begins = not releases.cached_columns(cache)
        output = run()
        if begins:
            self.note(call, releases.cache_in(output) if cache is None else cache)
        return output

    def of(self, cache: Any, ids: Tensor, mask: Tensor | None, *, whole: bool) -> Tensor | None:
        """(B, 1), the RoPE delta of a cache that was not pruned; None without one.

        Args:
            cache: or None; ids: (B, L) input_ids; mask: (B, M) attention mask of the call.
            whole: input_ids may include the cached part (generate).

        Raises:
            ValueError: it is not known.
        """
        current = self._family.rope_delta()
        cached = releases.cached_columns(cache)
        if current is None or not cached or layout_of(cache) is not None:
            return None
        origin: _Origin | None = getattr(cache, _ORIGIN, None)
        if origin is not None:
            delta = origin.delta
            if delta is None or len(ids) % len(delta) == 0:
                return None if delta is None else delta.repeat_interleave(len(ids) // len(delta), 0)
        elif whole and (mask is None or mask.shape[1] == ids.shape[1]):
            old = ids[:, :cached]
            tokens = [self._family.token_id(modality) for modality in self._family.encoders]
            if not any(bool((old == token).any()) for token in tokens):
                return None
        raise ValueError(
            "the RoPE delta of this cache is unknown, so the positions of its tokens are: fill it "
            "after vispruner.apply, or start a new conversation"
        )
