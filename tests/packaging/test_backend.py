"""The build backend requires only what is not installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def backend(monkeypatch):
    """The backend on a simulated machine with everything in the target environment."""
    path = ROOT / "build_backend" / "vispruner_backend.py"
    spec = importlib.util.spec_from_file_location("vispruner_backend", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv(module.TORCH_DIR, raising=False)
    packages = {"torch": ("2.13.0+cpu", "/env/torch"), "setuptools": ("84.2.1", "/env/setuptools")}
    monkeypatch.setattr(module, "_packages", lambda target: packages if target else {})
    monkeypatch.setattr(module, "_tool_works", lambda *_: True)
    module.packages = packages
    return module


def test_no_requirements_if_everything_is_installed(backend):
    assert backend.get_requires_for_build_wheel() == []
    assert backend.get_requires_for_build_editable() == []
    assert backend.get_requires_for_build_sdist() == []
    assert backend.torch_dir() == "/env/torch"


def test_torch_is_required_only_if_missing(backend):
    del backend.packages["torch"]
    assert backend.get_requires_for_build_wheel() == ["torch>=2.10"]
    assert backend.get_requires_for_build_sdist() == []


def test_old_torch_is_refused(backend, tmp_path):
    backend.packages["torch"] = ("2.9.1+cu128", "/env/torch")
    message = r"^vispruner: torch 2\.9\.1\+cu128 is installed[^\n]*pip install -U 'torch>=2\.10'$"
    for hook in (backend.get_requires_for_build_wheel, lambda: backend.build_wheel(str(tmp_path))):
        with pytest.raises(SystemExit, match=message):
            hook()


@pytest.mark.parametrize("name", [".", "vispruner_cuda"])
def test_read_only_source_tree_is_refused(backend, monkeypatch, tmp_path, name):
    read_only = ROOT / name
    monkeypatch.setattr(os, "access", lambda path, mode: path != read_only or mode != os.W_OK)
    monkeypatch.setenv(backend.TORCH_DIR, "")  # restores what the backend sets
    monkeypatch.setattr(backend, "index_compiler", lambda: None)
    hooks = (backend.build_wheel, backend.build_editable, backend.build_sdist,
             backend.prepare_metadata_for_build_wheel)  # fmt: skip
    for hook in hooks:
        os.environ.pop(backend.TORCH_DIR, None)
        with pytest.raises(
            SystemExit, match=rf"^vispruner: cannot write to the source tree {read_only}, [^\n]*$"
        ):
            hook(str(tmp_path))


def test_too_old_setuptools_is_refused(backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "setuptools", types.SimpleNamespace(__version__="65.5.0"))
    with pytest.raises(
        SystemExit, match=r"^vispruner: setuptools 65\.5\.0 is too old: pip install[^\n]*$"
    ):
        backend.build_sdist("/nowhere")


def test_old_setuptools_counts_as_missing(backend):
    backend.packages["setuptools"] = ("65.5.0", "/env/setuptools")
    assert backend.get_requires_for_build_wheel() == ["setuptools>=77.0"]


def test_tools_that_do_not_work(backend, monkeypatch):
    monkeypatch.setattr(backend, "_tool_works", lambda *_: False)
    assert backend.get_requires_for_build_wheel() == ["cmake>=3.22", "ninja"]


def test_tool_must_run_and_be_new_enough(backend, monkeypatch, tmp_path):
    monkeypatch.undo()
    for name, text in (("good", "echo tool 3.25.1"), ("broken", "echo no module >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    assert backend._tool_works(str(tmp_path / "good"), (3, 22))
    assert not backend._tool_works(str(tmp_path / "good"), (3, 26))
    assert not backend._tool_works(str(tmp_path / "broken"))
    assert not backend._tool_works(str(tmp_path / "absent"))


def test_named_torch(backend, monkeypatch, tmp_path):
    monkeypatch.setenv(backend.TORCH_DIR, str(tmp_path))
    with pytest.raises(SystemExit, match=r"no torch >= 2\.10 there"):
        backend.torch_dir()
    header = tmp_path / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert backend.torch_dir() == str(tmp_path)


def test_build_without_torch_is_refused(backend, tmp_path):
    del backend.packages["torch"]
    with pytest.raises(SystemExit, match="no torch to build against"):
        backend.build_wheel(str(tmp_path))


def test_finds_torch_despite_pips_isolation(tmp_path):
    # pip hides the target's packages with a sitecustomize on PYTHONPATH.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.path = [p for p in sys.path if 'site-packages' not in p]\n"
    )
    program = (
        "import importlib.util, vispruner_backend as b\n"
        "print(importlib.util.find_spec('torch') is None, b.torch_dir(), sep='\\n')"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT / "build_backend")])
    environment = {key: value for key, value in os.environ.items() if key != "VISPRUNER_TORCH_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "PYTHONPATH": path},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    hidden, found = done.stdout.splitlines()
    if hidden != "True":
        pytest.skip("torch is not in site-packages")
    assert Path(found) == Path(torch.__file__).parent


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"VISPRUNER_CUDA_ARCH": "90"},
            "there is no variable VISPRUNER_CUDA_ARCH, but VISPRUNER_CUDA_ARCHS:",
        ),
        ({"VISPRUNER_NVC": "index"}, "there is no variable VISPRUNER_NVC, but VISPRUNER_NVCC:"),
        ({"MAX_JOBS": "abc"}, "MAX_JOBS=abc: must be a whole number"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS=0: must be a whole number"),
        ({"MAX_JOBS": "-1"}, "MAX_JOBS=-1: must be a whole number"),
    ],
)
def test_variables_that_would_be_ignored(
    backend, machine, monkeypatch, tmp_path, variables, message
):
    machine(None, "13.0")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for hook in (backend.get_requires_for_build_wheel, lambda: backend.build_wheel(str(tmp_path))):
        with pytest.raises(SystemExit, match=f"^vispruner: {message}[^\n]*$"):
            hook()


@pytest.mark.parametrize(
    "variables",
    [
        # of Kubernetes, for the services `vispruner` and `vispruner-cuda`
        {"VISPRUNER_PORT": "tcp://10.0.0.1:80", "VISPRUNER_SERVICE_HOST": "10.0.0.1"},
        {"VISPRUNER_CUDA_PORT": "tcp://10.0.0.1:80", "VISPRUNER_CUDA_SERVICE_PORT_HTTP": "80"},
        {"VISPRUNER_PORT_80_TCP_ADDR": "10.0.0.1", "VISPRUNER_MODEL": "llava"},
        {"VISPRUNER_CUDA_VERSION": "13", "VISPRUNER_TORCH_INDEX": "x", "VISPRUNER_CUDA_HOME": "x"},
        {"VISPRUNER_LAUNCH": "ordered", "MAX_JOBS": "08"},
    ],
)
def test_variables_that_are_accepted(backend, machine, monkeypatch, variables):
    machine(None, "13.0")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert backend.get_requires_for_build_wheel() == []


# ------------------------------------------------------------------------------ the CUDA compiler
COMPILER = [
    "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl",
]  # fmt: skip


@pytest.fixture
def machine(backend, monkeypatch, tmp_path):
    """Sets the CUDA version of torch and the version of nvcc; either may be None."""

    def has(torch_cuda, nvcc):
        monkeypatch.setattr(backend, "torch_dir", lambda: str(tmp_path))
        text = f"cuda: Optional[str] = {torch_cuda!r}\nhip: Optional[str] = None\n"
        (tmp_path / "version.py").write_text(text)
        monkeypatch.setattr(backend, "_system_nvcc", lambda: nvcc and "/toolkit/bin/nvcc")
        monkeypatch.setattr(backend, "_nvcc_version", lambda _: backend._version(nvcc))

    for name in ("VISPRUNER_CUDA", "VISPRUNER_NVCC", "CUDACXX", "CUDA_HOME", backend.TORCH_DIR):
        monkeypatch.setenv(name, "")  # so that what the backend sets is restored as well
        monkeypatch.delenv(name)
    return has


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "compiler"),
    [
        ("13.0", None, "13.0"),
        ("13.2", "12.8", "13.2"),  # nvcc of another major version is unsuitable
        ("13.4", None, "13.4"),
        ("13.0", "13.2", None),
        ("12.8", None, None),  # the packages of CUDA 12 contain no nvcc
        ("12.8", "12.4", None),
        (None, None, None),
        (None, "13.0", None),
    ],
)
def test_when_the_compiler_comes_from_the_index(backend, machine, torch_cuda, nvcc, compiler):
    machine(torch_cuda, nvcc)
    expected = [f"{name}=={compiler}.*" for name in COMPILER] if compiler else []
    if compiler == "13.4":
        expected[-1] = "nvidia-cuda-cccl>=13.3,<14"
    assert backend.get_requires_for_build_wheel() == expected
    assert backend.get_requires_for_build_editable() == expected
    assert backend.get_requires_for_build_sdist() == []


@pytest.mark.parametrize(
    ("variables", "compiler"),
    [
        ({"VISPRUNER_CUDA": "OFF"}, None),
        ({"VISPRUNER_NVCC": "system"}, None),
        ({"CUDACXX": "/my/nvcc"}, None),
        ({"VISPRUNER_NVCC": "index"}, "13.0"),
        ({"VISPRUNER_CUDA": "ON"}, "13.0"),
    ],
)
def test_the_requested_compiler(backend, machine, monkeypatch, variables, compiler):
    machine("13.0", None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert backend.index_compiler() == compiler
    machine("13.0", "13.0")
    index = variables.get("VISPRUNER_NVCC") == "index"
    assert backend.index_compiler() == ("13.0" if index else None)


@pytest.mark.parametrize(
    ("torch_cuda", "variables", "message"),
    [
        (None, {"VISPRUNER_NVCC": "index"}, "this torch has no CUDA.*install a torch with CUDA"),
        (
            "12.8",
            {"VISPRUNER_NVCC": "index"},
            "packages for CUDA 12.8.*install the CUDA toolkit 12",
        ),
        (
            "13.0",
            {"VISPRUNER_NVCC": "pip"},
            "VISPRUNER_NVCC=pip: must be one of auto, system, index",
        ),
        ("13.0", {"VISPRUNER_CUDA": "yes"}, "VISPRUNER_CUDA=yes: must be one of AUTO, ON, OFF"),
        ("13.0", {"VISPRUNER_NVCC": "index", "VISPRUNER_CUDA": "OFF"}, "unset one of them"),
        ("13.0", {"VISPRUNER_NVCC": "index", "CUDACXX": "/my/nvcc"}, "CUDACXX=/my/nvcc: unset one"),
    ],
)
def test_unavailable_compilers(backend, machine, monkeypatch, torch_cuda, variables, message):
    machine(torch_cuda, None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"^[^\n]*{message}[^\n]*$"):
        backend.get_requires_for_build_wheel()


def test_the_version_of_this_torch(backend):
    assert backend.torch_cuda(str(Path(torch.__file__).parent)) == torch.version.cuda


def test_the_compiler_of_the_build_environment_is_used(backend, machine, monkeypatch, tmp_path):
    machine("13.0", None)
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(backend, "_setuptools", lambda: None)
    monkeypatch.setenv("VISPRUNER_NVCC", "index")
    monkeypatch.setenv("LIBRARY_PATH", "/mine")
    # Hides an nvcc from the test extra in this environment.
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"has no nvcc 13\.0.*pip install 'nvidia-cuda-nvcc==13\.0\.\*'"
    ):
        backend._builder()
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    monkeypatch.setattr(backend, "_nvcc_version", lambda _: (13, 3))
    with pytest.raises(SystemExit, match=r"has no nvcc 13\.0"):
        backend._builder()
    monkeypatch.setattr(backend, "_nvcc_version", lambda _: (13, 0))
    backend._builder()
    assert os.environ["CUDACXX"] == str(nvcc)
    assert os.environ["LIBRARY_PATH"] == f"{tmp_path / 'nvidia' / 'cu13' / 'lib'}:/mine"
