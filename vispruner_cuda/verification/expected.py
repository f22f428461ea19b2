"""Expected results of a case: the reference's, or float64 scores with an error bound."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .cases import EXACT, Arguments, Case


@dataclass(frozen=True)
class Exact:
    """Outputs by name that must be equal, tensors bit for bit."""

    outputs: Mapping[str, Any]


@dataclass(frozen=True)
class Near:
    """Attention scores with an error bound.

    Attributes:
        scores: float64.
        norm: the largest L2 norm of the error.
    """

    scores: Tensor
    norm: float


Expected = Exact | Near


def named_outputs(case: Case, result: Any) -> dict[str, Any]:
    """The outputs of a call by name."""
    if hasattr(result, "_asdict"):
        return dict(result._asdict())
    names = {"pairwise_cosine": "cosines", "dedup": "indices"}
    return {names.get(case.operator, "scores"): result}


def expected(case: Case, arguments: Arguments) -> Expected:
    """The result of the reference; for attention scores, that of float64 with an error bound.

    The bound is that of tests/ops/test_attention.py: twice the error of plain PyTorch in the dtype
    of the inputs, and at least the spacing of float32.
    """
    if case.operator in EXACT:
        return Exact(named_outputs(case, case.call(reference, arguments)))
    args, keywords = arguments
    if case.operator == "cls_attention":
        exact = _cls_attention(torch.float64, *args)
        plain = _cls_attention(args[0].dtype, *args)
    else:
        exact = _received_attention(torch.float64, *args)
        plain = _received_attention(args[0].dtype, *args)
        if keywords["lse"] is not None and len(exact):
            # A float32 log-sum-exp has an error of about its size times eps.
            eps = float(keywords["lse"].abs().max()) * torch.finfo(torch.float32).eps
            plain = plain + eps * exact.max()
    spacing = torch.finfo(torch.float32).eps * exact.norm().item()
    return Near(exact, max(2 * (plain.double() - exact).norm().item(), spacing))


def _cls_attention(dtype: torch.dtype, q: Tensor, k: Tensor, scale: float) -> Tensor:
    logits = (q.to(dtype).unsqueeze(2) @ k.to(dtype).transpose(2, 3)).squeeze(2) * scale
    return logits.softmax(-1)[..., 1:].mean(1)


def _received_attention(
    dtype: torch.dtype, q: Tensor, k: Tensor, scale: float, bounds: Sequence[int]
) -> Tensor:
    parts = [q.new_empty(0, dtype=dtype)]
    for start, end in itertools.pairwise(bounds):
        if end > start:
            logits = torch.einsum("qhd,khd->hqk", q[start:end].to(dtype), k[start:end].to(dtype))
            parts.append((logits * scale).softmax(-1).mean((0, 1)))
    return torch.cat(parts)


class Expectations:
    """Expected results by case, so that several backends share the work of the reference.

    Attributes:
        seconds: time spent in the reference so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._known: dict[Case, Expected] = {}

    def of(self, case: Case, arguments: Arguments) -> Expected:
        """The expected result of a case with these arguments."""
        if case not in self._known:
            start = time.perf_counter()
            self._known[case] = expected(case, arguments)
            self.seconds += time.perf_counter() - start
        return self._known[case]
