"""Blocks per multiprocessor, compared with the header of the CUDA toolkit that computes them."""

from __future__ import annotations

import importlib
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ptx import build

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

PROGRAM = r"""
#include <climits>
#include <cstddef>
#include <cstdio>
#include <cuda_occupancy.h>

// Reads lines of a device (capability, threads, shared memory) and a block (threads, registers,
// shared memory).
int main() {
  int major, minor, most_threads, threads, registers;
  size_t most_shared, shared;
  while (std::scanf("%d %d %d %zu %d %d %zu", &major, &minor, &most_threads, &most_shared, &threads,
                    &registers, &shared) == 7) {
    cudaOccDeviceProp device = {};
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = most_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerMultiprocessor = most_shared;
    device.sharedMemPerBlockOptin = most_shared - 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 1;
    cudaOccFuncAttributes kernel = {};
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.maxDynamicSharedSizeBytes = INT_MAX;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    cudaOccDeviceState state = {};
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const auto error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state,
                                                              threads, shared);
    std::printf("%d %d\n", int(error), result.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.fixture
def occupancy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("operators.occupancy")


def test_blocks_are_those_of_the_toolkit(occupancy: Any, tmp_path: Path) -> None:
    try:
        include = build.find_nvcc().include
    except build.BuildError as missing:
        pytest.skip(str(missing))
    source, program = tmp_path / "blocks.cpp", tmp_path / "blocks"
    source.write_text(PROGRAM)
    compiler = shutil.which("c++") or "c++"
    subprocess.run([compiler, f"-I{include}", source, "-o", program], check=True)
    cases = [
        (limits, arch, case)
        for arch, limits in occupancy.ARCHITECTURES.items()
        for case in itertools.product(
            (32, 128, 160, 256, 288, 576, 1024), (17, 40, 56, 64, 96, 128), (0, 712, 5000, 34304)
        )
    ]
    lines = [
        f"{arch[3:-1]} {arch[-1]} {limits.threads} {limits.shared} {' '.join(map(str, case))}\n"
        for limits, arch, case in cases
    ]
    done = subprocess.run([program], input="".join(lines), capture_output=True, text=True)
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [(0, limits.fits(*case)) for limits, _, case in cases] == found
