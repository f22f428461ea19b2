"""Qwen's families that differ from Qwen3-VL in the language model, or have no deepstack."""

from __future__ import annotations

from typing import Any, ClassVar

import transformers
from torch import Tensor

from .base import Auto, Item, Qwen3

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
}  # fmt: skip


class _Variant(Qwen3):
    model: ClassVar[str]
    more: ClassVar[dict[str, Any]] = {}
    deep: ClassVar[bool] = False

    def text(self) -> dict[str, Any]:
        text = super().text() | {"head_dim": 16} | self.more
        text["rope_parameters"] = text["rope_parameters"] | {
            "mrope_interleaved": True, "partial_rotary_factor": 1.0,
        }  # fmt: skip
        return text

    def vision(self) -> dict[str, Any]:
        vision = {
            "depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
            "out_hidden_size": 64, "patch_size": self.patch, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "num_position_embeddings": 64,
        }  # fmt: skip
        return vision | ({"deepstack_visual_indexes": [0, 1]} if self.deep else {})

    def config(self) -> Any:
        config = getattr(transformers, f"{self.model}Config")
        return config(vision_config=self.vision(), text_config=self.text(), **self.special())

    def architecture(self) -> Any:
        return getattr(transformers, f"{self.model}ForConditionalGeneration")

    def deepstack(self, item: Item, k: int | Auto) -> list[Tensor] | None:
        return super().deepstack(item, k) if self.deep else None


class Qwen3Moe(_Variant):
    name = "qwen3-vl-moe"
    model, more, deep = "Qwen3VLMoe", EXPERTS, True


class Qwen35(_Variant):
    name = "qwen3.5"
    tolerance = 1e-4  # its linear attention is computed in float32, pruned or not
    model, more = "Qwen3_5", LINEAR


class Qwen35Moe(Qwen35):
    name = "qwen3.5-moe"
    model, more = "Qwen3_5Moe", LINEAR | EXPERTS | {"shared_expert_intermediate_size": 32}


__all__ = ["EXPERTS", "Qwen3Moe", "Qwen35", "Qwen35Moe"]
