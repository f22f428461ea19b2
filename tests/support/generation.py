"""Calls of tiny models, and how close their results must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STEPS = 5


def generate(model: Any, inputs: dict[str, Any], **changes: Any) -> Any:
    """Greedy decoding of STEPS tokens, none of which is a placeholder."""
    settings = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": [198, 199]}
    return model.generate(**inputs, **{**settings, **changes})


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
