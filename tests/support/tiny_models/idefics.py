"""Idefics3 and SmolVLM: tokens of 2 x 2 patches; rows are padded with zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from .base import IMAGE, PAD, Auto, Item, Row, Tiny, llama, noise, prune


class Idefics3(Tiny):
    name = "idefics3"
    model = "Idefics3"

    def config(self) -> Any:
        vision = getattr(transformers, f"{self.model}VisionConfig")(
            hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            image_size=112, patch_size=14,
        )  # fmt: skip
        return getattr(transformers, f"{self.model}Config")(
            vision_config=vision, text_config=llama(), image_token_id=IMAGE, scale_factor=2,
            pad_token_id=PAD,
        )  # fmt: skip

    def architecture(self) -> Any:
        return getattr(transformers, f"{self.model}ForConditionalGeneration")

    def reader(self, model: Any) -> Any:
        return model.model.text_model

    def length(self, item: Item) -> int:
        return 16

    def media(self, items: Sequence[Item]) -> dict[str, Any]:
        return {"pixel_values": torch.stack([noise(i.number, 3, 112, 112) for i in items])[None]}

    def inputs(self, rows: Sequence[Row], side: str = "left") -> dict[str, Any]:
        inputs = super().inputs(rows, side)
        if "pixel_values" in inputs:
            own = [[noise(p.number, 3, 112, 112) for p in row if isinstance(p, Item)]
                   for row in rows]  # fmt: skip
            most = max(map(len, own))
            blank = torch.zeros(3, 112, 112, dtype=torch.float64)
            inputs["pixel_values"] = torch.stack(
                [torch.stack([*row, *[blank] * (most - len(row))]) for row in own]
            )
        return inputs

    def choose(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        model = self.build(attention="eager").model
        pixels = self.media([item])["pixel_values"][0]
        mask = torch.ones(1, 8, 8, dtype=torch.bool)
        out = model.vision_model(
            pixel_values=pixels, patch_attention_mask=mask, output_attentions=True
        )
        received = out.attentions[-1].float().mean((1, 2)).view(4, 2, 4, 2).mean((1, 3))
        tokens = model.connector(out.last_hidden_state)
        keep = prune(tokens, received.view(1, 16), k)
        return keep[0], tokens[keep]


class SmolVLM(Idefics3):
    name = "smolvlm"
    model = "SmolVLM"
