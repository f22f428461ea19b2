"""The CUDA code in the library: architectures, PTX, registers, and no local memory."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest


class Kernel(NamedTuple):
    arch: str
    name: str
    registers: int
    shared: int
    local: int  # bytes per thread: spilled registers and arrays that could not stay in registers


@pytest.fixture(scope="module")
def kernels(tool, library, cuda_build) -> list[Kernel]:
    found = []
    arch = name = ""
    for line in tool("cuobjdump", "-res-usage", library).splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            local = usage["STACK"] + usage["LOCAL"]
            found.append(Kernel(arch, name, usage["REG"], usage["SHARED"], local))
    return found


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


def test_register_report(kernels, tool, capsys):
    """Prints the registers (and static shared memory) per kernel, one column per architecture."""
    archs = sorted({kernel.arch for kernel in kernels}, key=lambda arch: int(arch[3:].rstrip("af")))
    by_name = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.arch] = kernel
    names = list(by_name)
    plain = tool("c++filt", *names).splitlines()
    lines = [" ".join(f"{arch:>9}" for arch in archs) + "  registers/shared bytes of"]
    for name, readable in sorted(zip(names, plain, strict=True), key=lambda pair: pair[1]):
        cells = (f"{by_name[name][a].registers}/{by_name[name][a].shared}" for a in archs)
        readable = re.sub(r"\(anonymous namespace\)::", "", readable)
        readable = re.sub(r"^void |\(.*", "", readable)
        lines.append(" ".join(f"{cell:>9}" for cell in cells) + f"  {readable}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert all(kernel.registers <= 255 for kernel in kernels)
