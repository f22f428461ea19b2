"""The implementations that must agree, with one interface: CPU tensors in, CPU tensors out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vispruner_cuda import plans
from vispruner_cuda.verification import OPERATORS, machine


class PlansOf:
    """`vispruner_cuda.plans`, limited to the stages of a device."""

    use = staticmethod(plans.use)
    current = staticmethod(plans.current)

    def __init__(self, device: str) -> None:
        self._device = device

    def choices(self) -> dict[str, tuple[str, ...]]:
        on_cpu = self._device == "cpu"
        return {s: names for s, names in plans.choices().items() if (s == "cpu") == on_cpu}


def operators(device: str) -> Any:
    """The installed operators on a device, with their launch plans."""
    found = machine.operators(device)
    functions = {name: getattr(found, name) for name in OPERATORS}
    return SimpleNamespace(plans=PlansOf(device), **functions)


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, dtypes and bits; NaN equals the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
