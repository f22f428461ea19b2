"""Times of the phases of a call: vision, score, select, rewrite, prefill, decode."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Milliseconds of named phases, measured without making the host wait for a GPU.

    On CUDA a phase is a pair of events, which are read on request. The time of a nested phase does
    not count for the outer one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, str | None, object, object]] = []
        self._open: list[tuple[str, object]] = []

    def _now(self) -> object:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _end(self) -> None:
        phase, start = self._open.pop()
        outer = self._open[-1][0] if self._open else None
        self._spans.append((phase, outer, start, self._now()))

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._open.append((phase, self._now()))
        try:
            yield
        finally:
            self._end()

    def switch(self, phase: str) -> None:
        """Ends the innermost open phase and begins another in its place."""
        self._end()
        self._open.append((phase, self._now()))

    def milliseconds(self) -> dict[str, float]:
        """Phase to milliseconds; waits for the GPU."""
        return self._sum(self._spans)

    def take(self) -> dict[str, float]:
        """Phase to milliseconds, of the spans that the device has completed.

        They are removed, so that a long-running clock stays small. Does not synchronize.
        """
        ended = 0
        for _, _, _, end in self._spans:
            if isinstance(end, torch.cuda.Event) and not end.query():
                break
            ended += 1
        taken, self._spans = self._spans[:ended], self._spans[ended:]
        return self._sum(taken)

    @staticmethod
    def _sum(spans: list[tuple[str, str | None, object, object]]) -> dict[str, float]:
        total: dict[str, float] = {}
        for phase, outer, start, end in spans:
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                end.synchronize()
                span = start.elapsed_time(end)
            else:
                assert isinstance(start, float)
                assert isinstance(end, float)
                span = 1e3 * (end - start)
            total[phase] = total.get(phase, 0.0) + span
            if outer is not None:
                total[outer] = total.get(outer, 0.0) - span
        return total


class Prefill:
    """Detects when a call of generate has read its prompt, and starts the phase "decode".

    Args:
        clock: with the phase "prefill" open.
        columns: columns of the prompt that the cache does not hold yet.
    """

    def __init__(self, clock: Clock, columns: int) -> None:
        self._clock, self._columns = clock, columns

    def read(self, call: Mapping[str, Any]) -> bool:
        """Called after every forward, with its arguments; True when prefill is complete."""
        tokens = call.get("input_ids")
        tokens = call.get("inputs_embeds") if tokens is None else tokens
        self._columns -= 0 if tokens is None else tokens.shape[1]
        if self._columns > 0:  # more chunks follow
            return False
        self._clock.switch("decode")
        return True
