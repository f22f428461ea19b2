"""Where retained tokens are: M-RoPE positions of a prompt that misses some of its visual tokens.

Qwen's kept tokens stay at the time, height and width that they have in the unpruned prompt, and
the text after them at its own. Which tokens are kept is known only when their picture has been
encoded, so the place of each travels beside its embedding, as extra channels, and the runner has
it written into the positions of the prompt just before the tokens are computed
(`recompute_mrope_positions`, which vLLM has for its own pruning of videos).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_BASE = 128  # digits below it are exact in bfloat16

#: Extra channels of an embedding: two digits each of how far its picture is behind the beginning of
#: its video (0 in an image), of its row and of its column; -1 where nothing was dropped.
CHANNELS = 6


def with_places(embeddings: Tensor, places: Tensor) -> Tensor:
    """Appends places (k, 3) int64 below 16384 to embeddings (k, C): (k, C + CHANNELS)."""
    digits = torch.stack([places // _BASE, places % _BASE], -1).flatten(1)
    return torch.cat([embeddings, digits.to(embeddings)], 1)


def without_places(embeddings: Tensor) -> Tensor:
    """Appends channels to the embeddings (T, C) of an image or video that lost nothing."""
    return torch.nn.functional.pad(embeddings, (0, CHANNELS), value=-1.0)


def write_places(
    input_ids: Sequence[int] | Tensor,
    embeddings: Sequence[Tensor],
    positions: Tensor,
    computed: int,
    placeholders: Sequence[int],
) -> Tensor:
    """Puts the kept tokens of one step at their rows and columns.

    Row 0, the time, is right from the beginning and never changed, so the result is the same when a
    step is repeated.

    Args:
        input_ids: (L,) the prompt; computed: its tokens that earlier steps computed.
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
    time, row, column = (digits[:, ::2] * _BASE + digits[:, 1::2]).to(positions).unbind(1)
    positions = positions.clone()
    start = positions[0, where] - time
    positions[1:, where] = start + torch.stack([row, column])
    return positions


@dataclass(frozen=True)
class Unpruned:
    """The prompt that a pruned one comes from.

    Attributes:
        tokens: with all placeholders.
        features: vLLM's specifications of its images and videos, at their places in it.
        columns: the column in `tokens` of each token of the pruned prompt; of a pruned picture the
            first ones, until it is known which are kept.
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
        """Fills in the placeholders that are missing.

        Args:
            tokens: a pruned prompt; features: its images and videos, in order.
            pictures: tokens that each picture of a feature keeps, and those that it has.
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
