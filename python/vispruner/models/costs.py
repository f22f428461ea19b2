"""Floating-point operations of vision encoders, from a configuration and shapes alone.

A multiply-add counts as two operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def encoder_layer(tokens: int, attended: int, width: int, inner: int, matrices: int) -> int:
    """One layer of a vision encoder, with two matrices in its MLP, or three if gated."""
    return tokens * (8 * width**2 + 4 * attended * width + 2 * matrices * width * inner)


def pixels_of(inputs: Mapping[str, Any]) -> Tensor:
    """The pixels of a call, whose name differs between families and versions."""
    return next(value for name, value in inputs.items() if name.startswith("pixel_values"))


def tower(config: Any, inputs: Mapping[str, Any]) -> int:
    """A CLIP or SigLIP tower on pixels (..., 3, S, S), without the projector."""
    vision = config.vision_config
    pixels = pixels_of(inputs)
    pictures = pixels.shape[:-3].numel()
    patch, width = int(vision.patch_size), int(vision.hidden_size)
    patches = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    tokens = patches + (vision.model_type == "clip_vision_model")
    layer = encoder_layer(tokens, tokens, width, int(vision.intermediate_size), 2)
    embedding = 2 * patches * 3 * patch**2 * width
    return pictures * (embedding + int(vision.num_hidden_layers) * layer)


def projector(config: Any, rows: int) -> int:
    """Two linear layers on `rows` patches."""
    width, out = int(config.vision_config.hidden_size), int(config.get_text_config().hidden_size)
    return 2 * rows * (width * out + out * out)


def merged_patches(config: Any, inputs: Mapping[str, Any]) -> int:
    """Qwen's vision transformer on packed patches, including the mergers."""
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
            total += frames * sum(
                encoder_layer(n, n, width, inner, 3 if gated else 2) for n in sizes
            )
        merged = frames * rows * columns // merge**2
        mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
        total += mergers * 2 * merged * ((width * merge**2) ** 2 + width * merge**2 * out)
    return total


def patches_of(config: Any, inputs: Mapping[str, Any]) -> int:
    """Number of patches in pixels (..., S, S)."""
    pixels = pixels_of(inputs)
    patch = int(config.vision_config.patch_size)
    cells = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    return int(pixels.shape[:-3].numel() * cells)
