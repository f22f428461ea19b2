"""Gemma 3: patches of a SigLIP tower are averaged to 16 x 16 tokens per picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from .. import releases
from . import costs
from .pooled import PooledFamily


class Gemma3(PooledFamily):
    """`Gemma3ForConditionalGeneration`; its retained tokens attend to each other both ways."""

    model_types: ClassVar[tuple[str, ...]] = ("gemma3",)

    not_prepared = "its bidirectional masks for image tokens are made inside the model"

    def check_continued(self) -> None:
        if not releases.masks_images_behind_a_cache():
            raise ValueError(
                "this release of transformers masks new images after a cache wrongly in gemma3, "
                "pruned or not: pass the whole conversation without the cache, or use 5.23 or newer"
            )

    def tokens(self) -> tuple[int, int]:
        side = int(self.config.mm_tokens_per_image**0.5)
        return side, side

    def token_scores(self, modality: str, scores: Tensor) -> Tensor:
        projector = self.base.multi_modal_projector
        side = projector.patches_per_image
        return projector.avg_pool(scores.view(-1, 1, side, side)).flatten(1)

    @classmethod
    def vision_flops(cls, config: Any, inputs: Mapping[str, Any], projected: int) -> int:
        tokens = len(inputs["pixel_values"]) * int(config.mm_tokens_per_image)
        width, out = config.vision_config.hidden_size, config.get_text_config().hidden_size
        return costs.tower(config, inputs) + 2 * tokens * int(width) * int(out)
