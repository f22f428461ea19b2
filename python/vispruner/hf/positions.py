"""Position ids of a shortened prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models import Family
from .layout import Layout
from .past import Past


def without_dropped(positions: Tensor, dropped: Tensor) -> Tensor:
    """Renumbers tokens within every run of consecutive positions.

    In an unmasked prompt, transformers treats a gap in the positions as the border of two packed
    sequences. So dropped tokens must not leave a gap, and existing borders must remain.

    Args:
        positions: (B, L) of the unpruned prompt; dropped: (B, L) bool.

    Returns:
        (B, L), meaningful for the remaining tokens only.
    """
    border = torch.diff(positions, dim=-1, prepend=positions[:, :1] - 1) != 1
    before = dropped.long().cumsum(1) - dropped.long()
    at_start = torch.where(border, before, 0).cummax(1).values
    return positions - (before - at_start)


def check_packing(call: Mapping[str, Any], layout: Layout) -> None:
    """Checks rows that pack several prompts, which are detected by position ids that restart.

    Raises:
        ValueError: the batch needs padding, whose mask would hide the borders of the prompts; or a
            prompt does not begin at 0, so that dropped tokens could join it to the previous one.
    """
    given: Tensor | None = call.get("position_ids")
    if given is None or call.get("attention_mask") is not None or call.get("cache") is not None:
        return
    text = given if given.dim() == 2 else given[0]
    if (
        given.dim() == 3 and given.shape[0] != 4
    ):  # time, height and width are not consecutive anyway
        return
    starts = text[:, 1:][torch.diff(text, dim=-1) != 1]
    if not starts.numel():
        return
    if bool(starts.any()):
        raise ValueError(
            "position_ids without attention_mask pack several prompts into a row, so each must "
            f"begin at 0, one begins at {int(starts[starts != 0][0])}: pass an attention_mask, or "
            "positions that begin at 0"
        )
    if layout.padded:
        raise ValueError(
            "position_ids pack several prompts into a row, and the rows of this batch differ in "
            "length once images are pruned: pass all prompts in one row"
        )


def _counted(given: Tensor, past: Past, new: Layout, dropped: Tensor, mask: Tensor) -> Tensor:
    """The caller's positions (B, L), renumbered without the dropped tokens."""
    own = past.new(given)
    if past.columns and not past.full_ids:
        own = own - _ahead(own, past, mask)
    elif past.columns:
        own = own - past.layout.dropped.unsqueeze(1)
    return new.take(without_dropped(own, dropped))


def _ahead(own: Tensor, past: Past, mask: Tensor) -> Tensor:
    """(B, 1): dropped tokens that the caller's positions of new tokens include.

    Raises:
        ValueError: the positions continue neither the prompt nor the cache.
    """
    dropped = past.layout.dropped.unsqueeze(1)
    held = past.mask.sum(1, keepdim=True)
    first = own.gather(1, mask.int().argmax(1, keepdim=True))
    of_cache, of_prompt = (first == held).all(), (first == held + dropped).all()
    if bool(of_cache):
        return torch.zeros_like(dropped)
    if bool(of_prompt):
        return dropped
    raise ValueError(
        f"position_ids continue at {first[:, 0].tolist()}, the prompt ended before "
        f"{(held + dropped)[:, 0].tolist()} and its cache before {held[:, 0].tolist()}: omit "
        "position_ids, or continue from one of them"
    )


def _columns(past: Past, count: int, filled: Tensor | None) -> Tensor | None:
    """(B, count): positions of new columns for a model that counts columns.

    They are those of the unpruned prompt less the dropped tokens before. So it does not matter
    whether a turn was read by `forward`, or by `generate`, which counts tokens by the mask.

    Args:
        filled: (B,) columns before the new tokens that pruning added.

    Returns:
        The positions; None if they are the numbers of the columns.
    """
    behind = past.layout.behind
    if behind is None and filled is None:
        return None
    rows, cached = past.mask.shape
    start = torch.full((rows,), cached, device=past.mask.device)
    for less in (behind, filled):
        start = start if less is None else start - less.to(start.device)
    return (start[:, None] + torch.arange(count, device=start.device)).clamp(min=0)


def step_positions(
    family: Family, call: Mapping[str, Any], past: Past, mask: Tensor
) -> Tensor | None:
    """Positions of new text after a pruned prompt, where the model would compute wrong ones.

    Args:
        call: the arguments; past: of its cache; mask: (B, S) bool of the new tokens.

    Returns:
        (4, B, S) for models with rows for time, height and width; (B, S) where the caller's
        positions are renumbered; None if no change is needed.
    """
    given: Tensor | None = call.get("position_ids")
    if given is None and not family.has_grid_positions:
        return _columns(past, mask.shape[1], None)
    start = past.next_position() if family.has_grid_positions else None
    if given is None and start is not None:
        held = past.mask.sum(1, keepdim=True)
        text = mask.long().cumsum(1) - 1
        places = (start.unsqueeze(1) + text).clamp(min=0)
        return torch.cat([(held + text).clamp(min=0)[None], places.expand(3, -1, -1)])
    if given is not None and given.dim() == 2 and not family.has_grid_positions:
        return given - _ahead(given, past, mask)
    return None


def shortened_positions(
    family: Family,
    call: Mapping[str, Any],
    past: Past,
    new: Layout,
    ids: Tensor,
    mask: Tensor,
    dropped: Tensor,
    *,
    left: bool,
    whole: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Position ids of the shortened prompt's new columns, and the position after them.

    For models with rows for time, height and width, an additional first row counts the remaining
    tokens: transformers treats a gap in it as the border of two packed sequences.

    Args:
        call: the caller's arguments, with those of the encoded pictures.
        ids, mask, dropped: (B, L) of the new columns of the unpruned prompt.
        left: whether pruning fills rows up at the left.
        whole: the model counts positions itself, by the mask (generate).
    """
    given: Tensor | None = call.get("position_ids")
    if given is not None and given.dim() == 2 and not family.has_grid_positions:
        return _counted(given, past, new, dropped, mask), None
    found = family.positions(ids, mask.long(), call)
    if found is None and given is not None:
        return new.take(past.new(given)), None
    if found is None:
        columns = None if whole else _columns(past, new.columns, new.behind if left else None)
        return None if columns is None else (columns, None)
    positions, following, rope_end = found
    start = past.next_position()
    if start is not None:
        positions = positions + start[None, :, None]
        following, rope_end = following + start, rope_end + start
    everything = torch.cat([past.mask, new.mask], 1)
    text = (everything.long().cumsum(1) - 1).masked_fill(~everything, 0)
    text = text[:, past.mask.shape[1] :]
    if given is not None:
        own = past.new(given)
        rows = own.expand(4, -1, -1) if own.dim() == 2 else own
        positions = rows[-3:]
        if rows.shape[0] == 4 and not past.columns:
            text = new.take(without_dropped(rows[0], dropped))
    family.set_rope_delta((rope_end - everything.sum(1)).unsqueeze(1))
    return torch.cat([text[None], new.take(positions)]), following
