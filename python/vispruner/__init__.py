"""VisPruner for vision-language models: integrations built on the operators of `vispruner_cuda`.

    import vispruner
    pruner = vispruner.apply(model, k=64)     # a transformers model; see vispruner.supported()
    model.generate(**inputs)
    pruner.last                               # what was kept, and the milliseconds it took
    pruner.remove()

By role, each room using only those above it in this list:

- `selection`: budgets, scores and the choice of tokens; `report`, `clock`: what a call did;
- `releases`, `methods`, `taps`: what is known of transformers' releases, hooks on its objects;
- `models`: a file for each family of models;
- `hf`: pruning in transformers; `vllm`: a plugin for vLLM; `lmms_eval`: pruned models for it;
- `embedded`: a small model in the package and the scenes it understands; `cli`: the `vispruner`
  command; `clip`: a CLIP vision tower alone; `shapes`, `flops`: what published models cost.

Models need the extra `transformers` of this package; importing the package does not. Nothing below
is imported before it is used, so that the command can answer without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hf import Pruner, apply, prepare
    from .models import Family, UnsupportedModelError, register, supported
    from .report import Kept, Report
    from .selection import Budget

_PLACES = {
    "Budget": "selection",
    "Family": "models",
    "Kept": "report",
    "Pruner": "hf",
    "Report": "report",
    "UnsupportedModelError": "models",
    "apply": "hf",
    "prepare": "hf",
    "register": "models",
    "supported": "models",
}


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is not None:
        return getattr(importlib.import_module(f"{__name__}.{place}"), name)
    # `import vispruner` made these attributes before anything was imported late.
    if name in ("models", "selection", "report", "hf"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


__all__ = [
    "Budget",
    "Family",
    "Kept",
    "Pruner",
    "Report",
    "UnsupportedModelError",
    "apply",
    "prepare",
    "register",
    "supported",
]
