"""Idefics3 and SmolVLM: blocks of s x s patches of a SigLIP-like tower become one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import releases
from ..selection import Budget
from . import costs
from .base import UnsupportedModelError
from .pooled import PooledFamily


class Idefics3(PooledFamily):
    """`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`.

    Each part of an image that the processor splits is a separate picture. Pixels are
    (rows, pictures, 3, H, W); pictures of zeros are padding and are not encoded.
    """

    model_types: ClassVar[tuple[str, ...]] = ("idefics3", "smolvlm")
    towers: ClassVar[Mapping[str, str]] = {"image": "vision_model"}
    ragged = frozenset({"image"})

    def __init__(self, model: Any, budget: Budget, **options: str) -> None:
        super().__init__(model, budget, **options)
        if budget.auto and not releases.separates_pictures_of_idefics3():
            raise UnsupportedModelError(
                f"k='auto' with {self.config.model_type} needs transformers 5.21 or newer: in this "
                "release pictures must all have the same number of tokens"
            )

    @property
    def language_model(self) -> Any:
        return self.base.text_model

    def tokens(self) -> tuple[int, int]:
        vision = self.config.vision_config
        side = int(vision.image_size) // int(vision.patch_size) // int(self.config.scale_factor)
        return side, side

    def inputs_of(self, modality: str, call: Mapping[str, Any]) -> dict[str, Any] | None:
        """Only the pictures that are encoded, as one row."""
        inputs = super().inputs_of(modality, call)
        if inputs is None or not isinstance(inputs["pixel_values"], Tensor):
            return inputs
        pixels = inputs["pixel_values"]
        side = int(self.config.vision_config.image_size)
        if pixels.dim() != 5 or tuple(pixels.shape[-2:]) != (side, side):
            raise ValueError(
                f"pixel_values must have shape (B, pictures, 3, {side}, {side}) to be pruned, got "
                f"{tuple(pixels.shape)}"
            )
        pixels = pixels.flatten(0, 1)
        real = (pixels != 0).flatten(1).any(1)
        mask = inputs.pop("pixel_attention_mask", None)
        if mask is not None and not bool(mask.flatten(0, 1)[real].all()):
            raise ValueError(
                "pixel_attention_mask hides a part of a picture, whose patches cannot be scored: "
                "have the processor split images (do_image_splitting=True)"
            )
        inputs["pixel_values"] = pixels[real].unsqueeze(0)
        return inputs

    def pictures(self, inputs: Mapping[str, Any]) -> int:
        return int(inputs["pixel_values"].shape[:2].numel())

    def take(
        self, modality: str, inputs: Mapping[str, Any], items: Sequence[int]
    ) -> dict[str, Any]:
        return {**inputs, "pixel_values": inputs["pixel_values"][:, list(items)]}

    def token_scores(self, modality: str, scores: Tensor) -> Tensor:
        shuffled: Tensor = self.base.connector.pixel_shuffle(
            scores.unsqueeze(-1), self.config.scale_factor
        )
        return shuffled.mean(-1)

    def features_of(self, output: Any) -> Tensor:
        rows, columns = self.tokens()
        return torch.cat(list(output.pooler_output)).unflatten(0, (-1, rows * columns))

    @classmethod
    def picture(cls, config: Any, height: int, width: int) -> dict[str, Any]:
        side = config.vision_config.image_size
        return {"pixel_values": torch.empty(1, 1, 3, side, side, device="meta")}

    @classmethod
    def vision_flops(cls, config: Any, inputs: Mapping[str, Any], projected: int) -> int:
        fold = int(config.scale_factor) ** 2
        width, out = config.vision_config.hidden_size, config.get_text_config().hidden_size
        tokens = costs.patches_of(config, inputs) // fold
        return costs.tower(config, inputs) + 2 * tokens * fold * int(width) * int(out)
