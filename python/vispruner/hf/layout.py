"""The columns of a prompt that remain after removing the placeholders of dropped tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The columns of a shortened prompt.

    Attributes:
        index: (B, W) int64, the original column of each column.
        mask: (B, W) bool, False where a column is padding.
        width: columns of the original prompt.
        dropped: (B,) int64, removed tokens of each row, without padding.
        next_position: (B,) int64, the position after the prompt, for models whose positions are not
            consecutive; otherwise None.
        padded: whether a column may be padding (known without reading the mask).
    """

    index: Tensor
    mask: Tensor
    width: int
    dropped: Tensor
    next_position: Tensor | None = None
    padded: bool = True

    @property
    def columns(self) -> int:
        """W."""
        return self.index.shape[1]

    @property
    def rows(self) -> int:
        """B."""
        return self.index.shape[0]

    def take(self, x: Tensor) -> Tensor:
        """The remaining columns of x, (..., B, width) to (..., B, W)."""
        index = self.index.to(x.device).expand(*x.shape[:-1], -1)
        return x.gather(-1, index)

    def select(self, rows: Tensor) -> Layout:
        """The layout of a batch of some of the rows: rows (B',) int64."""
        picked = rows.to(self.index.device)
        after = self.next_position
        return replace(
            self,
            index=self.index[picked],
            mask=self.mask[picked],
            dropped=self.dropped[picked],
            next_position=None if after is None else after[picked],
        )

    def repeat(self, times: int) -> Layout:
        """The layout after repeating the rows in place, as generate does for beams."""
        if times == 1:
            return self
        return self.select(torch.arange(self.rows).repeat_interleave(times))

    def append(self, other: Layout, gap: int) -> Layout:
        """This layout, then `gap` unchanged columns, then another layout."""
        start = self.width + gap
        between = torch.arange(self.width, start, device=self.index.device)
        between = between.expand(self.rows, -1)
        return Layout(
            index=torch.cat([self.index, between, other.index + start], 1),
            mask=torch.cat([self.mask, torch.ones_like(between, dtype=torch.bool), other.mask], 1),
            width=start + other.width,
            dropped=self.dropped + other.dropped,
            next_position=other.next_position,
            padded=self.padded or other.padded,
        )


def whole_prompt(mask: Tensor) -> Layout:
    """The layout in which every column remains: mask (B, W) bool."""
    index = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    none = torch.zeros(mask.shape[0], dtype=torch.long, device=mask.device)
    return Layout(index, mask, mask.shape[1], none)


def shorten(mask: Tensor, dropped: Tensor, columns: int, *, left: bool) -> Layout:
    """Removes columns from a padded batch.

    Args:
        mask: (B, L) bool, False for padding.
        dropped: (B, L) bool, placeholders to remove; at most `columns` others remain per row.
        columns: width of the result.
        left: whether padding goes to the left; the order of the columns does not change. A prompt
            without dropped columns is unchanged.
    """
    keep = mask & ~dropped
    if left:
        index = torch.argsort(keep.int(), dim=1, stable=True)[:, keep.shape[1] - columns :]
    else:
        index = torch.argsort((~keep).int(), dim=1, stable=True)[:, :columns]
    return Layout(index, keep.gather(1, index), keep.shape[1], (mask & dropped).sum(1))


def rows_of_items(counts: Sequence[int], placeholders: Sequence[int], modality: str) -> list[int]:
    """The row of the batch that each image or video belongs to.

    Args:
        counts: tokens of each item, in order; placeholders: placeholders in each row.

    Raises:
        ValueError: the numbers do not match in every row.
    """
    rows: list[int] = []
    row, room = -1, 0
    for item, count in enumerate(counts):
        while room == 0 and row + 1 < len(placeholders):
            row, room = row + 1, placeholders[row + 1]
        if count > room:
            raise ValueError(
                f"{modality} {item} has {count} tokens but row {row} of the prompt has {room} "
                f"{modality} placeholders left for it: {sum(placeholders)} placeholders "
                f"({list(placeholders)} per row) for {sum(counts)} tokens of {len(counts)} "
                f"{modality}s"
            )
        room -= count
        rows.append(row)
    if sum(counts) != sum(placeholders):
        raise ValueError(
            f"the prompt has {sum(placeholders)} {modality} placeholders ({list(placeholders)} "
            f"per row), its {len(counts)} {modality}s have {sum(counts)} tokens"
        )
    return rows
