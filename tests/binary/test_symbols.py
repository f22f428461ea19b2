"""The library needs only C functions of torch 2.10, and libc, from its process."""

from __future__ import annotations

from pathlib import Path

import pytest

STREAM = "aoti_torch_get_current_cuda_stream"  # only a CUDA torch has it
SHIMS = Path(__file__).with_name("shims_torch_2.10.txt").read_text().splitlines()[1:]


@pytest.fixture(scope="module")
def undefined(tool, library) -> dict[str, str]:
    """Name -> type ("U", or "w" if weak) of the undefined symbols."""
    rows = [line.split() for line in tool("nm", "-D", "--undefined-only", library).splitlines()]
    return {name: kind for kind, name in rows}


@pytest.fixture(scope="module")
def dynamic(tool, library) -> list[str]:
    return tool("readelf", "-dW", library).splitlines()


def test_only_stable_symbols(undefined):
    # Those of libc, libm and libstdc++ have a version (name@GLIBC_2.14); torch's have none.
    allowed = {*SHIMS, STREAM, "__gmon_start__", "_ITM_registerTMCloneTable"}
    allowed.add("_ITM_deregisterTMCloneTable")
    unversioned = {name for name in undefined if "@" not in name}
    assert not unversioned - allowed


def test_no_python_symbol(undefined):
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]


def test_stream_symbol_is_weak(undefined, cuda_build):
    assert undefined.get(STREAM) == "w", "a CPU-only torch could not load the library"


def test_needs_libtorch(dynamic):
    # Through libtorch.so a CUDA torch's libtorch_cuda.so is searched for the stream symbol.
    assert any("(NEEDED)" in line and "[libtorch.so]" in line for line in dynamic)


def test_needs_nothing_of_cuda_or_python(dynamic):
    needed = [line for line in dynamic if "(NEEDED)" in line]
    assert not [n for n in needed if any(name in n for name in ("cuda", "c10", "libpython"))]


def test_no_library_path_built_in(dynamic):
    assert not [line for line in dynamic if "RPATH" in line or "RUNPATH" in line]


def test_exports_no_cuda_runtime(tool, library):
    # Its static copy must not be taken for torch's.
    names = [row.split()[-1] for row in tool("nm", "-D", "--defined-only", library).splitlines()]
    assert not [name for name in names if name.startswith(("cuda", "__cuda"))]


def test_no_build_path_in_messages(tool, library):
    # (The line tables for profilers, in the CUDA code, do name the source files.)
    assert str(Path(__file__).resolve().parents[2]) not in tool("readelf", "-p", ".rodata", library)
