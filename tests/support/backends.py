"""The implementations that must agree, under one interface: CPU tensors in, CPU tensors out."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import vispruner_cuda
from vispruner_cuda import plans

FUNCTIONS = (
    "topk",
    "pairwise_cosine",
    "dedup",
    "prune",
    "prune_varlen",
    "cls_attention",
    "received_attention",
)


def _to(value: Any, device: str) -> Any:
    """Tensors moved, with their strides; named tuples as they are."""
    if isinstance(value, Tensor):
        if value.device.type == device or value.layout != torch.strided:
            return value.to(device)
        # .to() keeps dense strides only; views with gaps and odd alignment are to arrive too.
        if value.numel() == 0:
            return value.to(device)
        span = sum((s - 1) * t for s, t in zip(value.shape, value.stride(), strict=True)) + 1
        offset = value.storage_offset() % 8
        memory = torch.empty(span + offset, dtype=value.dtype, device=device)
        view = memory.as_strided(value.shape, value.stride(), offset)
        return view.copy_(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to(v, device) for v in value))
    return value


def _on(device: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **keywords: Any) -> Any:
        moved = {name: _to(value, device) for name, value in keywords.items()}
        return _to(function(*(_to(a, device) for a in args), **moved), "cpu")

    return call


def operators(device: str) -> Any:
    """The installed operators on a device, with their launch plans."""
    return SimpleNamespace(
        plans=_PlansOf(device),
        **{name: _on(device, getattr(vispruner_cuda, name)) for name in FUNCTIONS},
    )


class _PlansOf:
    """`vispruner_cuda.plans`, as far as the stages of a device go."""

    use = staticmethod(plans.use)

    def __init__(self, device: str) -> None:
        self._device = device

    def choices(self) -> dict[str, tuple[str, ...]]:
        on_cpu = self._device == "cpu"
        return {s: names for s, names in plans.choices().items() if (s == "cpu") == on_cpu}


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, dtypes and bits; NaN equals the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
