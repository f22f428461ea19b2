"""Gemma 3: patches averaged to tokens, which attend to each other both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from .base import END, IMAGE, PAD, START, Auto, Item, Tiny, noise, prune, siglip


class Gemma3(Tiny):
    name = "gemma3"

    def config(self) -> Any:
        vision = siglip()
        vision.image_size = 112
        text = transformers.Gemma3TextConfig(
            vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=64,
            max_position_embeddings=4096, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=16,
        )  # fmt: skip
        return transformers.Gemma3Config(
            vision_config=vision, text_config=text, mm_tokens_per_image=16,
            image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
        )  # fmt: skip

    def architecture(self) -> Any:
        return transformers.Gemma3ForConditionalGeneration

    def length(self, item: Item) -> int:
        return 16

    def tokens(self, item: Item) -> list[int]:
        return [START, *super().tokens(item), END]

    def typed(self, ids: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": (ids == IMAGE).int()}

    def media(self, items: Sequence[Item]) -> dict[str, Any]:
        return {"pixel_values": torch.stack([noise(i.number, 3, 112, 112) for i in items])}

    def choose(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        model = self.build(attention="eager").model
        out = model.vision_tower(self.media([item])["pixel_values"], output_attentions=True)
        received = out.attentions[-1].float().mean((1, 2)).view(1, 1, 8, 8)
        tokens = model.multi_modal_projector(out.last_hidden_state)
        keep = prune(tokens, F.avg_pool2d(received, 2).flatten(1), k)
        return keep[0], tokens[keep]

    def mask(self, model: Any, ids: Tensor, embeds: Tensor) -> Any:
        """Causal, but bidirectional within an image; sliding and full attention are equal here."""
        visual = ids[0] == IMAGE
        run = (visual & ~F.pad(visual[:-1], (1, 0))).cumsum(0).masked_fill(~visual, -1)
        length = embeds.shape[1]
        run = F.pad(run, (0, length - len(run)), value=-1)
        sees = torch.ones(length, length, dtype=torch.bool).tril()
        sees |= (run[:, None] == run[None]) & (run[:, None] >= 0)
        return dict.fromkeys(("full_attention", "sliding_attention"), sees[None, None])
