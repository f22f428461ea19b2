"""What LLaVA-1.5 and LLaVA-NeXT share: a CLIP tower whose last built layer makes the features."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig

from .. import selection
from ..models import UnsupportedModelError
from .config import KEY
from .model import AttentionTap, PrunedModel, over_all_heads


class PrunedTowerModel(PrunedModel):
    """Mixin before a LLaVA model of vLLM."""

    vision_tower: Any

    @classmethod
    def check(cls, hf_config: Any) -> None:
        tower = hf_config.vision_config
        if not isinstance(tower, CLIPVisionConfig):
            raise UnsupportedModelError(
                f"{KEY}: needs a CLIP vision tower, whose [CLS] token ranks the patches; this one "
                f"is {tower.model_type!r}"
            )
        if hf_config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"{KEY}: needs vision_feature_select_strategy='default', got "
                f"{hf_config.vision_feature_select_strategy!r}"
            )
        # vLLM builds the tower up to the feature layer, so that layer is the last it has.
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
            (B, N, C) features of the patches and (B, N) float32 attention that [CLS] pays them.
        """
        layer = self.vision_tower.vision_model.encoder.layers[-1].self_attn
        with AttentionTap(layer.attn) as tap:
            features: Tensor = self._image_pixels_to_features(self.vision_tower, pixels)
        heads = (layer.num_heads_per_partition, layer.head_dim)
        q, k = (x.unflatten(-1, heads) for x in tap.take())  # (B, 1 + N, H, D)
        with self.timing("scoring"):
            scores = selection.cls_attention(q[:, 0], k.transpose(1, 2), layer.scale)
            scores = over_all_heads(scores, layer.tp_size)
        return features, scores
