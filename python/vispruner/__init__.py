"""VisPruner for vision-language models: what stands around the operators of `vispruner_cuda`.

    import vispruner
    pruner = vispruner.apply(model, k=64)     # a transformers model; see vispruner.supported()
    model.generate(**inputs)
    pruner.last                               # what was kept, and the milliseconds it took
    pruner.remove()

`vispruner.models` holds one module for each family of models and the interface between them.
Beside that: `cli` is the `vispruner` command, `vllm` a plugin for vLLM, `clip` a CLIP vision tower
alone, `shapes` and `flops` tell what published models cost, `embedded` and `scenes` are a small
model in the box and the pictures it understands. Models need the extra
`vispruner-cuda[transformers]`; importing the package does not.
"""

from .hf import Pruner, apply, prepare
from .models import Family, UnsupportedModelError, register, supported
from .report import Kept, Report
from .selection import Budget

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
