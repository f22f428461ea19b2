"""Differences between a result and the expected one, as plain data."""

from __future__ import annotations

import math
from typing import Any, TypedDict

import torch
from torch import Tensor

from .cases import Case
from .expected import Expected, Near, named_outputs

#: The norm of all errors can hide a single wrong score, so each score is checked as well, with a
#: bound relative to itself and to the largest one.
RELATIVE = 1e-3
ABSOLUTE = 1e-6


class Difference(TypedDict, total=False):
    """A wrong result: where it differs and how, or the `error` that was raised."""

    case: dict[str, Any]
    text: str  # the case in words
    plans: dict[str, str]  # those that were selected
    error: str
    output: str
    position: list[int]
    got: Any
    want: Any
    wrong_elements: int
    error_norm: float
    allowed_norm: float


def compare(case: Case, result: Any, want: Expected) -> Difference | None:
    """The first difference of a result from the expected one, or None."""
    got = named_outputs(case, result)
    if isinstance(want, Near):
        return _compare_scores(got["scores"], want)
    for name, value in want.outputs.items():
        found = _compare_output(name, got[name], value)
        if found:
            return found
    return None


def _compare_output(name: str, got: Any, want: Any) -> Difference | None:
    if not isinstance(want, Tensor):
        return None if got == want else {"output": name, "got": repr(got), "want": repr(want)}
    if not isinstance(got, Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return {"output": name, "got": _kind(got), "want": _kind(want)}
    got_bits, want_bits = _bits(got), _bits(want)
    if torch.equal(got_bits, want_bits):
        return None
    wrong = (got_bits != want_bits).nonzero()
    at = tuple(wrong[0].tolist())
    return {
        "output": name,
        "position": list(at),
        "got": _element(got[at], got_bits[at]),
        "want": _element(want[at], want_bits[at]),
        "wrong_elements": len(wrong),
    }


def _compare_scores(got: Any, want: Near) -> Difference | None:
    scores = want.scores
    if not isinstance(got, Tensor) or got.dtype != torch.float32 or got.shape != scores.shape:
        return {"output": "scores", "got": _kind(got), "want": _kind(scores.float())}
    if not scores.numel():
        return None
    error = (got.double() - scores).abs()
    norm = error.norm().item()
    wrong = (~(error <= RELATIVE * scores + ABSOLUTE * scores.max())).nonzero()  # NaN: wrong
    if not len(wrong):
        if norm <= want.norm:
            return None
        # Each score is close enough but their norm is not: show the first large error.
        wrong = (error >= want.norm / math.sqrt(error.numel())).nonzero()
    at = tuple(wrong[0].tolist())
    return {
        "output": "scores",
        "position": list(at),
        "got": _number(got[at].item()),
        "want": scores[at].item(),
        "wrong_elements": len(wrong),
        "error_norm": _number(norm),
        "allowed_norm": want.norm,
    }


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
    return repr(value)


def _bits(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _element(value: Tensor, bits: Tensor) -> Any:
    """An integer as it is; a float with its bits, which distinguish -0 and NaNs."""
    if not value.is_floating_point():
        return value.item()
    width = 8 * value.element_size()
    return f"{value.item()!r} (0x{bits.item() % 2**width:0{width // 4}x})"


def _number(x: float) -> Any:
    return x if math.isfinite(x) else repr(x)  # JSON has no NaN
