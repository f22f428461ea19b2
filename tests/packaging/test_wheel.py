"""The wheel from a build without a CUDA compiler, and its installation."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def names(cpu_wheel) -> list[str]:
    with zipfile.ZipFile(cpu_wheel.path) as wheel:
        return wheel.namelist()


def test_one_wheel_for_every_python(cpu_wheel):
    assert re.fullmatch(r"vispruner_cuda-[^-]+-py3-none-linux_\w+\.whl", cpu_wheel.path.name)
    with zipfile.ZipFile(cpu_wheel.path) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/WHEEL")]
        text = wheel.read(name).decode()
    assert "Root-Is-Purelib: false" in text
    assert re.search(r"^Tag: py3-none-linux_\w+$", text, re.MULTILINE)


def test_contents(names):
    assert [name for name in names if name.endswith(".so")] == ["vispruner_cuda/libvispruner.so"]
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages <= {"vispruner", "vispruner_cuda"}
    assert "vispruner_cuda/__init__.py" in names
    assert "vispruner_cuda/known_answers.json" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_no_torch_was_downloaded(cpu_wheel):
    assert not re.search(
        r"(Collecting|Downloading|Installing.*packages:.*) ?torch\b", cpu_wheel.log
    )


def test_build_says_what_it_built(cpu_wheel):
    assert re.search(r"CPU kernels: +portable", cpu_wheel.log)
    assert "CUDA kernels: NONE: no nvcc found" in cpu_wheel.log
    assert "VISPRUNER_CUDA=ON makes a missing nvcc an error" in cpu_wheel.log


def test_installed_wheel_works(cpu_wheel, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path]
    subprocess.run([*install, cpu_wheel.path], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "vispruner_cuda", "--json"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    report = json.loads(done.stdout)
    assert Path(report["library"]).parent == tmp_path / "vispruner_cuda"
    assert report["build"]["cuda"] is False
    assert "cpu" in report["backends"]
    assert done.returncode == (1 if report["devices"] else 0)
    summary = (tmp_path / "vispruner_cuda" / "libvispruner.txt").read_text()
    assert "CUDA kernels: NONE: no nvcc found" in summary


def test_missing_nvcc_can_be_an_error(sources, without_nvcc, tmp_path):
    done = subprocess.run(
        [
            *("cmake", "-S", sources, "-B", tmp_path, "-DVISPRUNER_CUDA=ON"),
            f"-DPython3_EXECUTABLE={sys.executable}",
        ],
        env=without_nvcc,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "VISPRUNER_CUDA=ON, but there is no nvcc" in " ".join(done.stderr.split())


def source_distribution(tree, target) -> Path:
    """The source distribution of this tree, in `target`."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("this environment's setuptools is too old to build with")
    program = "import sys, vispruner_backend as b; print(b.build_sdist(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", program, target],
        env={**os.environ, "PYTHONPATH": str(tree / "build_backend")},
        cwd=tree,
        check=True,
        capture_output=True,
        text=True,
    )
    return target / done.stdout.split()[-1]


def test_source_distribution_can_build(sources, tmp_path):
    with tarfile.open(source_distribution(sources, tmp_path)) as sdist:
        names = {name.split("/", 1)[-1] for name in sdist.getnames()}
    needed = [path for path in sources.glob("csrc/**/*") if path.is_file()]
    needed += [sources / "CMakeLists.txt", sources / "build_backend" / "vispruner_backend.py"]
    assert {str(path.relative_to(sources)) for path in needed} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_source_distribution_has_what_its_tests_need(tmp_path):
    """The tests import benchmarks and read docs, .ci and the constraints."""
    excluded = shutil.ignore_patterns(".git", ".venv", ".*_cache", "build", "dist", "*.egg-info")
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=excluded)
    with tarfile.open(source_distribution(tree, tmp_path)) as sdist:
        sdist.extractall(tmp_path / "unpacked", filter="data")
    tests = next((tmp_path / "unpacked").iterdir()) / "tests"
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"],
        cwd=tests,
        capture_output=True,
        text=True,
    )
    assert collected.returncode == 0, collected.stdout[-2000:]
