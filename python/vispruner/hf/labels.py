"""From the columns of the caller's prompt to those of the logits, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import Layout

IGNORED = -100  # the label that losses leave out


@dataclass(frozen=True)
class Columns:
    """The columns of one call before and after tokens were dropped.

    Attributes:
        layout: the columns that were left.
        mask: (B, L) bool, False where the caller's prompt is padding.
        dropped: (B, L) bool, placeholders that were taken out.
    """

    layout: Layout
    mask: Tensor
    dropped: Tensor

    def labels(self, labels: Tensor) -> Tensor:
        """Labels (B, L) of the caller's columns to those of the logits, (B, W).

        Label t belongs to token t, as the `labels` of transformers do. Labels of dropped tokens go
        with them. A token that only padding of the shorter prompt comes before has no label:
        nothing predicts it, as nothing did where it was the first column.
        """
        mine = self.dropped.to(labels.device)
        taken = self.layout.take(labels.masked_fill(mine, IGNORED))
        return taken.masked_fill(self._after_own_padding().to(labels.device), IGNORED)

    def shift_labels(self, shifted: Tensor) -> Tensor:
        """The same of `shift_labels`, where label t belongs to token t + 1."""
        batch = len(shifted)
        none = shifted.new_full((batch, 1), IGNORED)
        labels = self.labels(torch.cat([none, shifted[:, :-1]], 1))
        taken = torch.cat([labels[:, 1:], none], 1)
        # The last token predicts what comes after the prompt, if the caller knows it.
        index, mask = self.layout.index.to(shifted.device), self.layout.mask.to(shifted.device)
        count = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        end = (mask * count).argmax(1, keepdim=True)
        last = self.mask.to(mask.device).long() * torch.arange(
            1, self.mask.shape[1] + 1, device=mask.device
        )
        stayed = index.gather(1, end) == last.argmax(1, keepdim=True)
        after = shifted.gather(1, index.gather(1, end))
        return taken.scatter(1, end, torch.where(stayed, after, none))

    def _after_own_padding(self) -> Tensor:
        """(B, W) bool: first tokens behind padding that the caller's prompt did not have."""
        mask, index = self.layout.mask, self.layout.index
        first = mask & (mask.long().cumsum(1) == 1)
        first[:, 0] = False
        before = self.mask.gather(1, (index - 1).clamp(min=0))
        return first & (before | (index == 0))

    def restore(self, x: Tensor) -> Tensor:
        """Something of each logit's column, (B, W, ...), at the caller's columns, (B, L, ...).

        A dropped column has what the last kept one before it has, so that column t still predicts
        token t + 1.
        """
        mask = self.layout.mask.to(x.device)
        index = self.layout.index.to(x.device)
        kept = torch.zeros(self.mask.shape, dtype=torch.bool, device=x.device)
        kept.scatter_(1, index, mask)
        places = torch.argsort((~mask).int(), dim=1, stable=True)
        rank = (kept.long().cumsum(1) - 1).clamp(min=0)
        rows = torch.arange(len(x), device=x.device).unsqueeze(1)
        return x[rows, places.gather(1, rank)]


def with_restored_logits(output: Any, columns: Columns, keep: int) -> Any:
    """An output of `forward` whose logits are in the columns of the caller's prompt."""

    def restore(logits: Tensor) -> Tensor:
        return columns.restore(logits)[:, -keep if keep else 0 :]

    if isinstance(output, tuple):
        place = next(
            i for i, part in enumerate(output) if isinstance(part, Tensor) and part.dim() == 3
        )
        return (*output[:place], restore(output[place]), *output[place + 1 :])
    output.logits = restore(output.logits)
    return output


def share_of_labels(before: Tensor, after: Tensor, *, shifted: bool) -> Tensor:
    """The share of the labels that count for a loss which are left, a float scalar.

    Args:
        before, after: labels (B, L) of the whole prompt, (B, W) of the shortened one.
        shifted: they are `shift_labels`; else the first column predicts nothing.
    """
    first = 0 if shifted else 1
    counted = (before[:, first:] != IGNORED).sum()
    return (after[:, first:] != IGNORED).sum() / counted.clamp(min=1)
