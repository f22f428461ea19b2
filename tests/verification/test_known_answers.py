"""The stored answers equal those of the reference and of every implementation."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from vispruner_cuda import reference
from vispruner_cuda.verification import OPERATORS, Backend, known_answers, machine, verify

STORED = json.loads(known_answers.PATH.read_text())["answers"]
SMALL = [case for case in known_answers.CASES if case.cost < 100]
LARGE = [case for case in known_answers.CASES if case.cost >= 100]


def test_every_operator_has_one() -> None:
    assert {case.operator for case in SMALL} == set(OPERATORS)
    assert len(STORED) == len(known_answers.CASES)
    assert known_answers.PATH.stat().st_size < 10_000


def test_the_reference_gives_them() -> None:
    answers = {json.dumps(entry["case"]): entry for entry in STORED}
    for entry in known_answers.generate(tuple(SMALL)):
        assert json.loads(json.dumps(entry)) == answers[json.dumps(entry["case"])]


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_the_reference_gives_large_ones(case: Any) -> None:
    (entry,) = known_answers.generate((case,))
    assert entry in STORED


@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_operators_give_them(large: bool) -> None:
    known = [a for a in known_answers.load() if (a.case in LARGE) == large]
    result = verify(Backend("cpu", machine.operators("cpu")), [], known)
    assert result["equal"], result
    assert result["known_answers"]["cases"] == len(known)


def test_scores_are_stored_with_a_narrow_bound() -> None:
    known = [a for a in known_answers.load() if "scores" in a.stored]
    operators = machine.operators("cpu")
    for name in ("cls_attention", "received_attention"):
        right = getattr(operators, name)
        setattr(operators, name, lambda *a, right=right, **k: right(*a, **k) * (1 + 2e-5))
    result = verify(Backend("cpu", operators), [], known)
    assert result["known_answers"]["wrong_cases"] == len(known) == 4


def inexact_product(q: torch.Tensor) -> torch.Tensor:
    q = q.bfloat16()
    return (q @ q.transpose(-1, -2)).double() + 0.0


def unstable_sort(x: torch.Tensor, dim: int = -1, descending: bool = False, **_: Any) -> Any:
    values, indices = torch.sort(x.flip(dim), dim, descending=descending, stable=True)
    return torch.return_types.sort((values, x.shape[dim] - 1 - indices))


@pytest.mark.parametrize("fault", ["product", "sort", "softmax"])
def test_a_wrong_reference_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If PyTorch itself is wrong, a comparison with the reference does not detect it."""
    if fault == "product":
        monkeypatch.setattr(reference, "gram", inexact_product)
    elif fault == "sort":
        monkeypatch.setattr(reference.torch, "sort", unstable_sort)
    else:
        softmax = torch.Tensor.softmax
        monkeypatch.setattr(
            torch.Tensor, "softmax", lambda x, dim: softmax(x.bfloat16().float(), dim)
        )
    known = [a for a in known_answers.load() if a.case in SMALL]
    result = verify(Backend("reference", reference), [], known)
    assert not result["equal"]
    wrong = {d["case"]["operator"] for d in result["known_answers"]["differences"]}
    assert wrong
