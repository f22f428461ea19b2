"""Configurations of published models, and the shapes of their inputs.

They serve to count operations and cache sizes, and to measure speed with random weights, without
any download.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: name of a published model to its configuration: sizes and settings only (published.json)
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
        text, vision: settings to replace in its language model and its encoder.

    Raises:
        ValueError: unknown name; the message lists the known ones.
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
    """The model of a configuration on the meta device: shapes without memory."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config).eval()


def picture(config: Any, height: int, width: int) -> dict[str, Any]:
    """The processor's output for one picture, with pixels on the meta device.

    Args:
        config: of the model; height, width: pixels of the picture.

    Raises:
        ValueError: the model type is not known, or the picture is too small or narrow for it.
    """
    from .models import families, family_for, supported

    if config.model_type not in families():
        raise ValueError(
            f"model type {config.model_type!r} is not known, only {', '.join(supported())}"
        )
    return family_for(config).picture(config, height, width)
