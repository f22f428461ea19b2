"""Shared by the LLaVA models: a CLIP or SigLIP tower whose last built layer computes the
features."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig, SiglipVisionConfig

from .. import selection
from ..models import UnsupportedModelError
from .config import KEY
from .model import AttentionTap, PrunedModel, over_all_heads


class PrunedTowerModel(PrunedModel):
    """Mixin for a LLaVA model of vLLM, as its first base."""

    config: Any
    vision_tower: Any

    @classmethod
    def check(cls, hf_config: Any) -> None:
        tower = hf_config.vision_config
        if not isinstance(tower, CLIPVisionConfig | SiglipVisionConfig):
            raise UnsupportedModelError(
                f"{KEY}: needs a CLIP or SigLIP vision tower, whose attention ranks the patches; "
                f"this one is {tower.model_type!r}"
            )
        # The features must be all patches, without [CLS].
        own = hf_config.vision_feature_select_strategy
        needed = "default" if _has_cls(hf_config) else "full"
        if own != needed:
            raise UnsupportedModelError(
                f"{KEY}: needs vision_feature_select_strategy={needed!r} with a tower of type "
                f"{tower.model_type!r}, got {own!r}"
            )
        # vLLM builds the tower up to the feature layer, so that layer is the last one.
        layer, layers = hf_config.vision_feature_layer, tower.num_hidden_layers
        if not isinstance(layer, int) or not -layers <= layer <= layers or layer == 0:
            raise UnsupportedModelError(
                f"{KEY}: vision_feature_layer must be one encoder layer, got {layer!r} with "
                f"{layers} layers"
            )

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the tower.

        Args:
            pixels: (B, 3, H, W).

        Returns:
            (B, N, C) features of the patches and (B, N) float32 scores: the attention of [CLS] to
            them or, in a tower without [CLS], the attention that they receive.
        """
        layer = self.vision_tower.vision_model.encoder.layers[-1].self_attn
        with AttentionTap(layer.attn) as tap:
            features: Tensor = self._image_pixels_to_features(self.vision_tower, pixels)
        heads = (layer.num_heads_per_partition, layer.head_dim)
        q, k = (x.unflatten(-1, heads) for x in tap.take())  # (B, tokens, H, D)
        with self.timing("scoring"):
            if _has_cls(self.config):
                scores = selection.cls_attention(q[:, 0], k.transpose(1, 2), layer.scale)
            else:
                bounds = range(0, q.shape[0] * q.shape[1] + 1, q.shape[1])
                scores = selection.received_attention(
                    q.flatten(0, 1), k.flatten(0, 1), layer.scale, list(bounds)
                ).view(q.shape[:2])
            scores = over_all_heads(scores, layer.tp_size)
        return features, scores


def _has_cls(hf_config: Any) -> bool:
    """Whether the tower has [CLS] before its patches."""
    return isinstance(hf_config.vision_config, CLIPVisionConfig)
