"""The supported model families: every module here that defines one, by its model types."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from typing import Any

from .base import Encoded, Family, UnsupportedModelError
from .checks import check_model, check_scores, unwrapped
from .refused import REFUSED

_registered: dict[str, type[Family]] = {}


@functools.cache
def _own() -> dict[str, type[Family]]:
    """Model type to its family in this package."""
    families = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for _, family in inspect.getmembers(module, inspect.isclass):
            if issubclass(family, Family) and family.__module__ == module.__name__:
                families.update(dict.fromkeys(vars(family).get("model_types", ()), family))
    return families


def families() -> dict[str, type[Family]]:
    """Model type to its family, including registered ones."""
    return _own() | _registered


def supported() -> list[str]:
    """Model types that `apply` takes."""
    return sorted(families())


def register(model_type: str, family: type[Family]) -> None:
    """Adds or replaces a family.

    Args:
        model_type: `model.config.model_type` of the models.
        family: a subclass of Family.
    """
    if not (isinstance(family, type) and issubclass(family, Family)):
        raise TypeError(f"family must be a subclass of vispruner.models.Family, got {family!r}")
    _registered[model_type] = family


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
        UnsupportedModelError: there is none; the message lists the families, or gives the reason.
    """
    return family_for(getattr(model, "config", None), type(model).__name__)


def family_for(config: Any, name: str = "model") -> type[Family]:
    """The family of a model's configuration; raises as `family_of`."""
    model_type = getattr(config, "model_type", None)
    family = families().get(str(model_type))
    if family is None and model_type in REFUSED:
        raise UnsupportedModelError(
            f"cannot prune a {name} (model type {model_type!r}): {REFUSED[model_type]}"
        )
    if family is None:
        raise UnsupportedModelError(
            f"cannot prune a {name} (model type {model_type!r}). Supported: "
            f"{', '.join(supported())}. To add one, subclass vispruner.models.Family and pass it "
            "to vispruner.register (docs/integration.md)"
        )
    return family


__all__ = [
    "Encoded",
    "Family",
    "UnsupportedModelError",
    "check_scores",
    "families",
    "family_for",
    "family_of",
    "register",
    "supported",
    "unwrapped",
    "whole_model",
]
