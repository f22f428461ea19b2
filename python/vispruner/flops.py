"""Floating-point operations and cache bytes of a prompt with pictures, from a configuration alone.

A multiplication with its addition counts as two operations, as in `torch.utils.flop_counter`; with
it the tests compare. Matrix products count, normalization and activations do not. Attention counts
whole, as that counter does, although causal kernels skip half of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """What one prompt costs.

    Attributes:
        visual, text: tokens that the language model reads.
        vision: operations of the vision encoder and the projector.
        prefill: operations of the language model until the first token of the answer.
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


@dataclass(frozen=True)
class _Text:
    """A Llama-like decoder."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> _Text:
        text = config.get_text_config()
        heads = int(text.num_attention_heads)
        return cls(
            layers=int(text.num_hidden_layers),
            width=int(text.hidden_size),
            inner=int(text.intermediate_size),
            heads=heads,
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            vocabulary=int(text.vocab_size),
        )

    def layer(self, tokens: int, attended: int) -> int:
        """One layer: `tokens` queries, each over `attended` keys, as dense products."""
        projections = 2 * self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = 3 * 2 * self.width * self.inner
        attention = 2 * 2 * attended * self.heads * self.head_dim
        return tokens * (projections + mlp + attention)

    def head(self) -> int:
        return 2 * self.width * self.vocabulary

    def prefill(self, tokens: int) -> int:
        """All tokens of a prompt, logits of the last one."""
        return self.layers * self.layer(tokens, tokens) + self.head()

    def decode(self, prompt: int, new: int) -> int:
        """The tokens of an answer after its first one, each over all that came before."""
        return sum(self.layers * self.layer(1, prompt + i) + self.head() for i in range(1, new))

    def cache_bytes(self, tokens: int, element: int) -> int:
        return 2 * self.layers * tokens * self.kv_heads * self.head_dim * element


def _encoder(tokens: int, attended: int, width: int, inner: int, matrices: int) -> int:
    """One layer of a vision encoder, with two matrices in its MLP, or three if it is gated."""
    return tokens * (8 * width**2 + 4 * attended * width + 2 * matrices * width * inner)


def _pixels(inputs: Mapping[str, Any]) -> Tensor:
    """The pixels of a call, whose name differs between families and versions."""
    return next(value for name, value in inputs.items() if name.startswith("pixel_values"))


def _tower(config: Any, inputs: Mapping[str, Any]) -> int:
    """A CLIP or SigLIP tower on pixels (..., 3, S, S), without the projector."""
    vision = config.vision_config
    pixels = _pixels(inputs)
    pictures = pixels.shape[:-3].numel()
    patch, width = int(vision.patch_size), int(vision.hidden_size)
    patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    tokens = patches + (vision.model_type == "clip_vision_model")
    layer = _encoder(tokens, tokens, width, int(vision.intermediate_size), 2)
    embedding = 2 * patches * 3 * patch**2 * width
    return pictures * (embedding + int(vision.num_hidden_layers) * layer)


def _projector(config: Any, rows: int) -> int:
    """Two linear layers on `rows` patches."""
    width, out = int(config.vision_config.hidden_size), int(config.get_text_config().hidden_size)
    return 2 * rows * (width * out + out * out)


def _qwen(config: Any, inputs: Mapping[str, Any]) -> int:
    """Qwen's vision transformer on packed patches, mergers included."""
    vision = config.vision_config
    merge = int(vision.spatial_merge_size)
    width = int(getattr(vision, "embed_dim", None) or vision.hidden_size)
    out = int(getattr(vision, "out_hidden_size", None) or vision.hidden_size)
    inner = int(getattr(vision, "intermediate_size", None) or width * vision.mlp_ratio)
    gated = config.model_type == "qwen2_5_vl"
    pixels = inputs["pixel_values"]
    total = 2 * pixels.shape[0] * pixels.shape[1] * width
    windowed = getattr(vision, "fullatt_block_indexes", None)
    for frames, rows, columns in inputs["image_grid_thw"].tolist():
        whole, windows = [rows * columns], [rows * columns]
        if windowed is not None:
            side = int(vision.window_size) // int(vision.patch_size)
            windows = [
                min(side, rows - top) * min(side, columns - left)
                for top in range(0, rows, side)
                for left in range(0, columns, side)
            ]
        for block in range(int(vision.depth)):
            sizes = whole if windowed is None or block in windowed else windows
            total += frames * sum(_encoder(n, n, width, inner, 3 if gated else 2) for n in sizes)
        merged = frames * rows * columns // merge**2
        mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
        total += mergers * 2 * merged * ((width * merge**2) ** 2 + width * merge**2 * out)
    return total


def vision_flops(config: Any, inputs: Mapping[str, Any], projected: int) -> int:
    """Operations of the vision encoder with its projector.

    Args:
        config: of the model; inputs: of its encoder, as from `shapes.picture`.
        projected: patches that reach the projector of a LLaVA model.
    """
    if "image_grid_thw" in inputs:
        return _qwen(config, inputs)
    return _tower(config, inputs) + _projector(config, projected)


def visual_only_flops(config: Any, visual: int) -> int:
    """The count that is usual in papers on token pruning: visual tokens alone.

    4nd^2 + 2n^2d + 2ndm for each layer of the language model (FastV, arXiv 2403.06764, section 4),
    with n visual tokens, width d and MLP width m: no text, no vocabulary, two matrices in the MLP.
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
    """What a prompt with one picture or more costs.

    Args:
        config: of the model; inputs: of its encoder, as from `shapes.picture`.
        visual: tokens of each picture that the language model reads.
        text: all other tokens of the prompt; new: tokens of the answer.
        element: bytes of an element of the cache.
        projected: patches that reach the projector, where that is not all of them (LLaVA-1.5 and
            LLaVA-NeXT prune before it).
    """
    model = _Text.of(config)
    tokens = sum(visual) + text
    if projected is None:
        projected = _patches(config, inputs)
    return Cost(
        visual=sum(visual),
        text=text,
        vision=vision_flops(config, inputs, projected),
        prefill=model.prefill(tokens),
        decode=model.decode(tokens, new),
        cache_bytes=model.cache_bytes(tokens, element),
        visual_only=visual_only_flops(config, sum(visual)),
    )


def _patches(config: Any, inputs: Mapping[str, Any]) -> int:
    """Patches that a tower makes of pixels (..., S, S); 0 where the projector is counted inside."""
    if "image_grid_thw" in inputs:
        return 0
    pixels = _pixels(inputs)
    patch = int(config.vision_config.patch_size)
    cells = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    return int(pixels.shape[:-3].numel() * cells)
