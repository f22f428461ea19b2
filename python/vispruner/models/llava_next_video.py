"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, frames of videos pooled before the projector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..clock import Clock
from ..selection import Budget
from .base import Encoded, UnsupportedModelError
from .llava import Llava
from .llava_next import LlavaNext


class LlavaNextVideo(LlavaNext):
    """`LlavaNextVideoForConditionalGeneration`; k tokens of each pooled video frame remain."""

    model_types = ("llava_next_video",)
    encoders: ClassVar[Mapping[str, str]] = {
        "image": "get_image_features",
        "video": "get_video_features",
    }

    def __init__(self, model: Any, budget: Budget, **options: str) -> None:
        super().__init__(model, budget, **options)
        if isinstance(self.base.vision_resampler.pool, nn.Conv2d):
            raise UnsupportedModelError(
                "spatial_pool_mode='conv' mixes patches by learned weights, so their scores cannot "
                "be pooled in the same way"
            )
        self._frames = _Frames(model, budget)
        self._frames.parameters = self.parameters
        self._frames._own_names = self._own_names

    def placeholders(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        return (
            super().placeholders(modality, inputs)
            if modality == "image"
            else self._frames.placeholders(modality, inputs)
        )

    def kept(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        return (
            super().kept(modality, inputs)
            if modality == "image"
            else self._frames.kept(modality, inputs)
        )

    def projected(self, modality: str, inputs: Mapping[str, Any]) -> int:
        if modality == "image":
            return super().projected(modality, inputs)
        return self._frames.projected(modality, inputs)

    def encode(self, modality: str, inputs: Mapping[str, Any], clock: Clock) -> Encoded:
        if modality == "image":
            return super().encode(modality, inputs, clock)
        return self._frames.encode(modality, inputs, clock)


class _Frames(Llava):
    """Videos: frames of pooled patches."""

    model_types: ClassVar[tuple[str, ...]] = ()
    encoders: ClassVar[Mapping[str, str]] = {"video": "get_video_features"}

    def grid(self, modality: str, pixels: Tensor) -> tuple[int, int]:
        stride = int(self.config.spatial_pool_stride)
        rows, columns = super().grid(modality, pixels)
        return rows // stride, columns // stride

    def token_scores(self, modality: str, scores: Tensor) -> Tensor:
        return self.base.vision_resampler(scores.unsqueeze(-1))[..., 0]
