"""Computes how many blocks of each kernel fit into a multiprocessor: results/occupancy.json.

Registers are those of the machine code in the installed library, which must have been built from
this tree for all of ARCHITECTURES. Threads and shared memory are those of the launches of
`python -m ptx.counts` (in tests/). This needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import provenance
from rich.console import Console
from rich.progress import track

from vispruner_cuda import _library

WARP = 32
REGISTERS = 65536  # of a multiprocessor, in four parts
PARTS = 4
REGISTER_UNIT = 256  # registers are allocated to a warp in this unit
RESERVED_SHARED = 1024  # bytes per block, for the system
SHARED_UNIT = 128


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of a multiprocessor, from "Compute capabilities" in the CUDA C++ Programming Guide."""

    threads: int
    blocks: int
    shared: int  # bytes
    launches: str  # a device of ptx.counts with the same limit of shared memory per block

    def fits(self, threads: int, registers: int, shared: int) -> int:
        """Blocks at the same time, computed as in cuda_occupancy.h of the CUDA toolkit."""
        warps = -(-threads // WARP)
        per_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
        per_block = -(-(shared + RESERVED_SHARED) // SHARED_UNIT) * SHARED_UNIT
        by_registers = REGISTERS // PARTS // per_warp * PARTS // warps
        by_threads = self.threads // WARP // warps
        return min(self.blocks, by_threads, by_registers, self.shared // per_block)


ARCHITECTURES = {
    "sm_80": Multiprocessor(threads=2048, blocks=32, shared=164 << 10, launches="sm_80"),
    "sm_89": Multiprocessor(threads=1536, blocks=24, shared=100 << 10, launches="sm_89"),
    "sm_90": Multiprocessor(threads=2048, blocks=32, shared=228 << 10, launches="sm_90"),
    "sm_100": Multiprocessor(threads=2048, blocks=32, shared=228 << 10, launches="sm_90"),
    "sm_120": Multiprocessor(threads=1536, blocks=24, shared=100 << 10, launches="sm_89"),
}

BATCH = ("--plan", "rank=tokens_32", "--plan", "gram=tiles_64")  # chosen for many images
CALLS = (  # arguments of ptx.counts; a kernel's first launch counts
    ("prune",),
    ("prune", *BATCH),
    *(("prune", "--method", method) for method in ("maxmin", "mmr", "scope")),
    ("prune", "--tokens", "2880", "--channels", "64", "--k", "288"),
    ("cls_attention", "--channels", "64"),
    ("received_attention", "--tokens", "1024", "--channels", "80"),
)


def _run(*arguments: str) -> Any:
    command = [sys.executable, "-m", *arguments, "--json"]
    tests = provenance.ROOT / "tests"
    done = subprocess.run(command, cwd=tests, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def registers() -> dict[str, dict[str, int]]:
    """Registers per thread by kernel and architecture."""
    found: dict[str, dict[str, int]] = {}
    for kernel in _run("support.machine_code", str(_library.PATH)):
        found.setdefault(kernel["name"], {})[kernel["arch"]] = kernel["registers"]
    return found


def launches(call: tuple[str, ...], device: str) -> dict[str, tuple[int, int]]:
    """Threads and bytes of shared memory of each kernel's blocks."""
    counted = _run("ptx.counts", *call, "--device", device)
    return {
        name: (c["threads"], c["static_shared"] + c["dynamic_shared"])
        for name, c in counted.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m operators.occupancy", description=str(__doc__).splitlines()[0]
    )
    parser.parse_args()
    built = {arch.removesuffix("+PTX") for arch in _library.load().cuda_archs.split()}
    wanted = [arch.removeprefix("sm_") for arch in ARCHITECTURES]
    if missing := [arch for arch in wanted if arch not in built]:
        have = ", ".join(sorted(built, key=int)) or "none"
        print(
            f"{parser.prog}: the installed library has CUDA kernels for {have}, not for"
            f" {', '.join(missing)}: build it with VISPRUNER_CUDA_ARCHS='{';'.join(wanted)}'",
            file=sys.stderr,
        )
        return 1
    console = Console(stderr=True)
    known = registers()
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    work = [(call, device) for call in CALLS for device in ("sm_80", "sm_89", "sm_90")]
    for call, device in track(work, "launches", console=console):
        for name, (threads, shared) in launches(call, device).items():
            # a kernel may be launched with different numbers of threads
            row = rows.setdefault((name, threads), {"kernel": name, "threads": threads, "on": {}})
            for arch, limits in ARCHITECTURES.items():
                if limits.launches == device and arch not in row["on"]:
                    row["on"][arch] = {
                        "registers": known[name][arch],
                        "shared": shared,
                        "blocks": limits.fits(threads, known[name][arch], shared),
                    }
    data = {
        "command": "python -m operators.occupancy (benchmarks/)",
        "limits": {arch: asdict(limits) for arch, limits in ARCHITECTURES.items()},
        "rows": list(rows.values()),
    }
    console.print(f"wrote {provenance.write('occupancy', data)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
