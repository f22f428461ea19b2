"""Pruning in transformers, at the boundary of a model's `forward` and `generate`.

The path of a picture, top to bottom: a call comes in (`api`, `pruner`, `generation`),
`prompt` splits it into what the cache holds and what is new (`past`), has the family encode the new
pictures and choose tokens, takes the columns of the others out (`layout`, `positions`, `labels`),
and the unmodified model gets the shorter prompt with the kept features (`encoder_outputs`). What
the prompt was stays on its cache (`cache`) for the turns after it.
"""

from .api import apply, prepare
from .pruner import Pruner

__all__ = ["Pruner", "apply", "prepare"]
