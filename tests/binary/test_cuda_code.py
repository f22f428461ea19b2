"""The CUDA code in the library: architectures, PTX, registers, and no local memory."""

from __future__ import annotations

import re

import pytest
from support import machine_code


@pytest.fixture(scope="module")
def kernels(tool, library, cuda_build) -> list[machine_code.Kernel]:
    tool("cuobjdump", "--version")  # skips the test without it
    return machine_code.kernels(library)


def _listed(text: str) -> set[str]:
    return set(re.findall(r"\.sm_(\w+)\.(?:cubin|ptx)", text))


def test_machine_code_of_every_architecture(tool, library, cuda_build):
    want = {arch.removesuffix("+PTX") for arch in cuda_build.cuda_archs.split()}
    assert _listed(tool("cuobjdump", "-lelf", library)) == want


def test_ptx_for_other_gpus(tool, library, cuda_build):
    want = {arch[:-4] for arch in cuda_build.cuda_archs.split() if arch.endswith("+PTX")}
    assert want
    assert _listed(tool("cuobjdump", "-lptx", library)) == want


def test_same_kernels_for_every_architecture(kernels, cuda_build):
    names = {}
    for kernel in kernels:
        names.setdefault(kernel.arch, set()).add(kernel.name)
    assert len(names) == len(cuda_build.cuda_archs.split())
    assert all(found == next(iter(names.values())) for found in names.values())


def test_no_local_memory(kernels):
    found = [f"{k.name} ({k.arch}): {k.local} bytes per thread" for k in kernels if k.local]
    assert not found, "\n".join(found)
