"""VisPruner's token selection as PyTorch operators for CPU and CUDA.

    import vispruner_cuda
    kept = vispruner_cuda.prune(feats, cls_attn, k=64)   # kept.feats, kept.indices

`vispruner_cuda.reference` has the same functions in plain PyTorch. `python -m vispruner_cuda`
prints what is installed.
"""

from . import _library, methods, plans, reference
from ._results import PruneResult, PruneVarlenResult, TopkResult
from ._version import __version__

_library.load()
from . import _fakes  # noqa: E402, F401  (after the operators exist)
from .functional import (  # noqa: E402
    cls_attention,
    dedup,
    pairwise_cosine,
    prune,
    prune_varlen,
    received_attention,
    topk,
)

__all__ = [
    "PruneResult",
    "PruneVarlenResult",
    "TopkResult",
    "__version__",
    "cls_attention",
    "dedup",
    "methods",
    "pairwise_cosine",
    "plans",
    "prune",
    "prune_varlen",
    "received_attention",
    "reference",
    "topk",
]
