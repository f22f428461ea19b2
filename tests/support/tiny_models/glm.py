"""GLM's families: Qwen's layout, images only."""

from __future__ import annotations

from typing import Any, ClassVar

from .base import END, IMAGE, START, VIDEO
from .qwen_more import _Variant


class Glm4v(_Variant):
    name = "glm4v"
    model = "Glm4v"
    kinds: ClassVar[tuple[str, ...]] = ("image",)
    patch = 14

    def vision(self) -> dict[str, Any]:
        own = {"image_size": 112, "in_channels": 3, "rms_norm_eps": 1e-5}
        return super().vision() | own

    def special(self) -> dict[str, int]:
        return {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START,
                "image_end_token_id": END, "video_start_token_id": 195,
                "video_end_token_id": 194}  # fmt: skip


class Glm4vMoe(Glm4v):
    name = "glm4v-moe"
    model = "Glm4vMoe"
    more: ClassVar[dict[str, Any]] = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    }  # fmt: skip


class Glm46V(Glm4v):
    name = "glm46v"
    model = "Glm46V"
    more: ClassVar[dict[str, Any]] = {"model_type": "glm4v_text"}

    def vision(self) -> dict[str, Any]:
        return {"model_type": "glm4v_vision", **super().vision()}


class GlmOcr(Glm4v):
    """Its vision transformer normalizes queries and keys."""

    name = "glm-ocr"
    model = "GlmOcr"
