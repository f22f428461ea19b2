"""The tests of the kernels can fail: each fault of faults.py is detected by its checker."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutations.faults import FAULTS
from mutations.mutation import Mutation
from support import compiled_kernels
from support.agreement import PROBES, RESULTS, observations
from support.compiled_kernels import ROOT, TARGETS, Kernels

pytestmark = pytest.mark.slow


class Workshop:
    """Builds changed copies of csrc, those of all faults in parallel, before their tests.

    First the changed kernels are compiled for sm_90 only, where most faults are detected.
    """

    def __init__(self, directory: Path, faults: list[Mutation]) -> None:
        self._directory = directory
        self._build = compiled_kernels.build()
        self._pool = ThreadPoolExecutor(2)
        self._of_sm_90 = {
            fault.name: self._pool.submit(self._make, fault, (90,)) for fault in faults
        }

    def _make(self, fault: Mutation, targets: tuple[int, ...]) -> Path:
        directory = self._directory / f"{FAULTS.index(fault)}-{max(targets)}-{min(targets)}"
        csrc = directory / "csrc"
        shutil.copytree(ROOT / "csrc", csrc)
        fault.apply(csrc)
        build, out = self._build, compiled_kernels.build_directory()
        kernels = build.kernels(ROOT / "csrc", out, TARGETS, jobs=1)  # built already
        kernels |= build.kernels(csrc, out, targets, jobs=1, names=fault.compiled)
        others = [*build.host_objects(csrc, out, jobs=1), *build.executor(out)]
        return Path(build.link([*kernels.values(), *others], directory))

    def module(self, fault: Mutation, target: int) -> Path:
        """The module to run code for a target."""
        return self._of_sm_90[fault.name].result() if target == 90 else self._make(fault, TARGETS)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def workshop(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    compiled_session: Kernels,
) -> Iterator[Workshop]:
    for target in PROBES:
        assert list(observations(compiled_session, target)) == []  # the kernels are correct
    wanted = [
        item.callspec.params["fault"]
        for item in request.session.items
        if item.module is request.module
    ]
    shop = Workshop(tmp_path_factory.mktemp("mutations"), wanted)
    yield shop
    shop.close()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_noticed(fault: Mutation, workshop: Workshop) -> None:
    noticed: set[str] = set()
    for target in PROBES:
        kernels = Kernels(workshop.module(fault, target), counted=False)
        for observation in observations(kernels, target):
            noticed.add(observation)
            if fault.noticed_by in (observation, RESULTS):
                return
    pytest.fail(f"expected {fault.noticed_by}, noticed only {sorted(noticed)}")
