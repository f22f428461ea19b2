"""What a cache holds of the conversation that the caller sees, and what of a call is new."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layout import Layout, identity


@dataclass(frozen=True)
class Past:
    """What the cache holds of a prompt.

    Attributes:
        layout: columns of the last shortened prompt, none for an empty cache.
        gap: columns after it, one token each.
        mask: (B, P) attention mask of the cache's columns.
        full_ids: input_ids begin with what the cache holds.
        mask_is_short: the caller's mask counts the cache's columns, not those of the prompt.
    """

    layout: Layout
    gap: int
    mask: Tensor
    full_ids: bool
    mask_is_short: bool

    @property
    def columns(self) -> int:
        """Columns of the unpruned conversation that the cache stands for."""
        return self.layout.width + self.gap

    @classmethod
    def of(
        cls,
        layout: Layout | None,
        cached: int,
        ids: Tensor,
        mask: Tensor | None,
        *,
        whole: bool,
        offset: Tensor | None,
    ) -> Past:
        batch, length = ids.shape
        if layout is None:
            ones = torch.ones((batch, cached), dtype=torch.bool, device=ids.device)
            if mask is not None and mask.shape[1] >= cached:
                ones = mask[:, :cached].bool()
            layout = identity(ones)
            if cached:
                following = ones.sum(1)
                if offset is not None and len(offset) == batch:
                    following = following + offset.to(ids.device)[:, 0]
                layout = replace(layout, next_position=following)
        if layout.index.shape[0] != batch:
            raise ValueError(
                f"the cache holds a batch of {layout.index.shape[0]}, input_ids one of {batch}"
            )
        gap = cached - layout.columns
        if gap < 0:
            raise ValueError(
                f"the cache was cut to {cached} columns, inside its pruned prompt of "
                f"{layout.columns}: cut it after the prompt or start anew"
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
        if mask is not None and mask.shape[1] != total and not short:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns, expected {total}: those of the "
                f"conversation so far ({columns}) and of the new tokens"
            )
        between = torch.ones((batch, gap), dtype=torch.bool, device=ids.device)
        if mask is None:
            past = torch.cat([layout.mask, between], 1)
        elif short:
            past = mask[:, :cached].bool()
        else:
            past = layout.mask & layout.take(mask[:, : layout.width].bool())
            past = torch.cat([past, mask[:, layout.width : columns].bool()], 1)
        return cls(layout, gap, past, full, short)

    def new(self, x: Tensor) -> Tensor:
        """The new columns of something shaped like input_ids."""
        return x[..., self.columns :] if self.full_ids else x

    def new_mask(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S) attention mask of the new columns."""
        length = self.new(ids).shape[1]
        if mask is None:
            return torch.ones_like(self.new(ids))
        return mask[:, mask.shape[1] - length :]

    def old(self, x: Tensor) -> Tensor:
        """The columns of x that the cache stands for; none if x does not hold them."""
        return x[..., : self.columns] if self.full_ids else x[..., :0]

    def shorten(self, x: Tensor) -> Tensor:
        """(B, columns) to the cache's columns."""
        return torch.cat(
            [self.layout.take(x[:, : self.layout.width]), x[:, self.layout.width :]], 1
        )

    def next_position(self) -> Tensor | None:
        """(B,) the position of the first new token."""
        if self.layout.next_position is None:
            return None
        return self.layout.next_position + self.mask[:, self.layout.columns :].sum(1)


__all__ = ["Past"]
