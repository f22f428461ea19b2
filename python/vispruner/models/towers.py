"""Base of the LLaVA families: a CLIP or SigLIP tower, one feature layer, a projector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..clock import Clock
from ..releases import encoder_layers
from ..selection import Budget
from ..taps import in_this_thread, tower_tap
from . import costs
from .base import Family, UnsupportedModelError

_HAS_CLS = {
    "clip_vision_model": True,
    "idefics3_vision": False,
    "internvl_vision": True,
    "siglip_vision_model": False,
    "smolvlm_vision": False,
}


class TowerFamily(Family):
    """Models that project the patch features of one layer of a CLIP or SigLIP tower.

    Patches of a CLIP tower are scored by the attention of [CLS], those of a SigLIP tower by the
    attention that they receive, both in the feature layer.
    """

    #: modality to the attribute of the base model that holds its tower
    towers: ClassVar[Mapping[str, str]] = {"image": "vision_tower", "video": "vision_tower"}

    def __init__(self, model: Any, budget: Budget, **options: str) -> None:
        super().__init__(model, budget, **options)
        for modality in self.encoders:
            tower = self.tower(modality)
            kind = getattr(tower.config, "model_type", type(tower).__name__)
            if kind not in _HAS_CLS:
                raise UnsupportedModelError(
                    f"cannot read attention from a vision tower of type {kind!r}; supported: "
                    f"{', '.join(sorted(_HAS_CLS))}"
                )
            self.attention(modality, {})

    @classmethod
    def picture(cls, config: Any, height: int, width: int) -> dict[str, Any]:
        side = config.vision_config.image_size
        return {"pixel_values": torch.empty(1, 3, side, side, device="meta")}

    @classmethod
    def vision_flops(cls, config: Any, inputs: Mapping[str, Any], projected: int) -> int:
        return costs.tower(config, inputs) + costs.projector(config, projected)

    @classmethod
    def projected_patches(cls, config: Any, inputs: Mapping[str, Any]) -> int:
        return costs.patches_of(config, inputs)

    def tower(self, modality: str) -> Any:
        return getattr(self.base, self.towers[modality])

    def has_cls(self, modality: str) -> bool:
        """Whether the tower has a [CLS] token before its patches."""
        return _HAS_CLS[self.tower(modality).config.model_type]

    def setting(self, name: str, inputs: Mapping[str, Any]) -> Any:
        """A setting that a call can override."""
        value = inputs.get(name)
        return getattr(self.config, name) if value is None else value

    def feature_layer(self, inputs: Mapping[str, Any]) -> Any:
        """Index of the hidden state with the features; -1 is the output of the last layer."""
        return self.setting("vision_feature_layer", inputs)

    def token_scores(self, modality: str, scores: Tensor) -> Tensor:
        """Scores of a picture's tokens, from the scores (B, N) of its patches."""
        return scores

    def attention(self, modality: str, inputs: Mapping[str, Any]) -> Any:
        """The attention of the feature layer.

        Raises:
            UnsupportedModelError: there is more than one feature layer, or it is the embedding.
        """
        tower = self.tower(modality)
        layers = encoder_layers(tower)
        layer = self.feature_layer(inputs)
        states = len(layers) + 1  # hidden state 0 is the embedding, state i the output of layer i-1
        if not isinstance(layer, int) or not -states <= layer < states or layer % states == 0:
            raise UnsupportedModelError(
                "pruning reads the attention of the feature layer, so "
                f"vision_feature_layer must be one encoder layer, got {layer!r} with "
                f"{len(layers)} layers"
            )
        own = layers[layer % states - 1]
        return own.self_attn if hasattr(own, "self_attn") else own.attention

    def extra(self, modality: str, inputs: Mapping[str, Any]) -> int:
        """Features before the patches: 1 if the language model also reads [CLS]."""
        cls = int(self.has_cls(modality))
        if self.setting("vision_feature_select_strategy", inputs) == "full":
            return cls
        if not cls:
            raise UnsupportedModelError(
                "vision_feature_select_strategy='default' drops the first feature, which is a "
                "patch in a tower without [CLS]: use 'full'"
            )
        return 0

    def grid(self, modality: str, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of pixels (..., H, W)."""
        patch = int(self.tower(modality).config.patch_size)
        return pixels.shape[-2] // patch, pixels.shape[-1] // patch

    @contextmanager
    def projecting(
        self,
        modality: str,
        inputs: Mapping[str, Any],
        clock: Clock,
        before: Callable[[Tensor, Tensor], Tensor],
    ) -> Iterator[None]:
        """Inside the block, `before(features, scores)` returns the input of the projector.

        features: (B, N or 1 + N, C) of the feature layer; scores: (B, N).

        Raises:
            RuntimeError: the block ended without a call of `before`.
        """
        called = False

        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            nonlocal called
            called = True
            with clock("score"):
                scores = self.token_scores(modality, tap.scores())
            with clock("select"):
                return (before(args[0], scores),)

        attention = self.attention(modality, inputs)
        with tower_tap(attention, has_cls=self.has_cls(modality)) as tap:
            handle = self.base.multi_modal_projector.register_forward_pre_hook(in_this_thread(hook))
            try:
                yield
            finally:
                handle.remove()
            if not called:
                tap.scores()  # raises its error if the tower did not call its hooks either
                raise RuntimeError(
                    f"{self.encoders[modality]} ran the vision tower without calling "
                    "multi_modal_projector, whose input pruning selects: a replaced method must "
                    "call both"
                )

    def select(self, features: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Selects patches by the budget, and retains [CLS] if the features begin with it.

        Args:
            features: (B, N, C) or (B, 1 + N, C); scores: (B, N).

        Returns:
            (B, k, C) or (B, 1 + k, C), (B, k) int64 indices of patches, and the number of retained
            patches of each picture, as from `Budget.select`.
        """
        extra = features.shape[1] - scores.shape[1]
        kept, indices, counts = self.budget.select(features[:, extra:], scores)
        return (torch.cat([features[:, :extra], kept], 1) if extra else kept), indices, counts
