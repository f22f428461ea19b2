"""Runs a CLIP vision tower and collects what pruning needs from one of its layers.

The method takes patch features and [CLS] attention from the same encoder layer; LLaVA-1.5 uses
the last but one (feature layer -2). Asking transformers for attention weights would put every
layer on the eager implementation and materialize (1 + N) x (1 + N) weights a head. Here, hooks on
that one layer keep the query of [CLS] and the keys, which the layer computes anyway, and the
encoder stays on scaled-dot-product attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from . import scores

#: The tower of LLaVA-1.5, CLIP ViT-L/14 at 336 pixels: 24 x 24 patches.
LLAVA_1_5 = {
    "image_size": 336,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
}


# Of the training data of CLIP: all of its checkpoints use them.
_PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
_PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

# Loosely typed in transformers, in ways that change from version to version.
_Config: Any = CLIPVisionConfig
_Model: Any = CLIPVisionModel


class TowerError(ValueError):
    """A tower that cannot be loaded or used; the message is one line."""


@dataclass(frozen=True)
class LayerCues:
    """What one encoder layer says about its patches.

    Attributes:
        feats: (B, N, C) hidden states after the layer, without [CLS].
        q_cls: (B, H, D) query of [CLS], before scaling.
        keys: (B, H, 1 + N, D) keys, [CLS] first.
        scale: factor of the attention logits.
    """

    feats: Tensor
    q_cls: Tensor
    keys: Tensor
    scale: float


def cls_attention(cues: LayerCues) -> Tensor:
    """Attention of [CLS] to every patch, mean over heads: (B, N) float32."""
    return scores.cls_attention(cues.q_cls, cues.keys, cues.scale)


class LayerTap:
    """Hooks that keep the output, the [CLS] query and the keys of one encoder layer.

    Args:
        layer: a CLIP encoder layer (with `self_attn.q_proj` and `self_attn.k_proj`).
    """

    def __init__(self, layer: Any) -> None:
        self._attention = layer.self_attn
        self._seen: dict[str, Tensor] = {}
        self._handles = [
            self._attention.q_proj.register_forward_hook(self._keep_q),
            self._attention.k_proj.register_forward_hook(self._keep_k),
            layer.register_forward_hook(self._keep_output),
        ]

    def _keep_q(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._seen["q"] = output[:, :1]

    def _keep_k(self, module: nn.Module, args: object, output: Tensor) -> None:
        self._seen["k"] = output

    def _keep_output(self, module: nn.Module, args: object, output: Any) -> None:
        self._seen["hidden"] = output[0] if isinstance(output, tuple) else output

    def pop(self) -> LayerCues:
        """The cues of the last forward pass; they are kept once."""
        q, k, hidden = (self._seen.pop(name) for name in ("q", "k", "hidden"))
        heads: int = self._attention.num_heads
        return LayerCues(
            feats=hidden[:, 1:],
            q_cls=q.unflatten(-1, (heads, -1))[:, 0],
            keys=k.unflatten(-1, (heads, -1)).transpose(1, 2),
            scale=float(self._attention.scale),
        )

    def remove(self) -> None:
        """Takes the hooks off the layer."""
        for handle in self._handles:
            handle.remove()
        self._seen.clear()


def _pixels(image: Image.Image, side: int) -> Tensor:
    """(3, side, side) uint8, resized and cropped as CLIPImageProcessor does it."""
    shorter = min(image.size)
    width, height = (side * edge // shorter for edge in image.size)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    square = resized.crop((left, top, left + side, top + side))
    flat = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return flat.view(side, side, 3).permute(2, 0, 1)


class ClipTower:
    """A CLIP vision tower with a tap on its feature layer.

    Args:
        model: the tower, in eval mode, on its device.
        feature_layer: index into the hidden states, as `vision_feature_layer` of LLaVA: -2 is the
            output of the last encoder layer but one.
    """

    def __init__(self, model: CLIPVisionModel, feature_layer: int = -2) -> None:
        self.model = model
        self.config: Any = model.config
        # transformers 5.23 has the encoder in the model, earlier versions in model.vision_model
        layers = getattr(model, "vision_model", model).encoder.layers
        states = len(layers) + 1  # hidden state 0 is the embedding, state i the output of i - 1
        if not 1 <= feature_layer % states <= len(layers) or not -states <= feature_layer < states:
            raise TowerError(
                f"feature layer {feature_layer} is not the output of one of {len(layers)} layers"
            )
        self._tap = LayerTap(layers[feature_layer % states - 1])

    @classmethod
    def random(
        cls,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        **shape: int,
    ) -> ClipTower:
        """A tower with random weights, of LLaVA-1.5's shape except for what `shape` names."""
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

        Only safetensors files are read: loading one cannot run code.

        Raises:
            TowerError: there is none, or it is not a CLIP vision tower.
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
        """(B, 3, S, S) pixel values: shorter side to S, centre crop, CLIP's mean and deviation."""
        side: int = self.config.image_size
        pixels = torch.stack([_pixels(image, side) for image in images])
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (_PIXEL_MEAN, _PIXEL_STD))
        normalized = (pixels.float() / 255 - mean) / std
        return normalized.to(device=self.model.device, dtype=self.model.dtype)

    @torch.inference_mode()
    def encode(self, pixel_values: Tensor) -> LayerCues:
        """Runs the tower and returns the cues of the feature layer."""
        self.model(pixel_values=pixel_values)
        return self._tap.pop()
