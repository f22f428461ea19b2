"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, frames pooled 2 x 2 before the projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from .base import IMAGE, PINPOINTS, VIDEO, Auto, Item, LlavaNext, clip, llama, noise, prune


class LlavaNextVideo(LlavaNext):
    name = "llava-next-video"
    kinds: ClassVar[tuple[str, ...]] = ("image", "video")

    def config(self) -> Any:
        return transformers.LlavaNextVideoConfig(
            vision_config=clip(), text_config=llama(), image_token_id=IMAGE, video_token_id=VIDEO,
            image_token_index=IMAGE, video_token_index=VIDEO, vision_feature_layer=-2,
            vision_feature_select_strategy="default", image_grid_pinpoints=PINPOINTS,
            spatial_pool_mode="average", spatial_pool_stride=2,
        )  # fmt: skip

    def architecture(self) -> Any:
        return transformers.LlavaNextVideoForConditionalGeneration

    def length(self, item: Item) -> int:
        return 2 * 9 if item.kind == "video" else super().length(item)

    def media(self, items: Sequence[Item]) -> dict[str, Any]:
        images = [item for item in items if item.kind == "image"]
        videos = [noise(i.number, 2, 3, 84, 84) for i in items if i.kind == "video"]
        media = super().media(images) if images else {}
        return media | ({"pixel_values_videos": torch.stack(videos)} if videos else {})

    def choose(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        if item.kind == "image":
            return super().choose(item, k)
        feats, _, scores = self.patches(self.media([item])["pixel_values_videos"][0])
        pooled = F.avg_pool2d(feats.transpose(1, 2).unflatten(2, (6, 6)), 2).flatten(2)
        pooled = pooled.transpose(1, 2)
        small = F.avg_pool2d(scores.view(-1, 1, 6, 6), 2).flatten(1)
        keep = prune(pooled, small, k)
        return keep.flatten(), self.build().model.multi_modal_projector(pooled)[keep]
