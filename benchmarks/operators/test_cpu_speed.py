"""CPU operators and their eager baselines under pytest-benchmark: `make bench`.

cpu.py measures the same cases interleaved, for the tables in the documentation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # pytest's importlib mode does not

from operators.cpu import OPERATOR, candidates, check
from operators.workloads import CPU_CASES, Case

PAIRS = [(case, name) for case in CPU_CASES for name in candidates(Case(case.op, case.images, 4))]


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("case", "candidate"), PAIRS, ids=lambda x: getattr(x, "name", x))
def test_speed(benchmark: Any, case: Case, candidate: str) -> None:
    benchmark.group = case.name
    if candidate == OPERATOR:
        check(case)
    function = candidates(case)[candidate]
    rounds = min(case.rounds, 7)
    benchmark.pedantic(function, rounds=rounds, iterations=1, warmup_rounds=1)
