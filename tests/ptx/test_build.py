"""The build, and the project's kernels on the executor."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from ptx import build
from ptx.conftest import BUILD, ROOT

from vispruner_cuda import reference

#: The real value, which `no_compilers` replaces.
PYTHON_NVCCS = build._python_nvccs

FAKE_NVCC = """#!/bin/sh
echo '#$ INCLUDES="-I{include}"' >&2
"""


@pytest.fixture
def no_compilers(monkeypatch, tmp_path):
    """An environment without nvcc; returns the only directory on the PATH."""
    for variable in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(build, "USUAL_HOME", tmp_path / "nowhere")
    monkeypatch.setattr(build, "_python_nvccs", list)
    build.find_nvcc.cache_clear()
    yield tmp_path
    build.find_nvcc.cache_clear()


def fake_nvcc(directory: Path, *, headers: bool = True) -> Path:
    include = directory / "include"
    include.mkdir(parents=True)
    if headers:
        (include / "cuda_runtime_api.h").touch()
    nvcc = directory / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(FAKE_NVCC.format(include=include))
    nvcc.chmod(0o755)
    return nvcc


def test_no_compiler(no_compilers):
    with pytest.raises(build.BuildError, match=r"no nvcc: set CUDACXX.*\n.*pip install"):
        build.find_nvcc()


@pytest.mark.parametrize("place", ["CUDACXX", "PATH", "CUDA_HOME", "usual", "python"])
def test_places_of_the_compiler(no_compilers, monkeypatch, place):
    home = no_compilers / ("nowhere" if place == "usual" else "cuda")
    nvcc = fake_nvcc(home)
    if place == "CUDACXX":
        monkeypatch.setenv("CUDACXX", str(nvcc))
    elif place == "PATH":
        monkeypatch.setenv("PATH", f"{home}/bin")
    elif place == "CUDA_HOME":
        monkeypatch.setenv("CUDA_HOME", str(home))
    elif place == "python":
        monkeypatch.setattr(build, "_python_nvccs", lambda: [nvcc])
    found = build.find_nvcc()
    assert found.path == nvcc
    assert found.include == home / "include"


def test_compiler_without_headers(no_compilers, monkeypatch):
    monkeypatch.setenv("CUDACXX", str(fake_nvcc(no_compilers / "cuda", headers=False)))
    with pytest.raises(build.BuildError, match=r"no headers of .*nvidia-cuda-runtime"):
        build.find_nvcc()


def test_compiler_of_the_package_index(no_compilers, monkeypatch):
    """The packages of the extra `test` compile a kernel of the project, with no other nvcc."""
    packages = list(PYTHON_NVCCS())
    if not packages:
        message = "nvidia-cuda-nvcc and its companions are not installed (pip install '.[test]')"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    monkeypatch.setattr(build, "_python_nvccs", PYTHON_NVCCS)
    monkeypatch.setenv("PATH", os.defpath)  # only the C++ compiler
    assert shutil.which("nvcc") is None
    assert build.find_nvcc().path == packages[0]
    csrc = no_compilers / "csrc"
    (csrc / "cuda").mkdir(parents=True)
    shutil.copytree(ROOT / "csrc" / "include", csrc / "include")
    for name in ("gather.cu", "batch.cuh", "device.cuh", "launch.cuh"):
        shutil.copy(ROOT / "csrc" / "cuda" / name, csrc / "cuda")
    shutil.copy(ROOT / "csrc" / "plan.cpp", csrc)
    compiled = build.kernels(csrc, no_compilers / "out", (80, 90))
    assert list(compiled) == ["gather"]
    assert compiled["gather"].stat().st_size > 0
    assert build.host_objects(csrc, no_compilers / "out")


def test_no_kernels(tmp_path):
    with pytest.raises(build.BuildError, match="no kernels in"):
        build.kernels(tmp_path, tmp_path / "out")


def test_unknown_kernels():
    with pytest.raises(build.BuildError, match="no wrong in"):
        build.kernels(ROOT / "csrc", Path("/nonexistent"), names=["wrong"])


def test_objects_are_named_by_their_content(tmp_path):
    """The content of the source and of all headers that it includes, and nothing else."""
    include = tmp_path / "include"
    include.mkdir()
    source, header, other = tmp_path / "a.cpp", include / "a.h", include / "other.h"
    source.write_text('#include "a.h"\nint a() { return A; }\n')
    header.write_text("#define A 1\n")
    other.write_text("#define B 1\n")

    def target() -> Path:
        return build._cxx_task(source, tmp_path, [include], depends=[include]).target

    first = target()
    other.write_text("#define B 2\n")
    assert target() == first
    header.write_text("#define A 2\n")
    assert target() != first
    header.write_text("#define A 1\n")
    assert target() == first
    moved = tmp_path / "elsewhere"
    shutil.copytree(include, moved)
    assert build._cxx_task(source, tmp_path, [moved], depends=[moved]).target == first


def test_errors_of_the_compiler_are_shown(tmp_path):
    source = tmp_path / "a.cpp"
    source.write_text("int a() { return nothing; }\n")
    with pytest.raises(build.BuildError, match=r"nothing.*was not declared"):
        build._compile([build._cxx_task(source, tmp_path, [])], 1)


# ---- with nvcc
@pytest.fixture(scope="module")
def nvcc() -> None:
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.fail(str(error)) if os.environ.get("CI") else pytest.skip("there is no nvcc")


HOST_CODE = """
#include <cuda_runtime.h>
#define EXPORT extern "C" __attribute__((visibility("default")))
__global__ void empty() {}
EXPORT int launch(int threads) {
  empty<<<dim3(2, 3), threads, 100>>>();
  return cudaPeekAtLastError();
}
EXPORT int last_error() { return cudaGetLastError(); }
EXPORT int attribute(int which) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(which), 0);
}
EXPORT int allow(int bytes) {
  return cudaFuncSetAttribute(empty, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
EXPORT int versions() {
  int driver = 0, runtime = 0;
  return cudaDriverGetVersion(&driver) || cudaRuntimeGetVersion(&runtime) ? -1 : driver - runtime;
}
EXPORT int ptx_version() {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, empty) ? -1 : attributes.ptxVersion;
}
EXPORT int choose(int device) {
  int now = -1;
  return cudaSetDevice(device) || cudaGetDevice(&now) ? -1 : now;
}
EXPORT const char* name(int error) {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}
"""


@pytest.fixture(scope="module")
def host(nvcc, tmp_path_factory) -> ctypes.CDLL:
    """Host code that calls the fake runtime in all possible ways."""
    directory = tmp_path_factory.mktemp("host")
    source = directory / "cuda" / "host.cu"
    source.parent.mkdir()
    source.write_text(HOST_CODE)
    runtime = build._cxx_task(build.RUNTIME, directory, [build.find_nvcc().include])
    kernels = build._kernel_task(source, directory, directory, [80])
    compiled = build._compile([runtime, kernels], 1)
    path = build.link([*compiled, *build.executor(BUILD)], directory, "host")
    library = ctypes.CDLL(str(path))
    library.name.restype = ctypes.c_char_p
    return library


def test_triple_chevrons(host):
    assert host.launch(128) == 0
    assert host.launch(2000) == 9  # stays until it is read
    assert host.name(9) == b"cudaErrorInvalidConfiguration"
    assert [host.last_error(), host.last_error()] == [9, 0]


def test_calls_of_the_runtime(host):
    assert host.attribute(75) == 0  # major
    assert host.attribute(1) == 1  # not known to the fake
    assert host.allow(227 * 1024) == 0
    assert host.allow(227 * 1024 + 1) == 1
    assert host.versions() == 0
    assert host.ptx_version() == 80
    assert [host.choose(n) for n in (3, 7, 8, -1, 0)] == [3, 7, -1, -1, 0]
    host.last_error()


@pytest.fixture(scope="module")
def module_path(nvcc) -> Path:
    return build.build(ROOT / "csrc", BUILD)


@pytest.fixture
def module(module_path: Path) -> Iterator[ModuleType]:
    loaded = build.load(module_path)
    loaded.configure()
    loaded.set_device()
    loaded.take_launches()
    yield loaded
    loaded.take_findings()


def dedup(module: ModuleType) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of the kernels for a small problem, and those of the reference."""
    feats = torch.randn((1, 40, 16), generator=torch.Generator().manual_seed(0))
    indices = torch.full((1, 7), -1, dtype=torch.int64)
    argument = (feats.data_ptr(), 0, list(feats.stride()))
    module.prune(argument, None, 1, 1, 40, 16, 7, (0.0, 8), indices.data_ptr(), 0, 1 << 40)
    return indices, reference.dedup(feats, 7)


@pytest.mark.parametrize(("device", "ptx"), [({"major": 8}, 80), ({"major": 9}, 90)])
def test_one_module_serves_all_devices(module, device, ptx):
    module.set_device(**device)
    module.take_runtime_calls()
    indices, expected = dedup(module)
    assert torch.equal(indices, expected)
    launches = module.take_launches()
    assert {launch["ptx"] for launch in launches} == {ptx}
    assert any(launch["kernel"].startswith("dedup_kernel<") for launch in launches)
    assert module.take_runtime_calls()["cudaLaunchKernelExC"] == len(launches)


@pytest.mark.parametrize(
    ("device", "error"),
    [
        ({"driver": 11080}, "CUDA driver version is insufficient for CUDA runtime version"),
        ({"major": 7, "minor": 5}, "no kernel image is available for execution on the device"),
    ],
)
def test_errors_reach_the_caller(module, device, error):
    module.set_device(**device)
    with pytest.raises(RuntimeError, match=error):
        dedup(module)


def test_a_new_device_has_no_permissions(module):
    """Permissions are per device: host code that caches them by device must request them again."""
    for _ in range(2):
        module.set_device()
        module.take_runtime_calls()
        dedup(module)
        calls = module.take_runtime_calls()
        assert calls["cudaFuncSetAttribute"] > 0


def test_modules_side_by_side(module, module_path, tmp_path):
    """Two modules of the same name in one process: each has its own executor and log."""
    copy = tmp_path / module_path.name
    shutil.copy(module_path, copy)
    other = build.load(copy)
    dedup(module)
    assert module.take_launches()
    assert other.take_launches() == []
