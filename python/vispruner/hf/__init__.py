"""Pruning in transformers, at the boundary of a model's `forward` and `generate`.

Data flow: `api`, `pruner` and `generation` intercept a call. `prompt` splits it into the columns
that the cache holds and the new ones (`past`), has the family encode the new pictures and select
tokens, and removes the columns of the other tokens (`layout`, `positions`, `labels`). The
unmodified model gets the shorter prompt with the retained features (`encoder_outputs`). The layout
of the prompt is stored on its cache (`cache`) for later turns.
"""

from .api import apply, prepare
from .pruner import Pruner

__all__ = ["Pruner", "apply", "prepare"]
