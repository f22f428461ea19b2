"""LLaVA-OneVision: tokens are pooled after the projector, and selected after pooling."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..clock import Clock
from ..report import Kept
from .base import VIDEO_PIXELS, Encoded, keep_rows
from .llava_next import TiledFamily


class _OneOfSeveral(int):
    """A number of images in a sample that counts one image and does not equal 1.

    The model cuts an image into tiles if the number of its sample equals 1. The others of the
    sample may be in the cache, so that only this one is encoded.
    """

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def _alone(groups: Any) -> list[bool]:
    """Whether each image is the only one of its sample, by the numbers of images in samples."""
    return [bool(count == 1) for count in groups for _ in range(count)]


class LlavaOnevision(TiledFamily):
    """`LlavaOnevisionForConditionalGeneration` with a SigLIP tower.

    Scores are packed and pooled like the features. An image retains k tokens of the overview, and k
    tokens per tile of the pooled rest; a video retains k tokens per frame. Line ends are retained.
    """

    model_types = ("llava_onevision",)
    vllm: ClassVar[Mapping[str, str]] = {
        "LlavaOnevisionForConditionalGeneration": "llava_onevision:PrunedLlavaOnevision"
    }
    encoders: ClassVar[Mapping[str, str]] = {
        "image": "get_image_features",
        "video": "get_video_features",
    }

    ragged = frozenset({"image"})

    def tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        tiles = super().tiles(inputs)
        groups = inputs.get("batch_num_images")
        if groups is None:
            return tiles
        alone = _alone(groups)
        if len(alone) != len(tiles):
            raise ValueError(
                f"batch_num_images has {len(alone)} images, image_sizes {len(tiles)}: pass what "
                "the processor returns"
            )
        return [count if one else 1 for count, one in zip(tiles, alone, strict=True)]

    def take(
        self, modality: str, inputs: Mapping[str, Any], items: Sequence[int]
    ) -> dict[str, Any]:
        fewer = super().take(modality, inputs, items)
        groups = inputs.get("batch_num_images")
        if modality == "image" and groups is not None:
            alone = _alone(groups)
            fewer["batch_num_images"] = [1 if alone[item] else _OneOfSeveral(1) for item in items]
        return fewer

    def pack(
        self, channels: list[Tensor], inputs: Mapping[str, Any], line_end: Tensor
    ) -> list[Tensor]:
        packed, _ = self.base.pack_image_features(
            channels,
            inputs["image_sizes"],
            image_newline=line_end,
            vision_aspect_ratio=self.setting("vision_aspect_ratio", inputs),
        )
        return list(packed)

    def placeholders(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        if modality == "image":
            tiles = self.tiles(inputs)
            pixels = inputs["pixel_values"]
            self.check_pixels(pixels, tiles)
            return self.packed_lengths(tiles, inputs)
        pixels = inputs[VIDEO_PIXELS]
        rows, columns = self._pooled()
        return [pixels.shape[1] * rows * columns + 1] * len(pixels)

    def kept(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        if modality == "video":
            frames = inputs[VIDEO_PIXELS].shape[1]
            rows, columns = self._pooled()
            return [frames * self.budget.count(rows * columns) + 1] * len(inputs[VIDEO_PIXELS])
        tiles = self.tiles(inputs)
        ends = self.line_ends(tiles, inputs)
        lengths = self.packed_lengths(tiles, inputs)
        return [
            end + sum(map(self.budget.count, *self._parts(length - end, count)))
            for end, length, count in zip(ends, lengths, tiles, strict=True)
        ]

    def _parts(self, tokens: int, tiles: int) -> tuple[list[int], list[int]]:
        """Tokens and tiles of an image's overview and of its pooled rest, if it has one."""
        patches = self.patches()[0] * self.patches()[1]
        rest = tokens - patches  # 0 if the model cuts off a thin image with its padding
        return ([patches, rest], [1, tiles - 1]) if rest else ([patches], [1])

    def _pooled(self) -> tuple[int, int]:
        """Rows and columns of a frame's tokens."""
        rows, columns = self.patches()
        return math.ceil(rows / 2), math.ceil(columns / 2)

    def encode(self, modality: str, inputs: Mapping[str, Any], clock: Clock) -> Encoded:
        scores = torch.empty(0)

        def look(features: Tensor, received: Tensor) -> Tensor:
            nonlocal scores
            scores = received
            return features

        arguments = self.encoder_arguments(inputs)
        with self.projecting(modality, inputs, clock, look), clock("vision"):
            output = getattr(self.base, self.encoders[modality])(**arguments, return_dict=True)
        with clock("select"):
            choose = self._images if modality == "image" else self._videos
            return choose(output, scores, inputs)

    def _images(self, output: Any, scores: Tensor, inputs: Mapping[str, Any]) -> Encoded:
        tiles = self.tiles(inputs)
        patches = self.patches()[0] * self.patches()[1]
        channels = [torch.stack([s, torch.zeros_like(s)], -1) for s in scores.split(tiles)]
        line_end = torch.tensor([0.0, 1.0], device=scores.device)
        features, keep, items = [], [], []
        packed = self.pack(channels, inputs, line_end)
        whole = zip(output.pooler_output, packed, tiles, self.line_ends(tiles, inputs), strict=True)
        for image, marks, count, lines in whole:
            # Tokens, then line ends; nonzero would wait for the device.
            order = (marks[:, 1] > 0.5).int().argsort(stable=True)
            tokens, ends = order[: len(order) - lines], order[len(order) - lines :]
            own = marks[tokens, 0]
            lengths, pictures = self._parts(len(tokens), count)
            budgets = self.budget.counts(own, lengths, pictures)
            tokens = tokens.to(image.device)
            _, rows = self.budget.select_packed(image[tokens], own, lengths, budgets)
            stays = torch.cat([tokens[rows], ends.to(image.device)]).sort().values
            features.append(image[stays])
            keep.append(keep_rows(stays, len(image)))
            scored = marks[:, 0].masked_fill(marks[:, 1] > 0.5, -math.inf)  # without line ends
            items.append(
                Kept(
                    "image",
                    stays,
                    (len(image),),
                    before=len(image),
                    after=len(stays),
                    scores=scored,
                    lengths=(patches, len(image) - patches),
                    ranked=tuple(map(self.budget.ranked, budgets)),
                )
            )
        output.pooler_output = features
        return Encoded(output, torch.cat(keep), tuple(items))

    def embeddings_of(self, ids: Tensor, outputs: Mapping[str, Any]) -> dict[str, Any]:
        outputs = dict(outputs)
        if "video" in outputs:
            features = outputs["video"].pooler_output
            slots = int((ids == self.token_id("video")).sum())
            if slots == features.shape[:2].numel() + len(features):
                line_end = self.base.image_newline.expand(len(features), 1, -1).to(features)
                outputs["video"] = copy.copy(outputs["video"])
                outputs["video"].pooler_output = torch.cat([features, line_end], 1)
        return super().embeddings_of(ids, outputs)

    def _videos(self, output: Any, scores: Tensor, inputs: Mapping[str, Any]) -> Encoded:
        videos, frames = inputs[VIDEO_PIXELS].shape[:2]
        rows, columns = self._pooled()
        pooled = self.base.apply_pooling(scores.unsqueeze(-1))[..., 0]  # (videos * frames, n)
        tokens = output.pooler_output[:, : frames * rows * columns]
        line_end = output.pooler_output[:, tokens.shape[1] :]  # added later by the model in 5.17
        kept, indices, _ = self.budget.select(
            tokens.reshape(videos * frames, rows * columns, -1), pooled
        )
        output.pooler_output = torch.cat([kept.reshape(videos, -1, kept.shape[-1]), line_end], 1)

        first = rows * columns * torch.arange(frames, device=indices.device).unsqueeze(1)
        cells = (indices.view(videos, frames, -1) + first).flatten(1)
        before = frames * rows * columns + 1
        keep = torch.zeros((videos, before), dtype=torch.bool, device=cells.device)
        keep[:, -1] = True
        keep.scatter_(1, cells, True)
        items = tuple(
            Kept(
                "video",
                own,
                (frames, rows, columns),
                before=before,
                after=len(own) + 1,
                scores=score,
                lengths=(rows * columns,) * frames,
                ranked=(self.budget.ranked(indices.shape[1]),) * frames,
            )
            for own, score in zip(cells, pooled.view(videos, -1), strict=True)
        )
        return Encoded(output, keep.flatten(), items)
