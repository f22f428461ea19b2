"""Compiler flags in the environment change no result."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vispruner_cuda import _library

X86 = platform.machine() == "x86_64"

PROGRAM = """
import torch, vispruner_cuda as v
assert 1e-40 * torch.ones(1) > 0, "subnormal numbers are flushed to zero"
feats = torch.randn(1, 31, 31, generator=torch.Generator().manual_seed(0))
assert torch.equal(v.pairwise_cosine(feats), v.reference.pairwise_cosine(feats))
scores = torch.tensor([[0.5, float("nan"), 2.0]])
assert torch.equal(v.topk(scores, 2).indices, v.reference.topk(scores, 2).indices)
"""


def configure(sources: Path, build: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *("cmake", "-S", sources, "-B", build, "-DVISPRUNER_CUDA=OFF"),
            f"-DPython3_EXECUTABLE={sys.executable}",
        ],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_flags_that_are_cancelled(sources, tmp_path):
    # -ffast-math twice: -Ofast alone is cancelled by the -O3 of a release.
    flags = "-Ofast -ffast-math" + (" -march=x86-64-v4" if X86 else "")
    done = configure(sources, tmp_path / "build", CXXFLAGS=flags, LDFLAGS="-ffast-math")
    assert done.returncode == 0, done.stderr
    subprocess.run(["cmake", "--build", tmp_path / "build", "--parallel", "2"], check=True)
    package = shutil.copytree(Path(_library.__file__).parent, tmp_path / "vispruner_cuda")
    shutil.copy2(tmp_path / "build" / "libvispruner.so", package)
    for isa in ("portable", _library.load().cpu_isa):
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONPATH": str(tmp_path), "VISPRUNER_CPU_ISA": isa},
            cwd=tmp_path,
            check=True,
        )
    if not X86 or not shutil.which("objdump"):
        return
    for name in ("vispruner_portable.dir/csrc/cpu/isa.cpp.o", "vispruner.dir/csrc/ops.cpp.o"):
        path = tmp_path / "build" / "CMakeFiles" / name
        code = subprocess.run(["objdump", "-d", path], check=True, capture_output=True, text=True)
        assert "%xmm" in code.stdout
        assert not [register for register in ("%ymm", "%zmm", "%k1") if register in code.stdout]


@pytest.mark.skipif(not X86, reason="flags of x86-64")
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CXXFLAGS": "-O2 -mfpmath=387"}, "CXXFLAGS has -mfpmath=387, which changes results"),
        ({"CXXFLAGS": "-mfpmath=sse -mfpmath=sse+387"}, "CXXFLAGS has -mfpmath=sse+387, which"),
        ({"CXXFLAGS": "-mavx2 -O2"}, "CXXFLAGS has -mavx2, but the library selects"),
        ({"CXX": "c++ -mavx512f"}, "CXX has -mavx512f, but the library selects"),
        ({"LDFLAGS": "-mfpmath=387"}, "LDFLAGS has -mfpmath=387, which changes results"),
    ],
)
def test_flags_that_are_refused(sources, tmp_path, variables, message):
    done = configure(sources, tmp_path, **variables)
    assert done.returncode != 0
    assert f"vispruner: {message}" in " ".join(done.stderr.split())
