"""InternVL 3 and 3.5: [CLS] scores, tokens of 2 x 2 patches, one picture per tile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from . import costs
from .llava import Llava


class InternVL(Llava):
    """`InternVLForConditionalGeneration`.

    A token is a block of patches; its score is the mean of theirs. Tiles of an image and frames of
    a video are rows of pixel_values, like images; each is pruned separately.
    """

    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    harness: ClassVar[tuple[tuple[str, str, tuple[str, ...]], ...]] = ()
    vllm: ClassVar[Mapping[str, str]] = {
        "InternVLForConditionalGeneration": "internvl:PrunedInternVL"
    }

    ragged = frozenset()

    @property
    def block(self) -> int:
        """Patches along the side of a token."""
        return round(1 / float(self.config.downsample_ratio))

    def grid(self, modality: str, pixels: Tensor) -> tuple[int, int]:
        patch, _ = self.config.vision_config.patch_size
        rows, columns = (side // patch // self.block for side in pixels.shape[-2:])
        return rows, columns

    def extra(self, modality: str, inputs: Mapping[str, Any]) -> int:
        if self.setting("vision_feature_select_strategy", inputs) != "default":
            raise ValueError(
                "vision_feature_select_strategy must be 'default' to be pruned: otherwise [CLS] "
                "becomes part of the grid of patches"
            )
        return 0

    def token_scores(self, modality: str, scores: Tensor) -> Tensor:
        side = round(scores.shape[1] ** 0.5)
        blocks = self.base.pixel_shuffle(
            scores.view(-1, side, side, 1), scale_factor=self.config.downsample_ratio
        )
        return blocks.flatten(1, 2).mean(-1)

    @classmethod
    def picture(cls, config: Any, height: int, width: int) -> dict[str, Any]:
        import torch

        return {"pixel_values": torch.empty(1, 3, *config.vision_config.image_size, device="meta")}

    @classmethod
    def vision_flops(cls, config: Any, inputs: Mapping[str, Any], projected: int) -> int:
        vision, pixels = config.vision_config, inputs["pixel_values"]
        patch, width = int(vision.patch_size[0]), int(vision.hidden_size)
        patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
        layer = costs.encoder_layer(
            patches + 1, patches + 1, width, int(vision.intermediate_size), 2
        )
        tower = int(vision.num_hidden_layers) * layer + 2 * patches * 3 * patch**2 * width
        out = int(config.get_text_config().hidden_size)
        block = round(1 / float(config.downsample_ratio)) ** 2
        return len(pixels) * tower + 2 * projected * (block * width * out + out * out)

    @classmethod
    def projected_patches(cls, config: Any, inputs: Mapping[str, Any]) -> int:
        patch, block = int(config.vision_config.patch_size[0]), 1 / float(config.downsample_ratio)
        height, width = inputs["pixel_values"].shape[-2:]
        return len(inputs["pixel_values"]) * round(height / patch / block * width / patch / block)
