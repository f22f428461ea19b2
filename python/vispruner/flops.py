"""Floating-point operations and cache bytes of a prompt with pictures, from a configuration alone.

A multiply-add counts as two operations, as in `torch.utils.flop_counter`, with which the tests
compare. Only matrix products count, not normalization and activations. Attention counts in full, as
in that counter, although causal kernels skip half of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .models import family_for


@dataclass(frozen=True)
class Cost:
    """Cost of one prompt.

    Attributes:
        visual, text: tokens that the language model reads.
        vision: operations of the vision encoder and the projector.
        prefill: operations of the language model up to the first token of the answer.
        decode: operations of the language model for all further tokens.
        cache_bytes: keys and values of the prompt.
        visual_only: operations by `visual_only_flops`.
    """

    visual: int
    text: int
    vision: int
    prefill: int
    decode: int
    cache_bytes: int
    visual_only: int


def _mlps(text: Any) -> tuple[int, ...]:
    """Operations per token in the MLP of each layer: dense, or of the active experts."""
    width, layers = int(text.hidden_size), int(text.num_hidden_layers)
    gated = 3 * 2 * width
    dense = gated * int(getattr(text, "intermediate_size", None) or 0)
    experts = getattr(text, "num_experts", None) or getattr(text, "n_routed_experts", None)
    if not experts:
        return (dense,) * layers
    inner = int(text.moe_intermediate_size)
    shared = int(getattr(text, "shared_expert_intermediate_size", None) or 0)
    sparse = gated * (int(text.num_experts_per_tok) * inner + shared)
    sparse += gated * int(getattr(text, "n_shared_experts", None) or 0) * inner
    sparse += 2 * width * (int(experts) + bool(shared))  # routers and gates
    first = int(getattr(text, "first_k_dense_replace", None) or 0)
    alone = set(getattr(text, "mlp_only_layers", None) or ()) | set(range(first))
    return tuple(dense if layer in alone else sparse for layer in range(layers))


@dataclass(frozen=True)
class _Text:
    """A Llama-like decoder with dense MLPs or experts."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    mlps: tuple[int, ...]

    @classmethod
    def of(cls, config: Any) -> _Text:
        text = config.get_text_config()
        if "linear_attention" in (getattr(text, "layer_types", None) or ()):
            raise ValueError(
                f"the linear attention of {config.model_type} cannot be counted: give a model "
                "whose layers are all softmax attention"
            )
        heads = int(text.num_attention_heads)
        return cls(
            layers=int(text.num_hidden_layers),
            width=int(text.hidden_size),
            inner=int(getattr(text, "intermediate_size", None) or text.moe_intermediate_size),
            heads=heads,
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            vocabulary=int(text.vocab_size),
            mlps=_mlps(text),
        )

    def stack(self, tokens: int, attended: int) -> int:
        """All layers: `tokens` queries over `attended` keys each, as dense products."""
        projections = 2 * self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        attention = 2 * 2 * attended * self.heads * self.head_dim
        return tokens * (self.layers * (projections + attention) + sum(self.mlps))

    def head(self) -> int:
        return 2 * self.width * self.vocabulary

    def prefill(self, tokens: int) -> int:
        """All tokens of a prompt, and the logits of the last one."""
        return self.stack(tokens, tokens) + self.head()

    def decode(self, prompt: int, new: int) -> int:
        """The tokens of an answer after the first, each attending to all earlier tokens."""
        further = max(new - 1, 0)
        # The operations of a token grow linearly: their mean is that of the first and the last.
        twice = self.stack(1, prompt + 1) + self.stack(1, prompt + further)
        return further * twice // 2 + further * self.head()

    def cache_bytes(self, tokens: int, element: int) -> int:
        return 2 * self.layers * tokens * self.kv_heads * self.head_dim * element


def cache_bytes(config: Any, tokens: int, element: int) -> int:
    """Bytes of the keys and values of a prompt.

    Args:
        config: of the model; tokens: of the prompt; element: bytes of a number.
    """
    return _Text.of(config).cache_bytes(tokens, element)


def vision_flops(config: Any, inputs: Mapping[str, Any], projected: int) -> int:
    """Operations of the vision encoder with its projector.

    Args:
        config: of the model; inputs: of its encoder, as from `shapes.picture`.
        projected: patches that reach the projector of a LLaVA model.
    """
    return family_for(config).vision_flops(config, inputs, projected)


def visual_only_flops(config: Any, visual: int) -> int:
    """The usual count in papers on token pruning: visual tokens only.

    4nd^2 + 2n^2d + 2ndm per layer of the language model (FastV, arXiv 2403.06764, section 4), with
    n visual tokens, width d and MLP width m: no text, no vocabulary, two matrices in the MLP.
    """
    text = _Text.of(config)
    n, d, m = visual, text.width, text.inner
    return text.layers * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m)


def cost(
    config: Any,
    inputs: Mapping[str, Any],
    visual: Sequence[int],
    *,
    text: int,
    new: int = 1,
    element: int = 2,
    projected: int | None = None,
) -> Cost:
    """Cost of a prompt with one or more pictures.

    Args:
        config: of the model; inputs: of its encoder, as from `shapes.picture`.
        visual: tokens of each picture that the language model reads.
        text: other tokens of the prompt; new: tokens of the answer.
        element: bytes per element of the cache.
        projected: patches that reach the projector, if not all (LLaVA-1.5 and LLaVA-NeXT prune
            before it).
    """
    model = _Text.of(config)
    tokens = sum(visual) + text
    if projected is None:
        projected = family_for(config).projected_patches(config, inputs)
    return Cost(
        visual=sum(visual),
        text=text,
        vision=vision_flops(config, inputs, projected),
        prefill=model.prefill(tokens),
        decode=model.decode(tokens, new),
        cache_bytes=model.cache_bytes(tokens, element),
        visual_only=visual_only_flops(config, sum(visual)),
    )
