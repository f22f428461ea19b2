"""The columns of a prompt that remain after removing the placeholders of dropped tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
        behind: (B,) int64, how much less the next position is than the number of columns: the
            columns that pruning added to a row, less the padding that it removed. None if zero.
        inside: some of them are followed by tokens of the same row, or will be.
    """

    index: Tensor
    mask: Tensor
    width: int
    dropped: Tensor
    next_position: Tensor | None = None
    padded: bool = True
    behind: Tensor | None = None
    inside: bool = False

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

    def select(self, rows: Tensor | Sequence[int]) -> Layout:
        """The layout of a batch of some of the rows: rows (B',) int64."""
        picked = torch.as_tensor(rows, device=self.index.device)
        after, behind = self.next_position, self.behind
        return replace(
            self,
            index=self.index[picked],
            mask=self.mask[picked],
            dropped=self.dropped[picked],
            next_position=None if after is None else after[picked],
            behind=None if behind is None else behind[picked],
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
            behind=_sum(self.behind, other.behind),
            inside=self.inside or other.inside,
        )


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def whole_prompt(mask: Tensor) -> Layout:
    """The layout in which every column remains: mask (B, W) bool."""
    index = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    none = torch.zeros(mask.shape[0], dtype=torch.long, device=mask.device)
    return Layout(index, mask, mask.shape[1], none)


@dataclass(frozen=True)
class Padding:
    """The caller's padding at the ends of the rows, and the side to which pruning adds more.

    Columns at the other end and holes are not touched, so that columns counted from there keep
    their meaning. A prompt without dropped columns is unchanged.

    Attributes:
        before, after: padding columns before the first and after the last token of each row.
        left: the side.
    """

    before: list[int]
    after: list[int]
    left: bool

    @property
    def removable(self) -> list[int]:
        """Padding columns of each row on that side."""
        return self.before if self.left else self.after

    def width(self, columns: int, dropped: Sequence[int]) -> int:
        """Columns of the shortened prompt.

        Args:
            columns: of the prompt; dropped: of each row.
        """
        needed = (columns - r - d for r, d in zip(self.removable, dropped, strict=True))
        return max(needed) + min(self.removable)


def padding_at_ends(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B,), (B,): columns before the first and after the last True of mask (B, L)."""
    before = (mask.long().cumsum(1) == 0).sum(1)
    return before, (mask.flip(1).long().cumsum(1) == 0).sum(1)


def shorten(mask: Tensor, dropped: Tensor, columns: int, *, left: bool) -> Layout:
    """Removes columns from a padded batch.

    Args:
        mask: (B, L) bool, False for padding.
        dropped: (B, L) bool, placeholders to remove.
        columns: width of the result, as from `Padding.width`.
        left: the side at which columns of dropped tokens and of the caller's padding fill rows up.
    """
    seen = (mask if left else mask.flip(1)).long().cumsum(1)
    end = (seen if left else seen.flip(1)) == 0
    free = end | (mask & dropped)
    if left:
        index = torch.argsort((~free).int(), dim=1, stable=True)[:, free.shape[1] - columns :]
    else:
        index = torch.argsort(free.int(), dim=1, stable=True)[:, :columns]
    keep = mask & ~dropped
    return Layout(index, keep.gather(1, index), keep.shape[1], (mask & dropped).sum(1))


def check_inside(config: Any, columns: int) -> None:
    """Checks padding that pruning added between the tokens of a row.

    Args:
        config: of the model; columns: up to the last one that is read or generated.

    Raises:
        ValueError: the model would read it.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ()
    window = getattr(text, "sliding_window", None)
    sliding = "sliding_attention" in kinds if kinds else window is not None
    if "linear_attention" in kinds or (sliding and columns > (window or 0)):
        raise ValueError(
            "the rows of this batch retain different numbers of tokens, and this model reads the "
            "padding between them and what follows: pass one row per call, a first turn that is "
            "padded on the left, or the conversation without cache"
        )


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
