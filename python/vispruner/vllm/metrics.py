"""Pruning counters on `/metrics` of vLLM's server.

They use prometheus_client, in its default registry or its multiprocess mode, whichever vLLM serves.
The server's process builds the prompts, so its counts of images and tokens are exact. Workers
measure scoring and selection in other processes, so their counters reach `/metrics` in multiprocess
mode only (`timing`).
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter

from ..selection import Budget
from .config import KEY

_INSTALLED = "_vispruner_metrics"
_BUDGET = ("model_name", "k", "ratio")


@dataclass(frozen=True)
class Pruned:
    """An image or a video of a prompt.

    Attributes:
        modality: "image" or "video"; budget: of its request.
        before, kept: visual tokens without and with pruning.
    """

    modality: str
    budget: Budget
    before: int
    kept: int


class Counters:
    """The counters of a server's process; one set per process, since there is one registry."""

    def __init__(self) -> None:
        self._items = {
            "image": Counter(f"{KEY}_images", "Images of admitted requests.", _BUDGET),
            "video": Counter(f"{KEY}_videos", "Videos of admitted requests.", _BUDGET),
        }
        labels = (*_BUDGET, "modality")
        self._before = Counter(
            f"{KEY}_visual_tokens_before", "Visual tokens before pruning.", labels
        )
        self._kept = Counter(f"{KEY}_visual_tokens_kept", "Visual tokens after pruning.", labels)

    def add(self, model_name: str, pruned: Pruned, items: int = 1) -> None:
        """Counts an image or a video; with `items=0` it creates the series, at 0."""
        budget = pruned.budget
        # Clients choose k up to the cap, which bounds the number of series; ratios are rounded to
        # bound it.
        k = "" if budget.k is None else str(budget.k)
        ratio = "" if budget.ratio is None else f"{budget.ratio:.2f}"
        self._items[pruned.modality].labels(model_name, k, ratio).inc(items)
        labels = (model_name, k, ratio, pruned.modality)
        self._before.labels(*labels).inc(items * pruned.before)
        self._kept.labels(*labels).inc(items * pruned.kept)


class WorkerCounters:
    """The counters of a worker's process."""

    def __init__(self) -> None:
        self.pictures = Counter(
            f"{KEY}_scored_pictures", "Images, tiles and frames scored.", ["model_name"]
        )
        self.seconds = {
            phase: Counter(f"{KEY}_{phase}_seconds", f"Time of {phase}.", ["model_name"])
            for phase in ("scoring", "selection")
        }


counters = functools.cache(Counters)
worker_counters = functools.cache(WorkerCounters)


def _counting(
    add_request: Callable[..., Awaitable[Any]],
) -> Callable[..., Awaitable[Any]]:
    """Wraps AsyncLLM.add_request: counts accepted requests only."""

    @functools.wraps(add_request)
    async def counted(engine: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        queue = await add_request(engine, request_id, prompt, *args, **kwargs)
        if isinstance(prompt, Mapping):
            for pruned in prompt.get(KEY, ()):
                counters().add(engine.model_config.served_model_name, pruned)
        return queue

    return counted


def install(model_config: Any, budget: Budget, modalities: Iterable[str]) -> None:
    """Counts the requests of this process.

    Args:
        model_config: vLLM's, of an engine that prunes; budget: its default; modalities: of the
            model. Their series exist from the beginning.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    for modality in modalities:
        counters().add(model_config.served_model_name, Pruned(modality, budget, 0, 0), items=0)
    if not hasattr(AsyncLLM, _INSTALLED):
        AsyncLLM.add_request = _counting(AsyncLLM.add_request)
        setattr(AsyncLLM, _INSTALLED, True)


__all__ = ["Counters", "Pruned", "WorkerCounters", "counters", "install", "worker_counters"]
