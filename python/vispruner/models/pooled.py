"""Towers whose projector makes tokens from patches; tokens are selected after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..clock import Clock
from ..report import Kept
from ..taps import tower_tap
from .base import Encoded, keep_rows, without_repeats
from .towers import TowerFamily


class PooledFamily(TowerFamily):
    """Models that turn the last layer of a SigLIP-like tower into a fixed grid of tokens.

    The score of a token is the mean of the attention that its patches receive.
    """

    def feature_layer(self, inputs: Mapping[str, Any]) -> int:
        return -1

    def tokens(self) -> tuple[int, int]:
        """Rows and columns of a picture's tokens."""
        raise NotImplementedError

    def pictures(self, inputs: Mapping[str, Any]) -> int:
        """Pictures in the pixels."""
        return len(inputs["pixel_values"])

    def placeholders(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        rows, columns = self.tokens()
        return [rows * columns] * self.pictures(inputs)

    def kept(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        rows, columns = self.tokens()
        return [self.budget.count(rows * columns)] * self.pictures(inputs)

    def features_of(self, output: Any) -> Tensor:
        """(P, N, C) tokens of all pictures, from the encoder's output."""
        return output.pooler_output

    def encode(self, modality: str, inputs: Mapping[str, Any], clock: Clock) -> Encoded:
        with tower_tap(self.attention(modality, inputs), has_cls=False) as tap:
            with clock("vision"):
                output = self.base.get_image_features(**inputs, return_dict=True)
            with clock("score"):
                scores = self.token_scores(modality, tap.scores())
        with clock("select"):
            features = self.features_of(output)
            kept, indices, counts = self.budget.select(features, scores)
            output.pooler_output = without_repeats(kept, counts) if self.budget.auto else kept
            cells = features.shape[1]
            first = cells * torch.arange(len(indices), device=indices.device).unsqueeze(1)
            keep = keep_rows((indices + first).flatten(), len(indices) * cells)
        items = tuple(
            Kept(
                modality,
                own,
                self.tokens(),
                before=cells,
                after=len(own),
                scores=score,
                lengths=(cells,),
                ranked=(self.budget.ranked(len(own)),),
            )
            for own, score in zip(without_repeats(indices, counts), scores, strict=True)
        )
        return Encoded(output, keep, items)
