"""Runs clang-tidy over csrc/: C++ as CMake compiles it, CUDA as host and as device code.

Needs clang-tidy on the PATH and torch in this Python. Without nvcc, the .cu files are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"


def cuda_toolkit() -> Path | None:
    """The directory of the CUDA toolkit, as nvcc sees it (nvcc itself may be a wrapper)."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        return None
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    plan = subprocess.run(command, capture_output=True, text=True, check=True)
    match = re.search(r"^#\$ TOP=(.*)$", plan.stderr, re.MULTILINE)
    return Path(match[1]).resolve() if match else None


def commands(scratch: Path) -> list[list[str]]:
    tidy = ["clang-tidy", "--quiet"]
    # VP_WITH_CUDA includes the host part of the CUDA build in ops.cpp.
    cpp_options = ["--extra-arg=-DVP_WITH_CUDA", "--extra-arg=-Wno-unknown-warning-option"]
    jobs = [
        [*tidy, "-p", str(scratch), *cpp_options, str(file)]
        for file in [*sorted(CSRC.glob("*.cpp")), *sorted((CSRC / "cpu").rglob("*.cpp"))]
    ]
    toolkit = cuda_toolkit()
    if toolkit is None:
        print("clang-tidy: no nvcc, so the .cu files are not checked")
        return jobs
    # clang's CUDA prelude includes a header of cuRAND, which small toolkits lack.
    (scratch / "curand_mtgp32_kernel.h").touch()
    cuda_options = [
        "--",
        *("-x", "cuda", "-std=c++17", "-Wno-unknown-cuda-version"),
        *(f"--cuda-path={toolkit}", "--cuda-gpu-arch=sm_90"),
        *(f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}", f"-idirafter{scratch}"),
    ]
    jobs += [
        [*tidy, str(file), *cuda_options, f"--cuda-{side}-only"]
        for file in sorted((CSRC / "cuda").rglob("*.cu"))
        for side in ("host", "device")
    ]
    return jobs


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        configure = ["cmake", "-S", str(ROOT), "-B", scratch, "-DVISPRUNER_CUDA=OFF"]
        configure.append(f"-DPython3_EXECUTABLE={sys.executable}")
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)

        def run(command: list[str]) -> bool:
            done = subprocess.run(command, capture_output=True, text=True)
            side = command[-1] if command[-1].startswith("--cuda-") else ""
            name = next(word for word in command if word.startswith(str(CSRC)))
            print(f"clang-tidy {os.path.relpath(name, ROOT)} {side}".rstrip())
            if done.returncode != 0:
                print(done.stdout + done.stderr)
            return done.returncode == 0

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            results = list(pool.map(run, commands(Path(scratch))))
    failed = results.count(False)
    print(f"clang-tidy: {len(results)} runs, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
