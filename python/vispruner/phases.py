"""Phases of a call: their times, also of an unpruned model."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from .clock import Clock, Prefill
from .methods import Replacement
from .models import family_of
from .releases import canonical


@contextmanager
def unpruned(model: Any) -> Iterator[Clock]:
    """Times calls of `generate` of an unpruned model, in the phases of a pruned one.

    Args:
        model: a `...ForConditionalGeneration` model of a supported family, unpruned.

    Yields:
        A clock with the phases "vision", "prefill" and "decode" of the calls in the block.
    """
    clock = Clock(model.device)
    prefill: list[Prefill] = []

    def encode(original: Any, *args: Any, **kwargs: Any) -> Any:
        with clock("vision"):
            return original(*args, **kwargs)

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if prefill and prefill[-1].read(canonical(kwargs)):
            prefill.clear()
        return output

    def generate(original: Any, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        prompt = kwargs["inputs_embeds"] if ids is None else ids
        prefill.append(Prefill(clock, prompt.shape[1]))
        with clock("prefill"):
            return original(*args, **kwargs)

    with ExitStack() as stack:
        names = family_of(model).encoders.values()
        bodies: list[tuple[Any, str, Any]] = [
            *((model.base_model, name, encode) for name in names),
            (model, "forward", forward),
            (model, "generate", generate),
        ]
        for owner, name, body in bodies:
            replacement = Replacement(owner, name, functools.partial(body, getattr(owner, name)))
            stack.callback(replacement.remove)
        yield clock


def phases_of(milliseconds: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds for people: pruning as one phase, and the total."""
    pruning = ("score", "select", "rewrite")
    rows = {
        "vision": milliseconds.get("vision", 0.0),
        "prune": sum(milliseconds.get(name, 0.0) for name in pruning),
        "prefill": milliseconds.get("prefill", 0.0),
        "decode": milliseconds.get("decode", 0.0),
    }
    return rows | {"total": sum(rows.values())}


__all__ = ["Clock", "Prefill", "phases_of", "unpruned"]
