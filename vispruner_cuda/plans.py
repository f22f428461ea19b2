"""Launch plans: the kernel or algorithm that each stage uses.

Every plan returns the same tokens; `auto` chooses by the shape of the work. Selecting a plan by
name is for measuring and testing: a plan that cannot do the work raises RuntimeError and is not
replaced by another one. The environment variables of :func:`variables` set the plans for a whole
process; they are read once, when the library is loaded.

Source: docs/performance.md, "Launch plans".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import _library


def _described() -> dict[str, dict[str, Any]]:
    _library.load()
    stages: dict[str, dict[str, Any]] = json.loads(torch.ops.vispruner.plans())
    usable = ("auto", *_library.load().cpu_isas_usable)
    stages["cpu"]["names"] = [name for name in stages["cpu"]["names"] if name in usable]
    return stages


def choices() -> dict[str, tuple[str, ...]]:
    """The plans of each stage that this build and this processor have, `auto` first.

    A library without CUDA kernels has only the stage `cpu` (the instruction set).
    """
    return {stage: tuple(entry["names"]) for stage, entry in _described().items()}


def variables() -> dict[str, str]:
    """The environment variable of each stage."""
    return {stage: entry["variable"] for stage, entry in _described().items()}


def current() -> dict[str, str]:
    """The selected plan of each stage; `auto` if none was selected."""
    return {stage: entry["current"] for stage, entry in _described().items()}


def select(**stages: str) -> None:
    """Selects plans in this process until they are changed: `select(gram="tiles_64")`.

    Raises:
        ValueError: no such stage, or no such plan in this build or on this processor. No plan is
            changed then.
    """
    known = choices()
    for stage, name in stages.items():
        if stage not in known:
            raise ValueError(
                f"no stage {stage!r} has launch plans in this build: use one of {', '.join(known)}"
            )
        if name not in known[stage]:
            raise ValueError(
                f"{stage} must be one of {', '.join(known[stage])} on this machine, got {name!r}"
            )
    for stage, name in stages.items():
        torch.ops.vispruner.set_plan(stage, name)


@contextmanager
def use(**stages: str) -> Iterator[None]:
    """:func:`select` within a `with` block. The setting is process-wide, for other threads as well.

    Raises:
        ValueError: as for :func:`select`.
    """
    before = current()
    select(**stages)
    try:
        yield
    finally:
        select(**{stage: before[stage] for stage in stages})
