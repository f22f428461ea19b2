"""LLaVA-OneVision: tokens are chosen after projection, packing and pooling.

An image keeps k tokens of the overview, k per tile of its other pooled tokens, and all line ends,
as in `vispruner.models.llava_onevision`. All of these counts follow from its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
)
from vllm.config import VllmConfig
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)

from ..models import UnsupportedModelError
from ..selection import Budget
from .config import KEY
from .llava_next import patches_of, tiles_of
from .model import encoder_batches
from .processing import RETAINED, PrunedInfo, PrunedProcessor, register_processor
from .towers import PrunedTowerModel


class _Info(PrunedInfo, LlavaOnevisionProcessingInfo):
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": super().get_supported_mm_limits()["image"]}  # videos are answered with 400

    def most_retained(self) -> int:
        size = self.get_image_size_with_most_features()
        return sum(self.layout((size.height, size.width), self.pruning.cap))

    def layout(self, size: Any, budget: Budget) -> tuple[int, int, int]:
        """Numbers of retained tokens of the overview and of the pooled tiles, and of line ends.

        Args:
            size: (height, width) of an image.
        """
        height, width = (int(x) for x in size)
        config = self.get_hf_config()
        patches = patches_of(config)
        whole = int(self.get_num_image_tokens(image_width=width, image_height=height))
        side = config.vision_config.image_size
        rows, columns = get_anyres_image_grid_shape(
            (height, width), config.image_grid_pinpoints, side
        )
        _, ends = self._get_num_unpadded_features(
            original_height=height,
            original_width=width,
            npatches=side // config.vision_config.patch_size,
            num_patch_height=rows,
            num_patch_width=columns,
        )
        rest = whole - patches - ends
        return budget.count(patches), budget.count(rest, rows * columns), ends


class _Processor(PrunedProcessor, LlavaOnevisionMultiModalProcessor):
    def retained(self, processed: Mapping[str, Any], budget: Budget) -> dict[str, Any]:
        """Three numbers per image: those of `_Info.layout`."""
        if processed.get("pixel_values") is None:
            return {}
        return {"image": [self.info.layout(size, budget) for size in processed["image_sizes"]]}

    def shortened(self, tokens: Any, retained: Any, item: Mapping[str, Any]) -> Any:
        return tokens[: sum(retained)]


@register_processor(_Info, _Processor)
class PrunedLlavaOnevision(PrunedTowerModel, LlavaOnevisionForConditionalGeneration):
    """`LlavaOnevisionForConditionalGeneration` with k visual tokens per tile."""

    stock = LlavaOnevisionForConditionalGeneration

    @classmethod
    def check(cls, hf_config: Any) -> None:
        super().check(hf_config)
        if (own := hf_config.vision_aspect_ratio) != "anyres_max_9":
            raise UnsupportedModelError(
                f"{KEY}: needs vision_aspect_ratio='anyres_max_9', the only one that vLLM has, got "
                f"{own!r}"
            )

    @classmethod
    def refused_options(cls, vllm_config: VllmConfig) -> dict[str, tuple[bool, str]]:
        return {
            **super().refused_options(vllm_config),
            "LoRA": (vllm_config.lora_config is not None, "vLLM has none for this model"),
        }

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The retained tokens and the line ends of each image."""
        retained = kwargs.pop(RETAINED["image"], None)
        if retained is None:  # embeddings passed by the client
            return super().embed_multimodal(**kwargs)
        given = self._parse_and_validate_image_input(**kwargs)
        sizes, patches = given["image_sizes"], patches_of(self.config)
        layouts = [torch.as_tensor(numbers).flatten().tolist() for numbers in retained]
        # In a batch with larger images an image is padded with empty tiles.
        tiles = [tiles_of(self.config, size) for size in sizes]
        pixels = [own[:count] for own, count in zip(given["pixel_values"], tiles, strict=True)]
        embeddings: list[Tensor] = []
        for part in encoder_batches([patches * count for count in tiles], self.encoder_tokens):
            features, scores = self.encode(torch.cat(pixels[part]))
            projected = self.multi_modal_projector(features)
            packed = [
                self._packed(*image)
                for image in zip(
                    sizes[part],
                    projected.split(tiles[part]),
                    scores.split(tiles[part]),
                    (ends for _, _, ends in layouts[part]),
                    strict=True,
                )
            ]
            lengths = [n for _, own, _ in packed for n in (patches, len(own) - patches)]
            counts = [n for overview, rest, _ in layouts[part] for n in (overview, rest)]
            _, rows = self.choose(
                torch.cat([whole[where] for whole, where, _ in packed]),
                torch.cat([own for _, _, own in packed]),
                lengths,
                counts,
            )
            of_images = [overview + rest for overview, rest, _ in layouts[part]]
            start = 0
            for (whole, where, _), own in zip(packed, rows.split(of_images), strict=True):
                stays = torch.ones(len(whole), dtype=torch.bool, device=whole.device)
                stays[where] = False
                stays[where[own - start]] = True
                count = len(whole) - len(where) + len(own)
                order = torch.argsort((~stays).to(torch.uint8), stable=True)[:count]
                embeddings.append(whole[order])
                start += len(where)
        return embeddings

    def _packed(
        self, size: Tensor, tiles: Tensor, scores: Tensor, ends: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """An unpruned image: its tokens, a mask of those that are not line ends, and the scores of
        these.

        Args:
            size: (height, width); tiles: (tiles, N, C); scores: (tiles, N); ends: line ends.
        """
        whole, marks = (
            self._merge_image_patch_embeddings(
                size, x, image_newline=line_end, strategy="spatial_unpad"
            )
            for x, line_end in (
                (tiles, self.image_newline),
                (scores.unsqueeze(-1), scores.new_zeros(1)),
            )
        )
        overview = torch.arange(tiles.shape[1], device=whole.device)
        rest = torch.arange(len(overview), len(whole), device=whole.device)
        if ends:  # no row of a very thin image is left after its padding is cut off
            rest = rest.view(ends, -1)[:, :-1].flatten()
        where = torch.cat([overview, rest])
        return whole, where, marks[where, 0]
