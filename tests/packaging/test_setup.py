"""Builds that cannot succeed end with a one-line solution and no traceback."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
import setuptools
setuptools.setup = lambda **_: None
sys.path.insert(0, {tree!r})
sys.argv = ["setup.py"]
namespace = {{"__file__": {setup!r}, "__name__": "setup"}}
exec(compile(open({setup!r}).read(), {setup!r}, "exec"), namespace)
{call}
"""


@pytest.fixture
def fails(sources, tmp_path):
    """Calls a function of setup.py that must fail, and returns its lines on stderr."""

    def call(code: str, path: Path, **variables: str) -> list[str]:
        script = SCRIPT.format(tree=str(sources), setup=str(sources / "setup.py"), call=code)
        environment = {key: value for key, value in os.environ.items() if key != "CXX"}
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment | {"PATH": str(path)} | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        return done.stderr.splitlines()

    return call


def program(directory: Path, name: str, text: str = "exit 0") -> None:
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)


def test_no_compiler(fails, tmp_path):
    (line,) = fails("namespace['check_tools']()", tmp_path)
    assert line.startswith("vispruner: no C++ compiler: install one")


def test_missing_compiler(fails, tmp_path):
    program(tmp_path, "g++")
    (line,) = fails("namespace['check_tools']()", tmp_path, CXX="g++-99 -O1")
    assert line == "vispruner: CXX=g++-99 -O1: program 'g++-99' not found"


def test_no_cmake(fails, tmp_path):
    program(tmp_path, "g++")
    (line,) = fails("namespace['check_tools']()", tmp_path)
    assert line.startswith("vispruner: no cmake: pip install cmake ninja")


def test_failed_step(fails, tmp_path):
    program(tmp_path, "cmake", "echo the reason >&2; exit 3")
    reason, line = fails("namespace['run']('cmake', '--build')", tmp_path)
    assert reason == "the reason"
    assert line.startswith("vispruner: cmake failed with exit status 3, see the output above")


@pytest.mark.parametrize(("left", "said"), [(5, True), (500, False)])
def test_full_disk(fails, tmp_path, left, said):
    program(tmp_path, "cmake", "exit 1")
    usage = f"type('U', (), {{'free': {left} << 20}})"
    call = f"namespace['shutil'].disk_usage = lambda _: {usage}\nnamespace['run']('cmake')"
    (line,) = fails(call, tmp_path)
    assert (f"has {left} MiB left: free some disk space" in line) == said


# Its library contains the configuration that was asked for. The build goes on when the other one
# says that it waits, or after five seconds.
SLOW_CMAKE = """
if [ "$1" = -S ]; then
  mkdir -p "$4"
  for option; do case $option in -DVISPRUNER_CUDA=*) echo "$option" >"$4/asked";; esac; done
else
  cp "$2/asked" "$2/libvispruner.so"
  echo built >"$2/summary.txt"
  for _ in $(seq 50); do
    if grep -q waiting "$LOGS"/*.log; then break; fi
    sleep 0.1
  done
fi
"""


def test_two_builds_of_one_tree_wait_for_each_other(sources, tmp_path):
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("this environment's setuptools is too old to build with")
    tree = shutil.copytree(sources, tmp_path / "tree", ignore=shutil.ignore_patterns("build"))
    program(tmp_path, "cmake", SLOW_CMAKE)
    builds = {}
    for kernels in ("ON", "OFF"):
        out = tmp_path / kernels
        out.mkdir()
        command = f"import vispruner_backend as b; b.build_wheel({str(out)!r})"
        builds[out] = subprocess.Popen(
            [sys.executable, "-c", command],
            env=os.environ
            | {
                "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(tree / "build_backend"),
                "VISPRUNER_CUDA": kernels,
                "VISPRUNER_TORCH_DIR": str(Path(torch.__file__).parent),
                "CUDACXX": "nvcc",
                "LOGS": str(tmp_path),
            },
            cwd=tree,
            stdout=out.with_suffix(".log").open("w"),
            stderr=subprocess.STDOUT,
        )
    for build in builds.values():
        build.wait()
    logs = [out.with_suffix(".log").read_text() for out in builds]
    for (out, build), log in zip(builds.items(), logs, strict=True):
        assert build.returncode == 0, log
        with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
            built = wheel.read("vispruner_cuda/libvispruner.so").decode()
        assert built == f"-DVISPRUNER_CUDA={out.name}\n"
    assert sum("waiting for another build in" in log for log in logs) == 1
