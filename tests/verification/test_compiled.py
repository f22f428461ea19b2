"""The verification on the compiled kernels, so that it works the first time on a GPU."""

from __future__ import annotations

import pytest
from support.compiled_kernels import ADA, H100, Device, Kernels

from vispruner_cuda.verification import OPERATORS, Backend, cases, select, verify


@pytest.mark.parametrize("device", [H100, ADA], ids=["sm_90", "sm_89"])
def test_verification_of_compiled_kernels(device: Device, compiled: Kernels) -> None:
    compiled.device = device
    backend = Backend(
        "compiled kernels", compiled, compiled.plans, dependent_launches=device.major >= 9
    )
    result = verify(backend, select(cases(), quick=True))
    assert result["equal"], result
    assert set(result["operators"]) >= set(OPERATORS)
