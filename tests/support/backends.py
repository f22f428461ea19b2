"""The implementations that must agree, under one interface: CPU tensors in, CPU tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from vispruner_cuda.verification.machine import operators

__all__ = ["bitwise_equal", "operators"]


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, dtypes and bits; NaN equals the same NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
