"""LLaVA-NeXT: k tokens per tile, the same as with `vispruner.apply(model, k=k, tiles="all")`.

The placeholders of an image are counted before it is encoded, so the layout must not depend on
which patches are retained: tiles x k tokens, no line ends, padding like any other patch. An image
that would not get shorter is not pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)

from ..selection import Budget
from .model import counts_of, encoder_batches
from .processing import RETAINED, PrunedInfo, PrunedProcessor, register_processor
from .towers import PrunedTowerModel


def tiles_of(hf_config: Any, size: Sequence[int]) -> int:
    """Tiles of an image of (height, width), the overview included."""
    pinpoints, side = hf_config.image_grid_pinpoints, hf_config.vision_config.image_size
    return int(image_size_to_num_patches([int(x) for x in size], pinpoints, side))


def patches_of(hf_config: Any) -> int:
    """Patches per tile."""
    vision = hf_config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2)


class _Info(PrunedInfo, LlavaNextProcessingInfo):
    def most_retained(self) -> int:
        config = self.get_hf_config()
        tiles = max(tiles_of(config, pinpoint) for pinpoint in config.image_grid_pinpoints)
        most = tiles * self.pruning.cap.count(patches_of(config))
        return min(most, self.get_max_image_tokens())


class _Processor(PrunedProcessor, LlavaNextMultiModalProcessor):
    def retained(self, processed: Mapping[str, Any], budget: Budget) -> dict[str, list[int]]:
        if processed.get("pixel_values") is None:
            return {}
        config = self.info.get_hf_config()
        patches = patches_of(config)
        count = budget.count(patches)
        counts = [
            count if tiles_of(config, size) * count < self._whole(size) else patches
            for size in processed["image_sizes"]
        ]
        return {"image": counts}

    def _whole(self, size: Sequence[int]) -> int:
        """Tokens of an unpruned image of (height, width)."""
        height, width = (int(x) for x in size)
        return int(self.info.get_num_image_tokens(image_width=width, image_height=height))

    def shortened(self, tokens: Any, retained: int, item: Mapping[str, Any]) -> Any:
        config = self.info.get_hf_config()
        if retained == patches_of(config):
            return tokens
        return tokens[: tiles_of(config, item["image_sizes"].data) * retained]


@register_processor(_Info, _Processor)
class PrunedLlavaNext(PrunedTowerModel, LlavaNextForConditionalGeneration):
    """`LlavaNextForConditionalGeneration` with k visual tokens per tile."""

    stock = LlavaNextForConditionalGeneration

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """(tiles * k, C) of each image; the whole image if all patches of its tiles are
        retained."""
        retained = kwargs.pop(RETAINED["image"], None)
        if retained is None:  # embeddings passed by the client
            return super().embed_multimodal(**kwargs)
        image_input = self._parse_and_validate_image_input(**kwargs)
        sizes = image_input["image_sizes"]
        patches = patches_of(self.config)
        # In a batch with larger images an image is padded with empty tiles.
        tiles = [tiles_of(self.config, size) for size in sizes]
        pixels = [
            own[:count] for own, count in zip(image_input["pixel_values"], tiles, strict=True)
        ]
        counts = counts_of(retained)
        embeddings: list[Tensor] = []
        for part in encoder_batches([patches * count for count in tiles], self.encoder_tokens):
            features, scores = self.encode(torch.cat(pixels[part]))
            of_tiles = [
                count
                for own, count in zip(tiles[part], counts[part], strict=True)
                for _ in range(own)
            ]
            kept, _ = self.choose(
                features.flatten(0, 1), scores.flatten(), [patches] * len(features), of_tiles
            )
            of_images = [a * b for a, b in zip(tiles[part], counts[part], strict=True)]
            projected = self.multi_modal_projector(kept).split(of_images)
            embeddings += [
                own if count < patches else self._whole(own, size)
                for own, count, size in zip(projected, counts[part], sizes[part], strict=True)
            ]
        return embeddings

    def _whole(self, projected: Tensor, size: Tensor) -> Tensor:
        """An unpruned image, without its padding and with line ends, of (tiles * N, C)."""
        tiles = projected.unflatten(0, (-1, patches_of(self.config)))
        merged: Tensor = self._merge_image_patch_embeddings(size, tiles, strategy="spatial_unpad")
        return merged
