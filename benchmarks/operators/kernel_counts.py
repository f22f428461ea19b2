"""Counts what the compiled kernels of one `prune` call do: results/kernel_counts.json.

The counts are those of `python -m ptx.counts` (in tests/): the CPU executes the kernels' PTX. They
need nvcc and no GPU, and are the same on every machine.
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

DTYPE = "float16"
DEVICE = "sm_90"
KEPT = (
    "warp_instructions", "longest_block", "threads", "blocks", "barriers", "dynamic_shared",
    "shared_wavefronts",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One image and a method."""

    method: str
    features: str
    tokens: int = 576
    channels: int = 1024
    k: int = 64


CASES = (
    Case("vispruner", "normal"),
    Case("vispruner", "clustered"),
    Case("vispruner", "smooth"),
    Case("vispruner", "duplicates"),
    Case("vispruner", "normal", 2880, 64, 288),
    Case("vispruner", "normal", 4096, 64, 410),
    *(
        Case(method, features)
        for method in ("maxmin", "scope", "mmr")
        for features in ("normal", "clustered", "smooth")
    ),
)


def count(case: Case) -> dict[str, dict[str, Any]]:
    """The counters of each kernel, in launch order."""
    command = [sys.executable, "-m", "ptx.counts", "--json", "--dtype", DTYPE, "--device", DEVICE]
    for option, value in asdict(case).items():
        command += [f"--{option}", str(value)]
    tests = provenance.ROOT / "tests"
    done = subprocess.run(command, cwd=tests, stdout=subprocess.PIPE, text=True, check=True)
    counted = json.loads(done.stdout)
    return {name: {what: found[what] for what in KEPT} for name, found in counted.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m operators.kernel_counts", description=str(__doc__).splitlines()[0]
    )
    parser.parse_args()
    console = Console(stderr=True)
    rows = [
        {**asdict(case), "dtype": DTYPE, "device": DEVICE, "kernels": count(case)}
        for case in track(CASES, "cases", console=console)
    ]
    command = "python -m operators.kernel_counts (benchmarks/)"
    console.print(f"wrote {provenance.write('kernel_counts', {'command': command, 'rows': rows})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
