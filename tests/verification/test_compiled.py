"""The verification on the compiled kernels, so that it works the first time on a GPU."""

from __future__ import annotations

import pytest
from support.compiled_kernels import ADA, H100, Device, Kernels

from vispruner_cuda.verification import OPERATORS, Backend, cases, known_answers, select, verify

MOST_COST = 20


@pytest.mark.parametrize("device", [H100, ADA], ids=["sm_90", "sm_89"])
def test_verification_of_compiled_kernels(device: Device, compiled: Kernels) -> None:
    compiled.device = device
    backend = Backend(
        "compiled kernels", compiled, compiled.plans, dependent_launches=device.major >= 9
    )
    known = [answer for answer in known_answers.load() if answer.case.cost <= MOST_COST]
    assert known
    result = verify(backend, select(cases(), most_cost=MOST_COST), known, plans="turns")
    assert result["equal"], result
    assert set(result["operators"]) >= set(OPERATORS)
