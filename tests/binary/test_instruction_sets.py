"""Code compiled once per instruction set must not leak into other code.

An inline function of a header that is compiled with AVX-512 and not inlined is a weak symbol. The
linker keeps one copy for all files. If it is this one, older processors crash.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def objects(tmp_path_factory, build) -> dict[str, Path]:
    """The object file of each instruction set, compiled as for the library."""
    directory = tmp_path_factory.mktemp("isa")
    configure = ["cmake", "-S", ROOT, "-B", directory, "-DVISPRUNER_CUDA=OFF"]
    configure.append(f"-DPython3_EXECUTABLE={sys.executable}")
    subprocess.run(configure, check=True)
    targets = [f"vispruner_{isa}" for isa in build.cpu_isas]
    subprocess.run(["cmake", "--build", directory, "--target", *targets], check=True)
    return {isa: next(directory.glob(f"**/vispruner_{isa}.dir/**/*.o")) for isa in build.cpu_isas}


def test_instruction_sets_built(build):
    x86 = ("portable", "avx2", "avx512", "avx512vnni", "avx512bf16")
    want = x86 if platform.machine() == "x86_64" else ("portable",)
    assert set(build.cpu_isas) == set(want)
    assert build.cpu_isa in build.cpu_isas


def test_no_weak_symbols(objects, tool):
    for isa, path in objects.items():
        weak = re.findall(r"^\S+ [WVu] (.*)$", tool("nm", "-C", path), re.MULTILINE)
        assert not weak, isa


def test_fused_multiply_add_in_scores_alone(objects, tool):
    """Token selection rounds every operation; attention scores, its input, may use fused ones."""
    for isa, path in objects.items():
        code = tool("objdump", "-d", "-C", path)
        functions = re.split(r"^[0-9a-f]+ <(.*)>:$", code, flags=re.MULTILINE)
        bodies = dict(zip(functions[1::2], functions[2::2], strict=True))
        assert any("quantize_token" in name for name in bodies), isa
        fused = [
            n for n, body in bodies.items() if re.search(r"\bv?fn?m(add|sub|la|ls)\w*\b", body)
        ]
        assert all(re.search(r"\b(add_weights|logit_tile)\b", name) for name in fused), (isa, fused)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86-64")
def test_vectors_no_wider_than_named(objects, tool):
    code = {isa: tool("objdump", "-d", path) for isa, path in objects.items()}
    assert "%ymm" not in code["portable"]
    assert "%zmm" not in code["avx2"]
    assert "%zmm" in code["avx512"]
    assert "vpdpwssd" not in code["avx512"]
    assert "vpdpwssd" in code["avx512vnni"]
    assert "vdpbf16ps" not in code["avx512vnni"]
    assert "vdpbf16ps" in code["avx512bf16"]
