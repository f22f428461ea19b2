"""Fixtures and counters of the whole test suite."""

from __future__ import annotations

import copy
import datetime
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from support import backends, compiled_kernels

from vispruner_cuda import _library

#: Total number of random cases, divided among the tests.
RANDOM_CASES = int(os.environ.get("VISPRUNER_RANDOM_CASES", "10000"))

hypothesis.settings.register_profile(
    "exact",
    deadline=None,
    derandomize=True,  # equal cases everywhere; other seeds: --hypothesis-seed
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("exact")
torch.set_num_threads(min(4, torch.get_num_threads()))

_equal_cases: Counter[str] = Counter()


@pytest.fixture(scope="session")
def count_equal() -> Counter[str]:
    """Counts the tests' comparisons; the totals are printed at the end."""
    return _equal_cases


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--compiled-report",
        type=Path,
        metavar="FILE",
        help="record the runs of the compiled kernels (benchmarks/results/compiled_kernels.json)",
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--compiled-report")
    if path and compiled_kernels.TOTALS.calls:
        totals = asdict(compiled_kernels.TOTALS)
        faults = [i for i in session.items if i.originalname == "test_fault_is_noticed"]
        report = {
            "date": datetime.date.today().isoformat(),
            "sources": _library.load().sources,
            **{k: sorted(v) if isinstance(v, set) else v for k, v in totals.items()},
            "equal_cases": sum(_equal_cases.values()),
            "faults": len(faults),
            "tests_failed": session.testsfailed,
        }
        path.write_text(json.dumps(report, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    totals = compiled_kernels.TOTALS
    if totals.calls:
        terminalreporter.section("compiled kernels (PTX) on host")
        terminalreporter.write_line(
            f"{totals.calls} calls, {totals.launches} launches of {len(totals.kernels)} kernels; "
            f"errors were found in {totals.failed} calls"
        )
    if _equal_cases:
        terminalreporter.section("bitwise equal to the reference")
        for name, count in sorted(_equal_cases.items()):
            terminalreporter.write_line(f"{name}: {count} comparisons")


@pytest.fixture(scope="session")
def compiled_session() -> compiled_kernels.Kernels:
    """The compiled kernels in the PTX executor, built once per session, incrementally."""
    if missing := compiled_kernels.not_tested():
        pytest.skip(missing)
    return compiled_kernels.Kernels(compiled_kernels.build_module())


@pytest.fixture
def compiled(compiled_session: compiled_kernels.Kernels) -> Iterator[compiled_kernels.Kernels]:
    """The compiled kernels with the default device, options and plans."""
    compiled_session.reset()
    yield compiled_session
    compiled_session.reset()


@pytest.fixture(scope="session")
def installed() -> dict[str, Any]:
    """The installed operators on every kind of device of this machine."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {device: backends.operators(device) for device in devices}


@pytest.fixture
def implementations(installed: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    """All implementations that must equal the reference, with default options and plans."""
    if missing := compiled_kernels.not_tested():
        warnings.warn(f"the compiled kernels are not tested on the host: {missing}", stacklevel=1)
        return installed
    on_sm_90 = request.getfixturevalue("compiled_session")
    on_sm_90.reset()
    on_sm_80 = copy.copy(on_sm_90)  # the same module
    # Older code with equal shared memory, so that the same cases fit.
    on_sm_80.device = compiled_kernels.Device(8, 0, compiled_kernels.H100.shared_bytes)
    return {**installed, "compiled for sm_90": on_sm_90, "compiled for sm_80": on_sm_80}
