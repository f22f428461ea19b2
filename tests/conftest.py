"""Fixtures and counts of the whole suite."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import hypothesis
import pytest
import torch
from support import backends, host_kernels

#: Random cases of the whole suite; each test takes its share.
RANDOM_CASES = int(os.environ.get("VISPRUNER_RANDOM_CASES", "10000"))

hypothesis.settings.register_profile(
    "exact",
    deadline=None,
    derandomize=True,  # the same cases everywhere; other seeds: --hypothesis-seed
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("exact")
torch.set_num_threads(min(4, torch.get_num_threads()))

_equal_cases: Counter[str] = Counter()


@pytest.fixture(scope="session")
def count_equal() -> Counter[str]:
    """Tests add the comparisons they made; the totals are printed at the end."""
    return _equal_cases


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _equal_cases:
        terminalreporter.section("bitwise equal to the reference")
        for name, count in sorted(_equal_cases.items()):
            terminalreporter.write_line(f"{name}: {count} comparisons")


#: The host run of the CUDA kernels takes most of the time of tests/ops. It is left out where the
#: kernels themselves can run, unless it is asked for.
RUN_HOST_KERNELS = (
    not torch.cuda.is_available() or os.environ.get("VISPRUNER_TEST_HOST_KERNELS") == "1"
)


@pytest.fixture(scope="session")
def host() -> host_kernels.Kernels:
    """The CUDA kernels, run on the host. Built once a session, incrementally."""
    if not RUN_HOST_KERNELS:
        pytest.skip("the CUDA kernels run on the GPU (VISPRUNER_TEST_HOST_KERNELS=1 runs these)")
    directory = host_kernels.default_build_directory()
    return host_kernels.Kernels(host_kernels.build(host_kernels.ROOT / "csrc", directory))


@pytest.fixture
def host_kernels_default(host: host_kernels.Kernels) -> host_kernels.Kernels:
    """The same with default schedule, limits and launch plans."""
    host.schedule = 0
    host.shared_limit = host_kernels.H200_SHARED
    host.workspace_limit = host_kernels.NO_LIMIT
    return host


@pytest.fixture(scope="session")
def implementations(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Everything that must return what the reference returns."""
    found: dict[str, Any] = {"cpu": backends.operators("cpu")}
    if RUN_HOST_KERNELS:
        found["kernels on host"] = request.getfixturevalue("host")
    if torch.cuda.is_available():
        found["cuda"] = backends.operators("cuda")
    return found
