"""All golden files, on every implementation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support import problems

from vispruner_cuda import reference

FILES = ("upstream_exact", "v1", "methods")
CASES = [case for file in FILES for case in problems.golden_cases(file)]


def test_all_cases_are_there() -> None:
    assert len(CASES) == 48 + 53 + 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden(
    case: problems.GoldenCase, implementations: dict[str, Any], count_equal: Counter[str]
) -> None:
    for name, implementation in {"reference": reference, **implementations}.items():
        kept = implementation.prune(case.feats, case.cls_attn, case.k, **case.keywords)
        assert torch.equal(kept.indices[0], case.indices), name
        assert torch.equal(kept.feats[0].nan_to_num(), case.feats[0][case.indices].nan_to_num()), (
            name
        )
        count_equal[f"golden, {name}"] += 1
