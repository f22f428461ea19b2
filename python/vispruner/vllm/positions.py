"""M-RoPE positions of retained tokens, in a prompt without its dropped visual tokens.

Qwen's retained tokens, and the text after them, keep their time, height and width of the unpruned
prompt. The retained tokens are known only when their picture has been encoded. So each embedding
carries its position in extra channels, and the model runner writes it into the positions of the
prompt before the tokens are computed (`recompute_mrope_positions`, vLLM's interface for its own
video pruning).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_BASE = 128  # digits below it are exact in bfloat16

_DIGITS = 3

#: Positions that the digits can hold.
LIMIT = _BASE**_DIGITS

#: Extra channels of an embedding: the digits, most significant first, of its picture's offset from
#: the beginning of its video (0 in an image), of its row and of its column; -1 if no token was
#: dropped.
CHANNELS = 3 * _DIGITS


def with_places(embeddings: Tensor, places: Tensor) -> Tensor:
    """Appends positions (k, 3) int64 below LIMIT to embeddings (k, C): (k, C + CHANNELS)."""
    digits = [places // _BASE**power % _BASE for power in reversed(range(_DIGITS))]
    return torch.cat([embeddings, torch.stack(digits, -1).flatten(1).to(embeddings)], 1)


def without_places(embeddings: Tensor) -> Tensor:
    """Appends channels to the embeddings (T, C) of an unpruned image or video."""
    return torch.nn.functional.pad(embeddings, (0, CHANNELS), value=-1.0)


def write_places(
    input_ids: Sequence[int] | Tensor,
    embeddings: Sequence[Tensor],
    positions: Tensor,
    computed: int,
    placeholders: Sequence[int],
) -> Tensor:
    """Sets the rows and columns of the retained tokens of one step.

    Row 0, the time, is correct from the beginning and never changed, so repeating a step gives the
    same result.

    Args:
        input_ids: (L,) the prompt; computed: number of its tokens that earlier steps computed.
        embeddings: (t, C + CHANNELS) of the visual tokens that this step computes, in order.
        positions: (3, L) of the prompt.
        placeholders: token ids of visual tokens.

    Returns:
        (3, L) positions.
    """
    ids = torch.as_tensor(input_ids, device=positions.device)
    visual = torch.isin(ids, torch.tensor(placeholders, device=ids.device))
    digits = torch.cat([x[:, -CHANNELS:] for x in embeddings]).to(positions.device).long()
    where = computed + visual[computed:].nonzero()[: len(digits), 0]
    moved = digits[:, 0] >= 0
    where, digits = where[moved], digits[moved]
    powers = [_BASE**power for power in reversed(range(_DIGITS))]
    places = sum(digits[:, n::_DIGITS] * power for n, power in enumerate(powers))
    time, row, column = places.to(positions).unbind(1)
    positions = positions.clone()
    start = positions[0, where] - time
    positions[1:, where] = start + torch.stack([row, column])
    return positions


@dataclass(frozen=True)
class Unpruned:
    """The unpruned prompt of a pruned one.

    Attributes:
        tokens: with all placeholders.
        features: vLLM's specifications of its images and videos, at their places in it.
        columns: the column in `tokens` of each token of the pruned prompt; for a pruned picture the
            first ones, until the retained tokens are known.
    """

    tokens: list[int]
    features: list[Any]
    columns: list[int]

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        features: Sequence[Any],
        pictures: Sequence[tuple[int, int]],
        placeholders: Collection[int],
    ) -> Unpruned:
        """Inserts the missing placeholders.

        Args:
            tokens: a pruned prompt; features: its images and videos, in order.
            pictures: retained tokens and all tokens of each picture of a feature.
            placeholders: token ids of visual tokens.
        """
        whole: list[int] = []
        columns: list[int] = []
        moved, start = [], 0
        for feature, (kept, full) in zip(features, pictures, strict=True):
            place = feature.mm_position
            columns += range(len(whole), len(whole) + place.offset - start)
            whole += tokens[start : place.offset]
            offset, start, seen = len(whole), place.offset + place.length, 0
            for token in tokens[place.offset : start]:
                columns.append(len(whole))
                whole.append(token)
                seen += token in placeholders
                if seen == kept:  # a picture ends here
                    whole += [token] * (full - kept)
                    seen = 0
            length = len(whole) - offset
            moved.append(replace(feature, mm_position=replace(place, offset=offset, length=length)))
        columns += range(len(whole), len(whole) + len(tokens) - start)
        whole += tokens[start:]
        return cls(whole, moved, columns)
