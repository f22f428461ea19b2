"""Real models as configurations, and the shapes that a picture takes on its way into them.

For what can be told, or measured with random weights, without downloading anything: floating-point
operations, cache sizes, speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_VICUNA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32064,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
_VICUNA_13B = _VICUNA_7B | {
    "hidden_size": 5120, "intermediate_size": 13824,
    "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
}  # fmt: skip
_QWEN2_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_CLIP = {
    "model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "hidden_size": 1024,
    "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "projection_dim": 768,
}  # fmt: skip
_SIGLIP = {
    "model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14, "hidden_size": 1152,
    "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16,
    "vision_use_head": False,
}  # fmt: skip
_LLAVA = {
    "vision_config": _CLIP, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "image_token_id": 32000,
}  # fmt: skip
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

#: published model to (model type, its configuration), sizes and settings only
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava-1.5-7b": ("llava", _LLAVA | {"text_config": _VICUNA_7B}),
    "llava-1.5-13b": ("llava", _LLAVA | {"text_config": _VICUNA_13B}),
    "llava-next-7b": (
        "llava_next",
        _LLAVA | {"text_config": _VICUNA_7B, "image_grid_pinpoints": _PINPOINTS},
    ),
    "llava-onevision-7b": (
        "llava_onevision",
        {
            "vision_config": _SIGLIP,
            "text_config": _QWEN2_7B | {"model_type": "qwen2"},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
            "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
            "image_token_id": 151646,
            "video_token_id": 151647,
        },
    ),
    "qwen2-vl-7b": (
        "qwen2_vl",
        {
            "vision_config": {
                "depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14,
                "hidden_size": 3584, "spatial_merge_size": 2, "temporal_patch_size": 2,
            },
            "text_config": _QWEN2_7B | {"rope_parameters": _MROPE},
        },
    ),
    "qwen2.5-vl-7b": (
        "qwen2_5_vl",
        {
            "vision_config": {
                "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
                "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
                "out_hidden_size": 3584,
            },
            "text_config": _QWEN2_7B | {"rope_parameters": _MROPE},
        },
    ),
    "qwen3-vl-8b": (
        "qwen3_vl",
        {
            "vision_config": {
                "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
                "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
                "out_hidden_size": 4096, "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
            },
            "text_config": {
                "hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 151936,
                "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
                "head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-6,
                "rope_parameters": {
                    "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                    "mrope_interleaved": True,
                },
            },
        },
    ),
}  # fmt: skip


def config_of(
    name: str,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
) -> Any:
    """The transformers configuration of a model in MODELS.

    Args:
        name: of the model.
        text, vision: settings of its language model and of its encoder to replace.

    Raises:
        ValueError: there is no such name; the message lists them.
    """
    from transformers import AutoConfig

    if name not in MODELS:
        raise ValueError(f"no model named {name!r}, there are: {', '.join(MODELS)}")
    model_type, settings = MODELS[name]
    settings = settings | {
        "text_config": settings["text_config"] | dict(text or {}),
        "vision_config": settings["vision_config"] | dict(vision or {}),
    }
    return AutoConfig.for_model(model_type, **settings)


def empty_model(config: Any) -> Any:
    """The model of a configuration on the meta device: shapes, no memory."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config).eval()


# ----------------------------------------------------------------------------------- of a picture
def _square(config: Any, height: int, width: int) -> dict[str, Any]:
    side = config.vision_config.image_size
    return {"pixel_values": torch.empty(1, 3, side, side, device="meta")}


def _tiled(config: Any, height: int, width: int) -> dict[str, Any]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side = config.vision_config.image_size
    tiles = image_size_to_num_patches([height, width], config.image_grid_pinpoints, side)
    return {
        "pixel_values": torch.empty(1, tiles, 3, side, side, device="meta"),
        "image_sizes": torch.tensor([[height, width]]),
    }


def _patches(config: Any, height: int, width: int) -> dict[str, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    vision = config.vision_config
    patch = int(vision.patch_size)
    factor = patch * int(vision.spatial_merge_size)
    # The limits of the published processors, in merged tokens.
    least = 64 if config.model_type == "qwen3_vl" else 4
    limits = {"min_pixels": least * factor**2, "max_pixels": 16384 * factor**2}
    rows, columns = (x // patch for x in smart_resize(height, width, factor, **limits))
    channels = 3 * int(vision.temporal_patch_size) * patch**2
    return {
        "pixel_values": torch.empty(rows * columns, channels, device="meta"),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }


_PICTURES: Mapping[str, Callable[[Any, int, int], dict[str, Any]]] = {
    "llava": _square,
    "llava_next": _tiled,
    "llava_onevision": _tiled,
    "qwen2_vl": _patches,
    "qwen2_5_vl": _patches,
    "qwen3_vl": _patches,
    "video_llava": _square,
}


def picture(config: Any, height: int, width: int) -> dict[str, Any]:
    """What the model's processor makes of one picture, its pixels on the meta device.

    Args:
        config: of the model; height, width: pixels of the picture.

    Raises:
        ValueError: the model type is not known, or the picture is too small or narrow for it.
    """
    make = _PICTURES.get(config.model_type)
    if make is None:
        raise ValueError(
            f"model type {config.model_type!r} is not known, only {', '.join(_PICTURES)}"
        )
    return make(config, height, width)
