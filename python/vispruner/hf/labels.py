"""Maps between the columns of the full prompt and those of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import Layout

IGNORED = -100  # the label that losses ignore


@dataclass(frozen=True)
class Columns:
    """The columns of one call before and after pruning.

    Attributes:
        layout: the remaining columns.
        mask: (B, L) bool, False where the full prompt is padding.
        dropped: (B, L) bool, the removed placeholders.
    """

    layout: Layout
    mask: Tensor
    dropped: Tensor

    def labels(self, labels: Tensor) -> Tensor:
        """Labels (B, L) for the full prompt to labels (B, W) for the logits.

        Label t belongs to token t, as in the `labels` of transformers. Labels of dropped tokens are
        removed. A token with only padding of the shorter prompt before it has no label: nothing
        predicts it, just as nothing predicts the first column.
        """
        mine = self.dropped.to(labels.device)
        taken = self.layout.take(labels.masked_fill(mine, IGNORED))
        return taken.masked_fill(self._after_own_padding().to(labels.device), IGNORED)

    def shift_labels(self, shifted: Tensor) -> Tensor:
        """The same for `shift_labels`, where label t belongs to token t + 1."""
        batch = len(shifted)
        none = shifted.new_full((batch, 1), IGNORED)
        labels = self.labels(torch.cat([none, shifted[:, :-1]], 1))
        taken = torch.cat([labels[:, 1:], none], 1)
        # The last token predicts the token after the prompt, if the caller has a label for it.
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
        """(B, W) bool: tokens behind padding, which in the full prompt are not behind padding."""
        mask, index = self.layout.mask, self.layout.index
        first = mask.clone()
        first[:, 0] = False
        first[:, 1:] &= ~mask[:, :-1]
        before = self.mask.gather(1, (index - 1).clamp(min=0))
        return first & (before | (index == 0))

    def restore(self, x: Tensor) -> Tensor:
        """Values (B, W, ...) in the logits' columns to the full prompt's columns, (B, L, ...).

        A dropped column repeats the last retained column before it, so that column t still predicts
        token t + 1.
        """
        mask = self.layout.mask.to(x.device)
        index = self.layout.index.to(x.device)
        retained = torch.zeros(self.mask.shape, dtype=torch.bool, device=x.device)
        retained.scatter_(1, index, mask)
        places = torch.argsort((~mask).int(), dim=1, stable=True)
        rank = (retained.long().cumsum(1) - 1).clamp(min=0)
        rows = torch.arange(len(x), device=x.device).unsqueeze(1)
        return x[rows, places.gather(1, rank)]


def check_kept(columns: Columns, keep: int) -> None:
    """Raises ValueError if some of the last `keep` columns of the prompt were dropped."""
    if bool(columns.dropped[:, -keep:].any()):
        raise ValueError(
            f"logits_to_keep={keep} reaches into the images, some of whose tokens are dropped: "
            "pass logits='prompt' to vispruner.apply for all columns, or a smaller number"
        )


def with_restored_logits(output: Any, columns: Columns, keep: int) -> Any:
    """An output of `forward` with the logits in the columns of the full prompt."""

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
    """The share of the labels used by a loss that remain, a float scalar.

    Args:
        before, after: labels (B, L) of the full prompt, (B, W) of the shortened one.
        shifted: they are `shift_labels`; otherwise the first column is not predicted.
    """
    first = 0 if shifted else 1
    counted = (before[:, first:] != IGNORED).sum()
    return (after[:, first:] != IGNORED).sum() / counted.clamp(min=1)
