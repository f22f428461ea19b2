"""Runs a CLIP vision tower and collects what pruning needs from one of its layers.

The method takes patch features and [CLS] attention from one encoder layer; LLaVA-1.5 uses the
second to last (feature layer -2). Requesting attention weights from transformers would switch every
layer to the eager implementation and materialize (1 + N) x (1 + N) weights per head. Instead, hooks
on this layer record the query of [CLS] and the keys, which the layer computes anyway, and the
encoder stays on scaled-dot-product attention. (:mod:`vispruner.taps` has the hooks.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from .releases import encoder_layers
from .shapes import MODELS
from .taps import tower_tap

#: The tower of LLaVA-1.5, CLIP ViT-L/14 at 336 pixels: 24 x 24 patches.
LLAVA_1_5 = {
    name: value
    for name, value in MODELS["llava-1.5-7b"]["vision_config"].items()
    if name != "model_type"
}

# Loosely typed in transformers, differently in each release.
_Config: Any = CLIPVisionConfig
_Model: Any = CLIPVisionModel
_ImageProcessor: Any = CLIPImageProcessorPil


class TowerError(ValueError):
    """A tower that cannot be loaded or used; the message is one line."""


@dataclass(frozen=True)
class LayerCues:
    """Features and scores of the patches in one encoder layer.

    Attributes:
        feats: (B, N, C) hidden states after the layer, without [CLS].
        scores: (B, N) float32, attention of [CLS] to every patch, mean over heads.
    """

    feats: Tensor
    scores: Tensor


class ClipTower:
    """A CLIP vision tower with a tap on its feature layer.

    Args:
        model: the tower, in eval mode, on its device.
        feature_layer: index into the hidden states, like LLaVA's `vision_feature_layer`: -2 is the
            output of the second to last encoder layer.
    """

    def __init__(self, model: CLIPVisionModel, feature_layer: int = -2) -> None:
        self.model = model
        self.config: Any = model.config
        side: Any = self.config.image_size
        #: resizes the shorter side, crops the centre, normalizes as all CLIP checkpoints do
        self.image_processor: Any = _ImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        layers = encoder_layers(model)
        states = len(layers) + 1  # hidden state 0 is the embedding, state i the output of i - 1
        if not 1 <= feature_layer % states <= len(layers) or not -states <= feature_layer < states:
            raise TowerError(
                f"feature layer {feature_layer} is not the output of one of {len(layers)} layers"
            )
        self._layer = layers[feature_layer % states - 1]

    @classmethod
    def random(
        cls,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **shape: int,
    ) -> ClipTower:
        """A tower with random weights and LLaVA-1.5's shape, except for the settings in `shape`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _Model(_Config(**{**LLAVA_1_5, **shape}))
        return cls(model.to(device=device, dtype=dtype).eval())

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ClipTower:
        """The vision tower of a CLIP checkpoint: a directory or a name on the Hugging Face hub.

        Only safetensors files are read; loading them cannot run code.

        Raises:
            TowerError: there is no such checkpoint, or it has no CLIP vision tower.
        """
        try:
            model, info = _Model.from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
        except Exception as error:  # hub, file, JSON and safetensors errors have no common base
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TowerError(f"cannot load a CLIP vision tower from {name!r}: {reason}") from error
        absent = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
        if absent:  # transformers would fill them with random values
            raise TowerError(
                f"{name!r} is not a CLIP vision tower: it lacks {len(absent)} of its weights, "
                f"such as {absent[0]}"
            )
        return cls(model.to(device).eval())

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.config.image_size // self.config.patch_size
        return side, side

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 3, S, S) pixel values of images of any size."""
        pixels: Tensor = self.image_processor(images=list(images), return_tensors="pt")[
            "pixel_values"
        ]
        return pixels.to(device=self.model.device, dtype=self.model.dtype)

    @torch.inference_mode()
    def encode(self, pixel_values: Tensor) -> LayerCues:
        """Runs the tower and returns the cues of the feature layer."""
        hidden: list[Tensor] = []

        def record(module: object, args: object, output: Any) -> None:
            hidden.append(output[0] if isinstance(output, tuple) else output)

        handle = self._layer.register_forward_hook(record)
        try:
            with tower_tap(self._layer.self_attn, has_cls=True) as tap:
                self.model(pixel_values=pixel_values)
                return LayerCues(hidden[0][:, 1:], tap.scores())
        finally:
            handle.remove()
