"""FastV: prunes inside the language model, by the attention of the last prompt token.

After layer K, the visual tokens with the least attention in that layer are dropped; the others keep
their positions. The selection depends on the question, so each row has one question.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .data import IGNORED, Packed
from .model import BOS
from .rules import highest


@dataclass(frozen=True)
class Layer:
    """The language model before one of its layers.

    Attributes:
        hidden: (B, L, C) of [BOS], N visual tokens and the text.
        attention: (B, H, N) of the last prompt token to the visual tokens, in this layer.
    """

    hidden: Tensor
    attention: Tensor


def _last_token_attention(
    layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], last: Tensor
) -> Tensor:
    """(B, H, L) attention of token last[b] of row b in a layer of the language model."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    q, k = apply_rotary_pos_emb(
        heads(attention.q_proj(normed)), heads(attention.k_proj(normed)), *rotary
    )
    rows = torch.arange(len(last), device=last.device)
    logits = torch.einsum("bhd,bhld->bhl", q[rows, :, last], k) * attention.scaling
    later = torch.arange(hidden.shape[1], device=last.device) > last[:, None]
    return logits.masked_fill(later[:, None], -torch.inf).softmax(-1)


def layers(
    model: Any, features: Tensor, packed: Packed, positions: Tensor | None = None
) -> Iterator[Layer]:
    """The full prompt before each layer, with the attention in that layer.

    Args:
        features: (B, N, C); packed: one question per row.
        positions: (B, L) position ids, by default 0 to L - 1.
    """
    language = model.model.language_model
    hidden, positions = embed(model, features, packed, positions)
    rotary = language.rotary_emb(hidden, positions)
    visual = features.shape[1]
    last = 1 + visual + (packed.labels != IGNORED).int().argmax(1)
    for layer in language.layers:
        attention = _last_token_attention(layer, hidden, rotary, last)
        yield Layer(hidden, attention[..., 1 : 1 + visual])
        hidden = layer(hidden, position_ids=positions, position_embeddings=rotary)


def embed(
    model: Any, features: Tensor, packed: Packed, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Embeddings (B, L, C) of the whole prompt, and their position ids (B, L)."""
    table = model.model.language_model.get_input_embeddings()
    begin = torch.full((len(features), 1), BOS, device=features.device)
    parts = [table(begin), model.model.multi_modal_projector(features), table(packed.ids)]
    embedded = torch.cat(parts, 1)
    if positions is None:
        positions = torch.arange(embedded.shape[1], device=features.device)
    return embedded, positions.expand(embedded.shape[:2])


def right_answers(
    model: Any, features: Tensor, packed: Packed, after: Sequence[int], budgets: Sequence[int]
) -> dict[tuple[int, int], Tensor]:
    """Whether greedy decoding is correct with k tokens after layer K.

    Args:
        features: (B, N, C); packed: one question per row.
        after: values of K, from 1; budgets: values of k.

    Returns:
        (K, k) to (B,) bool.
    """
    visual = features.shape[1]
    results = {}
    before = list(itertools.islice(layers(model, features, packed), max(after) + 1))
    for count in after:
        # Ranked by layer K (the paper's K = 2 is the second layer), dropped before the next layer.
        mean = before[count - 1].attention.mean(1)
        for k in budgets:
            kept = highest(mean, k)
            rows = torch.cat(
                [
                    torch.zeros_like(kept[:, :1]),
                    1 + kept,
                    torch.arange(1 + visual, before[0].hidden.shape[1], device=kept.device).expand(
                        len(kept), -1
                    ),
                ],
                1,
            )
            results[count, k] = _continue(model, before[count].hidden, rows, count, packed)
    return results


def _continue(model: Any, hidden: Tensor, rows: Tensor, start: int, packed: Packed) -> Tensor:
    """Runs the layers from `start` on with only the tokens `rows`, at their positions."""
    language = model.model.language_model
    hidden = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
    rotary = language.rotary_emb(hidden, rows)
    for layer in language.layers[start:]:
        hidden = layer(hidden, position_ids=rows, position_embeddings=rotary)
    logits = model.lm_head(language.norm(hidden[:, -packed.ids.shape[1] :]))
    wrong = (logits.argmax(-1) != packed.labels) & (packed.labels != IGNORED)
    return ~wrong.any(1)
