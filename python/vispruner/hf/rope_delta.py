"""The RoPE delta of a cache whose prompt was not pruned.

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


def noted(family: Family, call: Mapping[str, Any], run: Callable[[], Any]) -> Any:
    """Runs an unpruned call, and notes the RoPE delta of the cache that it fills."""
    if not family.has_grid_positions or torch.compiler.is_compiling():
        return run()
    cache = call.get("cache")
    held = releases.cached_columns(cache)
    try:
        output = run()
    except BaseException:  # such as a streamer that stops
        if releases.cached_columns(cache) > held:
            _note(family, call, cache, begins=not held)
        raise
    filled = releases.cache_in(output) if cache is None else cache
    if filled is not None:
        _note(family, call, filled, begins=not held)
    return output


def _note(family: Family, call: Mapping[str, Any], cache: Any, *, begins: bool) -> None:
    pictures = any(family.pixels_name(modality, call) for modality in family.encoders)
    text = not pictures and "input_ids" in call and not call.get("mm_encoder_outputs")
    if begins:
        setattr(cache, _ORIGIN, _Origin(None if text else family.rope_delta()))
    elif hasattr(cache, _ORIGIN) and not text:
        delattr(cache, _ORIGIN)  # pictures after what it knows


def of_cache(
    family: Family, cache: Any, ids: Tensor, mask: Tensor | None, *, whole: bool
) -> Tensor | None:
    """(B, 1), the RoPE delta of a cache that was not pruned; None without one.

    Args:
        cache: or None; ids: (B, L) input_ids; mask: (B, M) attention mask of the call.
        whole: input_ids may include the cached part (generate).

    Raises:
        ValueError: it is not known.
    """
    cached = releases.cached_columns(cache)
    if family.rope_delta() is None or not cached or layout_of(cache) is not None:
        return None
    origin: _Origin | None = getattr(cache, _ORIGIN, None)
    if origin is not None:
        delta = origin.delta
        if delta is None:
            return None
        if len(ids) % len(delta) == 0:
            return delta.repeat_interleave(len(ids) // len(delta), 0)
    elif whole and (mask is None or mask.shape[1] == ids.shape[1]):
        old = ids[:, :cached]
        tokens = [family.token_id(modality) for modality in family.encoders]
        if not any(bool((old == token).any()) for token in tokens):
            return None
    raise ValueError(
        "the RoPE delta of this cache is unknown, so the positions of its tokens are: fill it "
        "after vispruner.apply, or start a new conversation"
    )
