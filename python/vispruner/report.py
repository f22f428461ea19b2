"""What the last call did: tokens kept and time spent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Clock:
    """Milliseconds of named phases, without making the host wait for a GPU.

    On CUDA a phase is a pair of events, read when somebody asks. A phase inside another does not
    count for the outer one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, str | None, object, object]] = []
        self._open: list[str] = []

    def _now(self) -> object:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer = self._open[-1] if self._open else None
        self._open.append(phase)
        start = self._now()
        try:
            yield
        finally:
            self._open.pop()
            self._spans.append((phase, outer, start, self._now()))

    def milliseconds(self) -> dict[str, float]:
        """Phase to milliseconds; waits for the GPU."""
        total: dict[str, float] = {}
        for phase, outer, start, end in self._spans:
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


@dataclass(frozen=True)
class Kept:
    """What was kept of one image or video.

    Attributes:
        modality: "image" or "video".
        indices: (k,) int64, ascending: kept cells of the flattened grid.
        grid: (rows, columns) of an image's tokens, (tiles, rows, columns) of a tiled image,
            (frames, rows, columns) of a video.
        before: tokens that the unpruned model gives the image, separators included.
        after: tokens that the language model saw.
    """

    modality: str
    indices: Tensor
    grid: tuple[int, ...]
    before: int
    after: int


@dataclass(frozen=True)
class Report:
    """The last call of a pruned model.

    Attributes:
        items: one entry for each image and video, images first, in the order they were passed.
        prompt_before, prompt_after: columns of the prompt, padding and text included.
    """

    items: tuple[Kept, ...]
    prompt_before: int
    prompt_after: int
    _clock: Clock = field(repr=False)

    @property
    def tokens_before(self) -> int:
        """Visual tokens of all images and videos without pruning."""
        return sum(item.before for item in self.items)

    @property
    def tokens_after(self) -> int:
        """Visual tokens that the language model saw."""
        return sum(item.after for item in self.items)

    @property
    def milliseconds(self) -> dict[str, float]:
        """Time of each phase; waits for the GPU.

        `vision` is the encoder with its projector, `rewrite` the shortening of the prompt,
        `generate` the language model, there only after a call of generate.
        """
        return self._clock.milliseconds()
