"""GLM-4.1V, GLM-4.5V, GLM-4.6V and GLM-OCR: Qwen's layout, merged by a convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from . import costs
from .qwen_vl import QwenVL


class Glm(QwenVL):
    """`Glm4v...`, `Glm4vMoe...`, `Glm46V...` and `GlmOcrForConditionalGeneration`, images only.

    In these models, frames of videos have the placeholders of images, so the prompt does not show
    which of the two a placeholder is.
    """

    model_types: ClassVar[tuple[str, ...]] = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr")
    harness: ClassVar[tuple[tuple[str, str, tuple[str, ...]], ...]] = ()
    encoders: ClassVar[Mapping[str, str]] = {"image": "get_image_features"}

    def inputs_of(self, modality: str, call: Mapping[str, Any]) -> dict[str, Any] | None:
        if call.get("pixel_values_videos") is not None:
            raise ValueError(
                f"pixel_values_videos cannot be pruned in {self.config.model_type}, whose videos "
                "have the placeholders of images: pass frames as images, or remove() the pruner"
            )
        return super().inputs_of(modality, call)

    @classmethod
    def vision_flops(cls, config: Any, inputs: Mapping[str, Any], projected: int) -> int:
        vision = config.vision_config
        merge, width = int(vision.spatial_merge_size), int(vision.hidden_size)
        out, inner = int(vision.out_hidden_size), int(vision.intermediate_size)
        pixels = inputs["pixel_values"]
        # Widths of the layers' and the merger's MLPs: the output's and the configured one, or the
        # reverse.
        ocr = config.model_type == "glm_ocr"
        mlp, context = (inner, out * int(vision.in_channels)) if ocr else (out, inner)
        total = 2 * pixels.shape[0] * pixels.shape[1] * width
        for frames, rows, columns in inputs["image_grid_thw"].tolist():
            cells = rows * columns
            layer = costs.encoder_layer(cells, cells, width, mlp, 3)
            merged = frames * cells // merge**2
            total += frames * int(vision.depth) * layer
            total += 2 * merged * (merge**2 * width * out + out * out + 3 * out * context)
        return total
