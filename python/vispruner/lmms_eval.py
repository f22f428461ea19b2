"""Pruned models for lmms-eval, which finds them through this package's entry point.

    lmms-eval --model vispruner_llava_hf \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,k=64 --tasks gqa,textvqa,pope

Each is the harness's model class of the same name without the prefix, with `vispruner.apply` on the
model that it loads. Prompts, decoding and metrics are those of the unpruned run. In addition to
the harness's arguments, `model_args` takes those of `vispruner.apply`: k or ratio, method and its
parameters and, for LLaVA-NeXT, tiles.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

from .hf import Pruner, apply
from .models import families
from .selection import Budget

PREFIX = "vispruner_"
_BUDGET = tuple(field.name for field in dataclasses.fields(Budget))


class _Harness(NamedTuple):
    """A class of the harness, in lmms_eval.models.INTERFACE.MODULE."""

    name: str
    interfaces: tuple[str, ...]


_HARNESS = {
    module: _Harness(name, interfaces)
    for family in dict.fromkeys(families().values())
    for module, name, interfaces in family.harness
}


class _Pruned:
    """A mixin for a class of the harness that prunes the model that it loads.

    Attributes:
        pruner: `pruner.last` is the report of the last request.
    """

    pruner: Pruner

    def __init__(
        self,
        *args: Any,
        tiles: str | None = None,
        **kwargs: Any,
    ) -> None:
        ours = {name: kwargs.pop(name) for name in _BUDGET if name in kwargs}
        super().__init__(*args, **kwargs)
        model: Any = self.model  # type: ignore[attr-defined]
        options: dict[str, Any] = {} if tiles is None else {"tiles": tiles}
        self.pruner = apply(model, Budget(**ours), **options)


@functools.cache
def _pruned_class(interface: str, module: str) -> type:
    """The harness's class with pruning. Its import may need packages of that model."""
    imported = importlib.import_module(f"lmms_eval.models.{interface}.{module}")
    base = getattr(imported, _HARNESS[module].name)
    about = {"__doc__": _Pruned.__doc__, "__module__": __name__}
    return type(f"Pruned{base.__name__}", (_Pruned, base), about)


def __getattr__(name: str) -> type:
    """Classes by the names in `manifests`: INTERFACE_MODULE."""
    interface, _, module = name.partition("_")
    if module in _HARNESS and interface in _HARNESS[module].interfaces:
        return _pruned_class(interface, module)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def manifests() -> list[Any]:
    """The models, for the entry point group `lmms_eval.models`."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return [
        registry.ModelManifest(
            model_id=PREFIX + module,
            **{
                f"{interface}_class_path": f"{__name__}.{interface}_{module}"
                for interface in harness.interfaces
            },
        )
        for module, harness in _HARNESS.items()
    ]
