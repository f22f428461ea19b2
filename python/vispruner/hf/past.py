"""Splits a call into the columns that the cache holds and the new ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import releases
from .cache import layout_of
from .layout import Layout, whole_prompt


@dataclass(frozen=True)
class Past:
    """The part of a prompt that the cache holds.

    Attributes:
        layout: columns of the last shortened prompt, none for an empty cache.
        gap: columns after it, one token each.
        mask: (B, P) bool attention mask of the cache's columns.
        full_ids: input_ids include the cached part.
        mask_is_short: the caller's mask has the cache's columns, not those of the full prompt.
    """

    layout: Layout
    gap: int
    mask: Tensor
    full_ids: bool
    mask_is_short: bool

    @property
    def columns(self) -> int:
        """Columns of the unpruned conversation that the cache represents."""
        return self.layout.width + self.gap

    @classmethod
    def of(
        cls, cache: Any, ids: Tensor, mask: Tensor | None, *, whole: bool, rope_delta: Tensor | None
    ) -> Past:
        """Reads a cache.

        Args:
            cache: of transformers, or None.
            ids: (B, L) input_ids of the call; mask: (B, M) bool of its attention mask.
            whole: input_ids may include the cached part (generate), instead of new tokens only
                (forward).
            rope_delta: (B, 1), the RoPE delta of a cache that was not pruned, if the model has
                one.

        Raises:
            ValueError: input_ids or the mask do not match the cache.
        """
        batch, length = ids.shape
        cached = releases.cached_columns(cache)
        layout = layout_of(cache) if cached else None
        rows = (releases.cached_rows(cache) if cached else None) or batch
        if layout is not None and layout.rows != rows:
            raise ValueError(
                f"the cache has {rows} rows now and had {layout.rows} when its prompt was pruned: "
                "change its rows with its own methods (batch_repeat_interleave, "
                "batch_select_indices, reorder_cache), or start a new conversation"
            )
        if rows != batch:
            raise ValueError(f"the cache holds a batch of {rows}, input_ids one of {batch}")
        if layout is None:
            ones = torch.ones((batch, cached), dtype=torch.bool, device=ids.device)
            if mask is not None and mask.shape[1] >= cached:
                ones = mask[:, :cached]
            layout = whole_prompt(ones)
            if cached:
                following = ones.sum(1)
                if rope_delta is not None and len(rope_delta) == batch:
                    following = following + rope_delta.to(ids.device)[:, 0]
                layout = replace(layout, next_position=following)
        gap = cached - layout.columns
        if gap < 0:
            raise ValueError(
                f"the cache was cut to {cached} columns, inside its pruned prompt of "
                f"{layout.columns}: cut it after the prompt, or start a new conversation"
            )
        columns = layout.width + gap
        full = whole and (mask is None or mask.shape[1] == length)
        total = length if full else columns + length
        if full and cached and length <= columns:
            raise ValueError(
                f"input_ids have {length} columns, the cache holds the first {columns} of the "
                "prompt already: pass the whole conversation, or the new tokens and a mask of all"
            )
        short = mask is not None and mask.shape[1] == cached + length and not full
        if mask is not None and short and layout.padded and layout.columns == layout.width > 0:
            # The conversation is as wide as the cache, whose columns are in another order.
            # A mask of the conversation attends columns that are padding here.
            padding = ~layout.mask.to(mask.device)
            short = not bool((mask[:, : layout.columns] & padding).any())
        if mask is not None and mask.shape[1] != total and not short:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns, expected {total}: those of the "
                f"conversation so far ({columns}) and of the new tokens"
            )
        between = torch.ones((batch, gap), dtype=torch.bool, device=ids.device)
        if mask is None:
            past = torch.cat([layout.mask, between], 1)
        elif short:
            past = mask[:, :cached]
        else:
            past = layout.mask & layout.take(mask[:, : layout.width])
            past = torch.cat([past, mask[:, layout.width : columns]], 1)
        return cls(layout, gap, past, full, short)

    def new(self, x: Tensor) -> Tensor:
        """The new columns of a tensor shaped like input_ids."""
        return x[..., self.columns :] if self.full_ids else x

    def new_mask(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S) bool attention mask of the new columns."""
        if mask is None:
            return torch.ones_like(self.new(ids), dtype=torch.bool)
        return mask[:, mask.shape[1] - self.new(ids).shape[1] :]

    def old(self, x: Tensor) -> Tensor:
        """The columns of x that are cached; none if x does not include them."""
        return x[..., : self.columns] if self.full_ids else x[..., :0]

    def shorten(self, x: Tensor) -> Tensor:
        """(B, columns) to the cache's columns."""
        return torch.cat(
            [self.layout.take(x[:, : self.layout.width]), x[:, self.layout.width :]], 1
        )

    def next_position(self) -> Tensor | None:
        """(B,) position of the first new token, None where positions are consecutive."""
        if self.layout.next_position is None:
            return None
        return self.layout.next_position + self.mask[:, self.layout.columns :].sum(1)


@dataclass(frozen=True)
class SplitCall:
    """A call, split into cached and new columns.

    Attributes:
        call: arguments by their canonical names.
        whole: input_ids may include the cached part (generate).
        visual: modality to the arguments of its encoder.
        past: the cached part.
        ids, mask: (B, S) of the new columns, int64 and bool.
    """

    call: dict[str, Any]
    whole: bool
    visual: dict[str, dict[str, Any]]
    past: Past
    ids: Tensor
    mask: Tensor
