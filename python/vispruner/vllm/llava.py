"""LLaVA-1.5: only the retained patches of an image are projected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)

from ..selection import Budget
from .model import counts_of, encoder_batches
from .processing import RETAINED, PrunedInfo, PrunedProcessor, register_processor
from .towers import PrunedTowerModel


class _Info(PrunedInfo, LlavaProcessingInfo):
    pass


class _Processor(PrunedProcessor, LlavaMultiModalProcessor):
    def retained(self, processed: Mapping[str, Any], budget: Budget) -> dict[str, list[int]]:
        pixels = processed.get("pixel_values")
        if pixels is None:
            return {}
        return {"image": [budget.count(self.info.get_max_image_tokens())] * len(pixels)}


@register_processor(_Info, _Processor)
class PrunedLlava(PrunedTowerModel, LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` with k visual tokens per image."""

    stock = LlavaForConditionalGeneration

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """(k, C) of each image; k may differ between the images of a batch."""
        retained = kwargs.pop(RETAINED["image"], None)
        if retained is None:  # embeddings passed by the client
            return super().embed_multimodal(**kwargs)
        pixels: Tensor = self._parse_and_validate_image_input(**kwargs)["pixel_values"]
        counts = counts_of(retained)
        patches = self.vision_tower.vision_model.embeddings.num_patches
        embeddings: list[Tensor] = []
        for part in encoder_batches([patches] * len(pixels), self.encoder_tokens):
            features, scores = self.encode(pixels[part])
            kept, _ = self.choose(
                features.flatten(0, 1), scores.flatten(), [patches] * len(features), counts[part]
            )
            embeddings += torch.split(self.multi_modal_projector(kept), counts[part])
        return embeddings
