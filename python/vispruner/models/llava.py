"""LLaVA-1.5 and Video-LLaVA: only the retained patches are projected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..clock import Clock
from ..report import Kept
from .base import Encoded, packed
from .towers import TowerFamily


class Llava(TowerFamily):
    """`LlavaForConditionalGeneration` with a CLIP or SigLIP tower."""

    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    harness: ClassVar[tuple[tuple[str, str, tuple[str, ...]], ...]] = (
        ("llava_hf", "LlavaHf", ("simple", "chat")),
    )  # and LLaVA-NeXT, LLaVA-OneVision
    vllm: ClassVar[Mapping[str, str]] = {"LlavaForConditionalGeneration": "llava:PrunedLlava"}
    ragged = frozenset({"image"})

    def _pixels(self, modality: str, inputs: Mapping[str, Any]) -> tuple[Tensor, int]:
        """The pixels of a call, and the pictures per item: 1, or the frames of a video."""
        name = self.pixels_name(modality, inputs)
        pixels: Tensor = inputs[str(name)]
        return pixels, pixels.shape[1] if pixels.dim() == 5 else 1

    def placeholders(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        pixels, pictures = self._pixels(modality, inputs)
        rows, columns = self.grid(modality, pixels)
        return [pictures * (self.extra(modality, inputs) + rows * columns)] * len(pixels)

    def kept(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        pixels, pictures = self._pixels(modality, inputs)
        rows, columns = self.grid(modality, pixels)
        count = self.extra(modality, inputs) + self.budget.count(rows * columns)
        return [pictures * count] * len(pixels)

    def projected(self, modality: str, inputs: Mapping[str, Any]) -> int:
        return sum(self.kept(modality, inputs))

    def encode(self, modality: str, inputs: Mapping[str, Any], clock: Clock) -> Encoded:
        indices = scores = torch.empty(0)  # of the pictures of all items: (P, k), (P, N)
        counts: list[int] = []

        def prune(features: Tensor, attention: Tensor) -> Tensor:
            nonlocal indices, scores, counts
            kept, indices, counts = self.select(features, attention)
            scores = attention
            return kept

        with self.projecting(modality, inputs, clock, prune), clock("vision"):
            output = getattr(self.base, self.encoders[modality])(
                **self.encoder_arguments(inputs), return_dict=True
            )
        pixels, pictures = self._pixels(modality, inputs)
        grid = self.grid(modality, pixels)
        extra, patches = self.extra(modality, inputs), grid[0] * grid[1]

        keep = torch.zeros((len(indices), extra + patches), dtype=torch.bool, device=indices.device)
        keep[:, :extra] = True
        keep.scatter_(1, indices + extra, True)
        if self.budget.auto:
            output.pooler_output = [
                features[: extra + count]
                for features, count in zip(output.pooler_output, counts, strict=True)
            ]
        first = patches * torch.arange(pictures, device=indices.device).unsqueeze(1)
        shape = grid if modality == "image" else (pictures, *grid)
        items = []
        for start, score in zip(
            range(0, len(indices), pictures), scores.unflatten(0, (-1, pictures)), strict=True
        ):
            own = counts[start : start + pictures]
            items.append(
                Kept(
                    modality,
                    packed(indices[start : start + pictures] + first, own),
                    shape,
                    before=pictures * (extra + patches),
                    after=pictures * extra + sum(own),
                    scores=score.flatten(),
                    lengths=(patches,) * pictures,
                    ranked=tuple(map(self.budget.ranked, own)),
                )
            )
        return Encoded(output, keep.flatten(), tuple(items))


class VideoLlava(Llava):
    """`VideoLlavaForConditionalGeneration`: separate towers for images and videos.

    Each frame is a separate picture. The language model also reads the [CLS] of a frame, so it is
    retained in addition to the k patches.
    """

    model_types = ("video_llava",)
    ragged = frozenset()
    harness: ClassVar[tuple[tuple[str, str, tuple[str, ...]], ...]] = ()
    encoders: ClassVar[Mapping[str, str]] = {
        "image": "get_image_features",
        "video": "get_video_features",
    }
    towers: ClassVar[Mapping[str, str]] = {"image": "image_tower", "video": "video_tower"}

    def extra(self, modality: str, inputs: Mapping[str, Any]) -> int:
        if modality == "video":
            return int(self.has_cls(modality))
        return super().extra(modality, inputs)
