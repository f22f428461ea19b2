"""VisPruner for vision-language models: what stands around the operators of `vispruner_cuda`.

    import vispruner
    pruner = vispruner.apply(model, k=64)     # a transformers model; see vispruner.supported()
    model.generate(**inputs)
    pruner.last                               # what was kept, and the milliseconds it took
    pruner.remove()

`vispruner.models` holds one module for each family of models and the interface between them.
Beside that, `clip` runs a CLIP vision tower alone, `pictures` draws what was kept, and `python -m
vispruner.demo` shows both. Models need the extra `vispruner-cuda[transformers]`; importing the
package does not.
"""

from .models import Family, UnsupportedModelError, register, supported
from .pruner import Pruner, apply, prepare
from .report import Kept, Report

__all__ = [
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
