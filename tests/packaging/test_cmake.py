"""How CMake selects the CUDA architectures, with simulated compilers."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

# Output of `nvcc --list-gpu-code` by release.
KNOWN = {
    "11.8": "35 37 50 52 53 60 61 62 70 72 75 80 86 87 89 90",
    "12.4": "50 52 53 60 61 62 70 72 75 80 86 87 89 90",
    "12.8": "50 52 53 60 61 62 70 72 75 80 86 87 89 90 100 101 120",
    "13.0": "75 80 86 87 88 89 90 100 110 103 120 121",
}


@pytest.fixture
def architectures(sources, tmp_path):
    """Runs the selecting part of CMakeLists.txt with a simulated compiler."""
    text = (sources / "CMakeLists.txt").read_text()
    (function,) = re.findall(r"^function\(vp_setup_cuda\)\n.*?^endfunction\(\)", text, re.M | re.S)
    defaults = re.findall(r"^set\(VP_(?:DEFAULT_ARCHS|OLDEST_ARCH|OLDEST_NVCC) .*\)$", text, re.M)
    default = "\n".join(defaults)

    def choose(
        release: str, asked: str = "", torch_cuda: str = "", wanted: str = "AUTO", **variables: str
    ) -> subprocess.CompletedProcess:
        codes = "\\n".join(f"sm_{code}" for code in KNOWN[release].split())
        nvcc = tmp_path / "nvcc"
        nvcc.write_text(
            f"#!/bin/sh\ncase $1 in --list-gpu-code) printf '{codes}\\n';;\n"
            f"--version) echo 'Cuda compilation tools, release {release}, V{release}.1';;\n"
            "--dryrun) case $2 in *90f) exit 1;; esac;; esac\n"
        )
        nvcc.chmod(0o755)
        script = tmp_path / "choose.cmake"
        script.write_text(
            "cmake_minimum_required(VERSION 3.22)\n"
            f"{default}\nset(CMAKE_CUDA_COMPILER {nvcc})\nset(VISPRUNER_CUDA {wanted})\n"
            f'set(VP_TORCH_CUDA "{torch_cuda}")\n'
            f'set(VISPRUNER_CUDA_ARCHS "{asked}")\n{function}\nvp_setup_cuda()\n'
            'message("${VP_BUILD_CUDA_ARCHS}|${CMAKE_CUDA_ARCHITECTURES}|${VP_CUDA_OPTIONS}")\n'
        )
        return subprocess.run(
            ["cmake", "-P", script],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
        )

    return choose


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("12.4", "80+PTX;86;89;90+PTX|80;86-real;89-real;90"),
        ("12.8", "80+PTX;86;89;90;100;120+PTX|80;86-real;89-real;90-real;100-real;120"),
        ("13.0", "80+PTX;86;89;90;100;120+PTX|80;86-real;89-real;90-real;100-real;120"),
    ],
)
def test_default_adapts_to_the_compiler(architectures, release, expected):
    assert architectures(release).stderr.startswith(expected + "|")


@pytest.mark.parametrize("asked", ["8.0 9.0a+PTX", "80,90a+PTX", "80;90a+PTX", "8.0;9.0a+PTX"])
def test_spellings(architectures, asked):
    output = architectures("13.0", asked).stderr
    assert output.startswith("80;90a+PTX|80-real|")
    assert [option for option in output.strip().split(";") if option.startswith("-gencode")] == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("8.0;80;80+PTX", "80+PTX|80|"),
        ("80+PTX 90 8.0 9.0", "80+PTX;90|80;90-real|"),
        (" 90 ", "90|90-real|"),
        ("120f", "120f|OFF|"),
    ],
)
def test_every_architecture_once(architectures, asked, expected):
    assert architectures("13.0", asked).stderr.startswith(expected)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("sm_80", "'sm_80' is not an architecture"),
        (";", "VISPRUNER_CUDA_ARCHS=';' has no architecture"),
        ("0", "'0' is not an architecture"),
        ("75", "VISPRUNER_CUDA_ARCHS: '75' is too old; the kernels need 80 or later"),
        ("80 90f", "VISPRUNER_CUDA_ARCHS: this nvcc does not support '90f'"),
        ("80 120", "this nvcc does not support '120'; it supports 50 52"),
    ],
)
def test_bad_architecture(architectures, asked, message):
    done = architectures("12.4", asked)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


def test_architecture_of_this_machine_without_a_gpu(architectures, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    done = architectures("13.0", "native", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode != 0
    message = "VISPRUNER_CUDA_ARCHS=native, but nvidia-smi finds no GPU"
    assert message in " ".join(done.stderr.split())


def test_cuda_home_without_a_compiler(sources, without_nvcc, tmp_path):
    """The nvcc on the PATH may be of another CUDA than the one that was asked for."""
    (tmp_path / "nvcc").symlink_to("/bin/true")
    done = subprocess.run(
        [
            *("cmake", "-S", sources, "-B", tmp_path / "build"),
            f"-DPython3_EXECUTABLE={sys.executable}",
        ],
        env={**without_nvcc, "PATH": f"{tmp_path}{os.pathsep}{without_nvcc['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    message = f"CUDA_HOME={without_nvcc['CUDA_HOME']} has no bin/nvcc, but there is {tmp_path}/nvcc"
    assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize("value", ["off", "0", "banana", ""])
def test_kernels_must_be_auto_on_or_off(sources, tmp_path, value):
    command = ["cmake", "-S", sources, "-B", tmp_path / "build", f"-DVISPRUNER_CUDA={value}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    message = f"vispruner: VISPRUNER_CUDA={value}: must be one of AUTO, ON, OFF"
    assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize("variable", ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CUDAFLAGS"])
@pytest.mark.parametrize(
    "flag",
    ["--use_fast_math", "-use_fast_math", "--ftz=true", "-ftz true", "--prec-div=false",
     "-prec-div false", "--prec-sqrt=false", "--fmad=true", "-fmad true"],
)  # fmt: skip
def test_flags_of_nvcc_that_change_results(architectures, variable, flag):
    done = architectures("13.0", **{variable: f"-O3 {flag} -lineinfo"})
    assert done.returncode != 0
    message = f"vispruner: {variable} has {flag}, which changes results: remove it"
    assert message in " ".join(done.stderr.split())


def test_flags_of_nvcc_that_change_nothing(architectures):
    done = architectures("13.0", NVCC_APPEND_FLAGS="--ftz=false --fmad false -prec-div=true -G")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("release", "expected"), [("12.4", False), ("12.8", False), ("13.0", True)]
)
def test_compression_only_where_all_drivers_support_it(architectures, release, expected):
    assert ("--compress-mode=size" in architectures(release).stderr) == expected


@pytest.mark.parametrize(
    ("release", "torch_cuda", "newer"),
    [
        ("13.0", "12.8", True),
        ("13.0", "13.0", False),
        ("12.8", "13.0", False),
        ("12.8", "12.4", False),  # minor versions work with any driver of the major version
        ("13.0", "", False),  # a torch without CUDA
    ],
)
def test_compiler_newer_than_the_cuda_of_torch(architectures, release, torch_cuda, newer):
    warned = architectures(release, torch_cuda=torch_cuda)
    message = f"nvcc is of CUDA {release} and torch of CUDA {torch_cuda}: the kernels will not run"
    assert warned.returncode == 0
    assert (message in " ".join(warned.stderr.split())) == newer
    asked = architectures(release, torch_cuda=torch_cuda, wanted="ON")
    assert (asked.returncode != 0) == newer
    assert (message in " ".join(asked.stderr.split())) == newer


def test_compiler_too_old(architectures):
    """A distribution's nvcc may be of CUDA 11: a CPU build with a warning, or an error."""
    message = "is of CUDA 11.8, and at least 12.4 is needed"
    warned = architectures("11.8", torch_cuda="12.8")
    assert warned.returncode == 0
    assert message in " ".join(warned.stderr.split())
    assert warned.stderr.rstrip().endswith("||")  # no architectures, no options
    asked = architectures("11.8", torch_cuda="12.8", wanted="ON")
    assert asked.returncode != 0
    assert message in " ".join(asked.stderr.split())


@pytest.mark.parametrize(("written", "expected"), [("'12.8'", "12.8"), ("None", "")])
def test_cuda_of_torch_is_read_from_its_package(sources, tmp_path, written, expected):
    text = (sources / "CMakeLists.txt").read_text()
    (function,) = re.findall(r"^function\(vp_find_torch\)\n.*?^endfunction\(\)", text, re.M | re.S)
    header = tmp_path / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 12\n")
    (tmp_path / "torch" / "version.py").write_text(
        f"__version__ = '2.12.0'\ncuda: Optional[str] = {written}\nhip: Optional[str] = '6.3'\n"
    )
    script = tmp_path / "find.cmake"
    script.write_text(
        f"cmake_minimum_required(VERSION 3.22)\nset(VISPRUNER_TORCH_DIR {tmp_path / 'torch'})\n"
        f'set(VP_TORCH_TARGET 2.10)\n{function}\nvp_find_torch()\nmessage("[${{VP_TORCH_CUDA}}]")\n'
    )
    done = subprocess.run(["cmake", "-P", script], capture_output=True, text=True)
    assert done.stderr.strip() == f"[{expected}]"


def test_torch_too_old(sources, tmp_path):
    header = tmp_path / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 9\n")
    done = subprocess.run(
        [
            *("cmake", "-S", sources, "-B", tmp_path / "build", "-DVISPRUNER_CUDA=OFF"),
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DVISPRUNER_TORCH_DIR={tmp_path / 'torch'}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "torch 2.9 in" in done.stderr
    assert "is too old" in " ".join(done.stderr.split())
