"""The arguments that have the prompt's columns, without those of dropped tokens."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..models import Family
from . import labels
from .labels import Columns
from .past import SplitCall


class Arranger:
    """Removes the dropped columns from the arguments of a model's calls.

    Args:
        model: the model; family: its family.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self._model, self._family = model, family
        self._warned_of_count = False

    def arranged(self, turn: SplitCall, columns: Columns) -> dict[str, Any]:
        """The call's arguments without the dropped columns."""
        call, past, new, dropped = turn.call, turn.past, columns.layout, columns.dropped
        inputs, pad = dict(call), self.pad_id()
        continued = turn.whole and past.full_ids
        if "input_ids" in call:
            short = new.take(turn.ids.masked_fill(dropped, pad))
            if continued:
                old = past.old(call["input_ids"])
                for modality in self._family.encoders:
                    # They are cached, and the model would fill a placeholder.
                    old = old.masked_fill(old == self._family.token_id(modality), pad)
                short = torch.cat([past.shorten(old), short], 1)
            inputs["input_ids"] = short
        whole_mask = torch.cat([past.mask, new.mask], 1)
        if call.get("attention_mask") is not None:
            inputs["attention_mask"] = whole_mask.to(call["attention_mask"].dtype)
        elif turn.whole or past.columns or new.padded:
            inputs["attention_mask"] = whole_mask.long()
        for name in ("mm_token_type_ids", "token_type_ids"):
            value = call.get(name)
            if value is not None:
                old, own = _split_types(name, value, turn)
                taken = new.take(own.masked_fill(dropped, 0))
                inputs[name] = torch.cat([past.shorten(old), taken], 1) if old.numel() else taken
        self._arrange_labels(inputs, columns)
        return inputs

    def _arrange_labels(self, inputs: dict[str, Any], columns: Columns) -> None:
        """Shortens labels, and scales a trainer's count of them in the whole batch."""
        counted = None
        for name, shorter in (("labels", columns.labels), ("shift_labels", columns.shift_labels)):
            value = inputs.get(name)
            if value is None:
                continue
            if value.shape != columns.mask.shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, the new part of the prompt "
                    f"{tuple(columns.mask.shape)}"
                )
            inputs[name] = shorter(value)
            counted = labels.share_of_labels(value, inputs[name], shifted=name == "shift_labels")
        count = inputs.get("num_items_in_batch")
        if count is None or counted is None:
            return
        if not self._warned_of_count and bool(counted < 1):
            self._warned_of_count = True
            warnings.warn(
                "num_items_in_batch counts labels of dropped tokens: it is scaled by the share of "
                "this batch's labels that remain; it is exact if image placeholders have the label "
                f"{labels.IGNORED}",
                stacklevel=2,
            )
        device = count.device if isinstance(count, Tensor) else counted.device
        inputs["num_items_in_batch"] = count * counted.to(device)

    def pad_id(self) -> int:
        taken = {self._family.token_id(modality) for modality in self._family.encoders}
        pad = getattr(self._model.generation_config, "pad_token_id", None)
        candidates = [pad] if isinstance(pad, int) else []
        return next(token for token in [*candidates, *range(len(taken) + 1)] if token not in taken)


def _split_types(name: str, value: Tensor, turn: SplitCall) -> tuple[Tensor, Tensor]:
    """Types of the cached columns that the model gets as well, and of the new ones.

    Raises:
        ValueError: they are not those of the conversation, where the model needs them.
    """
    past, new = turn.past, turn.ids.shape[1]
    if past.full_ids:
        return past.old(value), past.new(value)
    if value.shape[1] == past.columns + new:
        return value[:, : past.columns], value[:, past.columns :]
    if value.shape[1] != new or (turn.visual and past.columns and name == "token_type_ids"):
        raise ValueError(
            f"{name} has {value.shape[1]} columns, expected {past.columns + new}: those of the "
            f"conversation so far ({past.columns}) and of the new tokens"
        )
    return value[:, :0], value
