"""Finds and loads libvispruner.so. If that fails, the error gives the reason in one line."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from . import _environment
from ._version import __version__

OLDEST_TORCH = (2, 10)
PATH = Path(__file__).with_name("libvispruner.so")

# e_machine in the header of an ELF file, and the name that platform.machine() has for it.
_MACHINES = {21: "ppc64le", 22: "s390x", 62: "x86_64", 183: "aarch64", 243: "riscv64"}

# BuildInfo.cuda_runtime_state
CPU_ONLY = 0  # the library has no CUDA kernels
NO_CUDA_TORCH = 1  # it has kernels, but this torch has no CUDA
READY = 2  # it has kernels, and this torch has CUDA


@dataclass(frozen=True)
class BuildInfo:
    """Build information of the loaded library."""

    version: str
    sources: str  # hash of the sources in csrc/ that it was built from
    cuda: bool
    cuda_version: str  # of the compiler; empty if there are no CUDA kernels
    cuda_archs: str  # like "80+PTX 86 90 120+PTX"
    cuda_runtime_state: int  # CPU_ONLY, NO_CUDA_TORCH or READY
    environment_error: str  # an error in an environment variable that names a launch plan
    cpu_isa: str  # the instruction set in use
    cpu_isas: tuple[str, ...]  # the instruction sets that were built
    cpu_isas_usable: tuple[str, ...]  # the built ones that this processor has


def sources_hash(root: Path) -> str | None:
    """The hash of the sources in a source tree, as in CMakeLists.txt; None if it has none."""
    csrc = root / "csrc"
    if not (csrc / "include" / "vispruner").is_dir():
        return None
    lines = [
        f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        for path in csrc.rglob("*")
        if path.suffix in (".cpp", ".h", ".cu", ".cuh") and not path.name.startswith(".")
    ]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:12]


def stale(info: BuildInfo, root: Path) -> str | None:
    """An error message if a library was built from other sources than those of a source tree."""
    sources = sources_hash(root)
    if sources is None or sources == info.sources:
        return None
    return (
        f"vispruner_cuda: {PATH} was built from sources {info.sources}, and {root / 'csrc'} has "
        f"{sources}: run `pip install .` again"
    )


def _check_torch() -> None:
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        raise ImportError(
            f"vispruner_cuda needs torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}, "
            f"but this is torch {torch.__version__}: pip install -U torch"
        )


def _defect(path: Path) -> str | None:
    """A reason from the file's header not to load it, or None."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return "it is not a Linux library"
    order = "<" if header[5] == 1 else ">"
    (machine,) = struct.unpack_from(order + "H", header, 18)
    name = _MACHINES.get(machine, f"another machine (ELF machine {machine})")
    if name != platform.machine():
        return f"it is built for {name}, and this machine is {platform.machine()}"
    # The section table is at the end of the file; loading a truncated file would kill the process.
    (table,) = struct.unpack_from(order + "Q", header, 40)
    entry_size, entries = struct.unpack_from(order + "HH", header, 58)
    if table + entry_size * entries > size:
        return "it is truncated"
    return None


def _load_file(path: Path) -> None:
    if not path.is_file():
        raise ImportError(
            f"vispruner_cuda: the compiled library {path} is missing: "
            "run `pip install .` in the directory of the sources"
        )
    reason = _defect(path)
    if reason is None:
        try:
            torch.ops.load_library(path)
            return
        except (OSError, RuntimeError) as error:
            # torch's error only says that it failed; the linker's is chained. In one line:
            reason = " ".join(str(error.__cause__ or error).split())
    raise ImportError(
        f"vispruner_cuda: the compiled library {path} cannot be loaded: {reason}; "
        "run `pip install .` again on this machine"
    )


def _check(info: BuildInfo) -> None:
    if info.version != __version__:
        raise ImportError(
            f"vispruner_cuda {__version__} found a library of version {info.version} in {PATH}: "
            "run `pip install .` again"
        )
    # Next to the package in a clone, whose library remains when `git pull` changes the sources.
    if old := stale(info, PATH.parents[1]):
        raise ImportError(old)
    if info.environment_error:
        # Bytes arrive as the characters of Latin-1.
        text = info.environment_error.encode("latin-1").decode(errors="replace")
        raise ImportError(f"vispruner_cuda: {text}")
    if wrong := _environment.misspelt(os.environ, _environment.RUN):
        raise ImportError(f"vispruner_cuda: {wrong}")
    if torch.version.cuda is None:
        return
    if info.cuda_runtime_state == NO_CUDA_TORCH:
        raise ImportError(
            f"vispruner_cuda: torch {torch.__version__} has CUDA, but {PATH} does not find its "
            "current-stream function (linked without libtorch.so?): run `pip install .` again"
        )
    # device_count() uses NVML, so CUDA stays uninitialized for programs that fork later.
    if info.cuda_runtime_state == CPU_ONLY and torch.cuda.device_count() > 0:
        warnings.warn(
            "vispruner_cuda was built without CUDA kernels, so it works on CPU tensors only, "
            "although this machine has a GPU: install a CUDA toolkit (nvcc) and run "
            "`pip install .` again",
            RuntimeWarning,
            stacklevel=2,
        )


@functools.cache
def load() -> BuildInfo:
    """Load the library (once) and return its build information; ImportError if it is unusable."""
    _check_torch()
    _load_file(PATH)
    fields = json.loads(torch.ops.vispruner.build_info())
    lists = {name: tuple(fields[name]) for name in ("cpu_isas", "cpu_isas_usable")}
    info = BuildInfo(**{**fields, **lists})
    _check(info)
    return info
