"""The model families that pruning knows, by `config.model_type`."""

from __future__ import annotations

import importlib
from typing import Any

from .base import Encoded, Family, UnsupportedModelError
from .checks import check_model, check_scores, unwrapped

_FAMILIES: dict[str, str | type[Family]] = {
    "llava": f"{__name__}.llava:Llava",
    "llava_next": f"{__name__}.llava_next:LlavaNext",
    "llava_onevision": f"{__name__}.llava_onevision:LlavaOnevision",
    "qwen2_5_vl": f"{__name__}.qwen_vl:QwenVL",
    "qwen2_vl": f"{__name__}.qwen_vl:QwenVL",
    "qwen3_vl": f"{__name__}.qwen_vl:QwenVL",
    "video_llava": f"{__name__}.llava:VideoLlava",
}


def supported() -> list[str]:
    """Model types that `apply` takes."""
    return sorted(_FAMILIES)


def register(model_type: str, family: type[Family]) -> None:
    """Adds a family of your own, or replaces one.

    Args:
        model_type: `model.config.model_type` of the models.
        family: a subclass of Family.
    """
    if not (isinstance(family, type) and issubclass(family, Family)):
        raise TypeError(f"family must be a subclass of vispruner.models.Family, got {family!r}")
    _FAMILIES[model_type] = family


def whole_model(model: Any) -> Any:
    """The model to prune: the one inside PEFT's wrapper, or the model itself.

    Raises:
        UnsupportedModelError: it cannot be pruned.
    """
    model = unwrapped(model)
    family_of(model)
    check_model(model)
    return model


def family_of(model: Any) -> type[Family]:
    """The family of a transformers model.

    Raises:
        UnsupportedModelError: there is none; the message names those there are.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedModelError(
            f"cannot prune a {type(model).__name__} (model type {model_type!r}). Supported: "
            f"{', '.join(supported())}. To add one, subclass vispruner.models.Family and pass it "
            "to vispruner.register (docs/integration.md)"
        )
    if isinstance(family, str):
        module, _, name = family.partition(":")
        family = getattr(importlib.import_module(module), name)
    return family


__all__ = [
    "Encoded",
    "Family",
    "UnsupportedModelError",
    "check_scores",
    "family_of",
    "register",
    "supported",
    "unwrapped",
    "whole_model",
]
