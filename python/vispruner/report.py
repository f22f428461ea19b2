"""Report of the last call: retained tokens and times."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

import vispruner_cuda

from .clock import Clock


@dataclass(frozen=True)
class Kept:
    """The retained tokens of one image or video.

    Attributes:
        modality: "image" or "video".
        indices: (k,) int64, ascending: retained cells of the flattened grid.
        grid: (rows, columns) of an image's tokens, (tiles, rows, columns) of a tiled image,
            (frames, rows, columns) of a video.
        before: tokens of the item in the unpruned model, including separators.
        after: tokens that the language model reads.
        scores: (cells,) float32, the attention that ranked each cell of the grid.
        lengths: cells of each separately pruned picture (a tile, a frame).
        ranked: number of tokens of each picture retained for their score.
    """

    modality: str
    indices: Tensor
    grid: tuple[int, ...]
    before: int
    after: int
    scores: Tensor = field(repr=False)
    lengths: tuple[int, ...]
    ranked: tuple[int, ...]

    @property
    def important(self) -> Tensor:
        """(k,) bool: True for cells retained for their score, False for their diversity."""
        best = [
            start + vispruner_cuda.topk(scores.unsqueeze(0), count).indices[0]
            for scores, start, count in zip(
                self.scores.split(self.lengths),
                itertools.accumulate(self.lengths, initial=0),
                self.ranked,
                strict=False,
            )
            if count
        ]
        if not best:
            return torch.zeros_like(self.indices, dtype=torch.bool)
        return torch.isin(self.indices, torch.cat(best).to(self.indices.device))


@dataclass(frozen=True)
class Report:
    """The last call of a pruned model.

    Attributes:
        items: one entry per image and video, images first, in the order of the call.
        prompt_before, prompt_after: columns of the prompt, including padding and text.
    """

    items: tuple[Kept, ...]
    prompt_before: int
    prompt_after: int
    _clock: Clock = field(repr=False)

    @property
    def tokens_before(self) -> int:
        """Visual tokens of all images and videos without pruning."""
        return sum(item.before for item in self.items)

    @property
    def tokens_after(self) -> int:
        """Visual tokens that the language model reads."""
        return sum(item.after for item in self.items)

    @property
    def milliseconds(self) -> dict[str, float]:
        """Time per phase; waits for the GPU.

        `vision` is the encoder with its projector. Pruning adds `score`, `select` and `rewrite` (of
        the prompt). After `generate` there are also `prefill`, until the language model has read
        the prompt, and `decode`, the rest.
        """
        return self._clock.milliseconds()
