"""InternVL: [CLS] scores of patches, tokens of 2 x 2 of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from .base import IMAGE, Auto, Item, Tiny, llama, noise, prune


class InternVL(Tiny):
    name = "internvl"
    normed = False

    def config(self) -> Any:
        vision = transformers.InternVLVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            image_size=[112, 112], patch_size=[14, 14], use_qk_norm=self.normed,
        )  # fmt: skip
        return transformers.InternVLConfig(
            vision_config=vision, text_config=llama(), image_token_id=IMAGE, image_seq_length=16,
            downsample_ratio=0.5,
        )  # fmt: skip

    def architecture(self) -> Any:
        return transformers.InternVLForConditionalGeneration

    def length(self, item: Item) -> int:
        return 16

    def media(self, items: Sequence[Item]) -> dict[str, Any]:
        return {"pixel_values": torch.stack([noise(i.number, 3, 112, 112) for i in items])}

    def choose(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        model = self.build(attention="eager").model
        pixels = self.media([item])["pixel_values"]
        out = model.vision_tower(pixels, output_attentions=True)
        scores = out.attentions[-1].float()[0, :, 0, 1:].mean(0).view(4, 2, 4, 2).mean((1, 3))
        hidden = out.last_hidden_state[:, 1:].view(1, 8, 8, -1)
        tokens = model.pixel_shuffle(hidden, 0.5).view(1, 16, -1)
        keep = prune(tokens, scores.view(1, 16), k)
        return keep[0], model.multi_modal_projector(tokens)[keep]


class InternVLNormed(InternVL):
    """The larger ones normalize queries and keys of the tower."""

    name = "internvl-qk-norm"
    normed = True
