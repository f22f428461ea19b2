"""Which kernels and launch plans are used, and how to force one of them (docs/performance.md).

A stage is a step of the operators that has several implementations; a plan is the name of one of
them. The stage "cpu" chooses the instruction set of the C++ kernels.

PLACEHOLDER: this module knows the stage "cpu" alone and offers no other plan than the one in use.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import torch

AUTO = "auto"
_current = {"cpu": AUTO}


def choices() -> dict[str, tuple[str, ...]]:
    """The plans of each stage that this build can use on this machine, "auto" first."""
    return {"cpu": (AUTO, json.loads(torch.ops.vispruner.build_info())["cpu_isa"])}


def current() -> dict[str, str]:
    """The plan of each stage that calls use now, "auto" where none is forced."""
    return dict(_current)


@contextlib.contextmanager
def use(**stages: str) -> Iterator[None]:
    """Forces plans, by stage, for the whole process until the context ends.

    Raises:
        ValueError: an unknown stage, or a plan that `choices()` does not list for it.
    """
    known = choices()
    for stage, plan in stages.items():
        if stage not in known:
            raise ValueError(f"stage must be one of {', '.join(known)}, got {stage!r}")
        if plan not in known[stage]:
            raise ValueError(f"{stage} must be one of {', '.join(known[stage])}, got {plan!r}")
    before = dict(_current)
    _current.update(stages)
    try:
        yield
    finally:
        _current.update(before)
