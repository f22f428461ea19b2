"""Real models as configurations, and the shapes that a picture takes on its way into them.

For what can be told, or measured with random weights, without downloading anything: floating-point
operations, cache sizes, speed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: published model to its configuration, sizes and settings only (published.json)
MODELS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("published.json").read_text(encoding="utf-8")
)


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
    settings = MODELS[name]
    settings = {key: value for key, value in settings.items() if key != "model_type"} | {
        "text_config": settings["text_config"] | dict(text or {}),
        "vision_config": settings["vision_config"] | dict(vision or {}),
    }
    return AutoConfig.for_model(MODELS[name]["model_type"], **settings)


def empty_model(config: Any) -> Any:
    """The model of a configuration on the meta device: shapes, no memory."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config).eval()


# ----------------------------------------------------------------------------------- of a picture
def _square(config: Any, height: int, width: int) -> dict[str, Any]:
    import torch

    side = config.vision_config.image_size
    return {"pixel_values": torch.empty(1, 3, side, side, device="meta")}


def _tiled(config: Any, height: int, width: int) -> dict[str, Any]:
    import torch
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side = config.vision_config.image_size
    tiles = image_size_to_num_patches([height, width], config.image_grid_pinpoints, side)
    return {
        "pixel_values": torch.empty(1, tiles, 3, side, side, device="meta"),
        "image_sizes": torch.tensor([[height, width]]),
    }


def _patches(config: Any, height: int, width: int) -> dict[str, Any]:
    import torch
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
