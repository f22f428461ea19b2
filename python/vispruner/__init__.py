"""VisPruner for vision-language models: integrations built on the operators of `vispruner_cuda`.

    import vispruner
    pruner = vispruner.apply(model, k=64)     # a transformers model; see vispruner.supported()
    model.generate(**inputs)
    pruner.last                               # retained tokens, and milliseconds
    pruner.remove()

Layers, each importing only those above it in this list:

- `selection`: budgets, scores and token selection; `report`, `clock`: results and times of a call;
- `releases`, `methods`, `taps`: differences between transformers releases, hooks on its objects;
- `models`: one file per family of models;
- `hf`: pruning in transformers; `vllm`: a plugin for vLLM; `lmms_eval`: pruned models for it;
- `embedded`: a small bundled model and its scenes; `cli`: the `vispruner` command; `clip`: a CLIP
  vision tower without a language model; `shapes`, `flops`: published models and their costs.

Models need the extra `transformers` of this package; importing the package does not. Submodules are
imported on first use, so that the command starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hf import Pruner, apply, prepare
    from .models import Family, UnsupportedModelError, register, supported
    from .report import Kept, Report
    from .selection import Budget

_EXPORTS = {
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
    module = _EXPORTS.get(name)
    if module is not None:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    # Submodules that users reach as attributes.
    if name in ("models", "selection", "report", "hf"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


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
