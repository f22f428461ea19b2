"""Scoring and selection times of a worker: counters, and a log line at an interval.

A worker is not the process that serves `/metrics`, which shows the worker's counters only in
prometheus_client's multiprocess mode (PROMETHEUS_MULTIPROC_DIR, which vLLM sets for several API
servers). The log line works without it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from vllm import envs
from vllm.logger import init_logger

from ..clock import Clock
from .config import KEY
from .metrics import worker_counters

logger = init_logger(f"vllm.plugins.{KEY}")  # below "vllm", whose handlers it uses


class Timing:
    """The times of one worker.

    Args:
        model_name: as in the engine's metrics; device: of the encoder.
        counted: False for a rank that duplicates the work of another one.
    """

    def __init__(self, model_name: str, device: torch.device, counted: bool) -> None:
        self._clock = Clock(device) if counted else None
        self._model_name = model_name
        self._counters = worker_counters()
        self._reported = time.monotonic()
        self._forget()

    def _forget(self) -> None:
        self._pictures = self._before = self._kept = 0
        self._seconds = dict.fromkeys(self._counters.seconds, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times "scoring" or "selection"."""
        with self._clock(phase) if self._clock else nullcontext():
            yield

    def record(self, pictures: int, before: int, kept: int) -> None:
        """Counts a batch of the encoder, and logs the totals since the last line.

        Times on a GPU are counted at a later call, when the GPU has finished; the host never waits
        for them.
        """
        if self._clock is None:
            return
        self._counters.pictures.labels(self._model_name).inc(pictures)
        self._pictures += pictures
        self._before += before
        self._kept += kept
        for phase, milliseconds in self._clock.take().items():
            self._counters.seconds[phase].labels(self._model_name).inc(milliseconds / 1e3)
            self._seconds[phase] += milliseconds / 1e3
        now = time.monotonic()
        if now - self._reported < envs.VLLM_LOG_STATS_INTERVAL:
            return
        each = {
            phase: 1e3 * spent / max(1, self._pictures) for phase, spent in self._seconds.items()
        }
        logger.info(
            "Pruned %d pictures in %.1f s: %d visual tokens, %d kept; scoring %.3f ms and "
            "selection %.3f ms per picture",
            self._pictures, now - self._reported, self._before, self._kept, each["scoring"],
            each["selection"],
        )  # fmt: skip
        self._reported = now
        self._forget()


__all__ = ["Timing"]
