"""InternVL 3 and 3.5: k tokens per tile and frame, scored by the attention of [CLS].

A token is a block of patches, and its score is the mean of theirs, as in
`vispruner.models.internvl`. vLLM's class is named InternS1, and every rank runs the whole tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.interns1 import (
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal.processing import PromptUpdateDetails

from .. import selection
from ..models import UnsupportedModelError
from ..selection import Budget
from .config import KEY
from .model import AttentionTap, PrunedModel, counts_of, encoder_batches
from .processing import RETAINED, PrunedInfo, PrunedProcessor, register_processor


class _Info(PrunedInfo, InternS1ProcessingInfo):
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": super().get_supported_mm_limits()["image"]}  # videos are answered with 400

    def tokens(self) -> int:
        """Tokens per tile."""
        return int(self.get_hf_processor().image_seq_length)

    def most_retained(self) -> int:
        tiles = int(self.get_max_image_tokens()) // self.tokens()
        return tiles * self.pruning.cap.count(self.tokens())


class _Processor(PrunedProcessor, InternS1MultiModalProcessor):
    def retained(self, processed: Mapping[str, Any], budget: Budget) -> dict[str, list[int]]:
        tiles = processed.get("image_num_patches")
        if tiles is None:
            return {}
        return {"image": [budget.count(self.info.tokens())] * len(tiles)}

    def shortened(self, tokens: Any, retained: int, item: Mapping[str, Any]) -> Any:
        dropped = int(item["image_num_patches"].data) * (self.info.tokens() - retained)
        start, *context, end = tokens.full
        return PromptUpdateDetails.select_token_id([start, *context[dropped:], end], context[0])


@register_processor(_Info, _Processor)
class PrunedInternVL(PrunedModel, InternS1ForConditionalGeneration):
    """`InternVLForConditionalGeneration` with k visual tokens per tile."""

    stock = InternS1ForConditionalGeneration
    drafts = ("ngram",)
    no_other_drafts = "vLLM has none for this model"
    config: Any

    @classmethod
    def check(cls, hf_config: Any) -> None:
        for name, needed in (
            ("vision_feature_select_strategy", "default"),
            ("vision_feature_layer", -1),
        ):
            if (own := getattr(hf_config, name, needed)) != needed:
                raise UnsupportedModelError(f"{KEY}: needs {name}={needed!r}, got {own!r}")

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """(tiles * k, C) of each image."""
        retained = kwargs.pop(RETAINED["image"], None)
        if retained is None:  # embeddings passed by the client
            return super().embed_multimodal(**kwargs)
        given = self._parse_and_validate_image_input(**kwargs)
        tiles = [int(count) for count in given["num_patches"]]
        pixels = given["pixel_values"].split(tiles)
        counts, tokens = counts_of(retained), int(self.num_image_token)
        embeddings: list[Tensor] = []
        for part in encoder_batches([tokens * count for count in tiles], self.encoder_tokens):
            features, scores = self._encode(torch.cat(pixels[part]))
            of_images = list(zip(tiles[part], counts[part], strict=True))
            of_tiles = [count for own, count in of_images for _ in range(own)]
            kept, _ = self.choose(
                features.flatten(0, 1), scores.flatten(), [tokens] * len(features), of_tiles
            )
            projected = self.multi_modal_projector(kept)
            embeddings += projected.split([own * count for own, count in of_images])
        return embeddings

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the tower.

        Args:
            pixels: (B, 3, H, W).

        Returns:
            (B, N, C) tokens before the projector and (B, N) float32 attention of [CLS] to them.
        """
        layer = self.vision_tower.encoder.layer[-1].attention
        with AttentionTap(layer.attn) as tap:
            patches = self.vision_tower(pixel_values=pixels)[:, 1:]
        heads = (layer.num_heads, layer.head_dim)
        q, k = (x.unflatten(-1, heads) for x in tap.take())  # (B, 1 + patches, H, D)
        with self.timing("scoring"):
            scores = selection.cls_attention(q[:, 0], k.transpose(1, 2), layer.scale)
            scores = self._blocks(scores.unsqueeze(-1)).mean(-1)
        return self._blocks(patches), scores

    def _blocks(self, patches: Tensor) -> Tensor:
        """(B, N, block * C) of patches (B, block * N, C)."""
        side = round(patches.shape[1] ** 0.5)
        square = patches.reshape(len(patches), side, side, -1)
        blocks: Tensor = self.pixel_shuffle(square, scale_factor=self.downsample_ratio)
        return blocks.flatten(1, 2)
