"""Measures calls with almost no work, compared with torch.topk, and writes results/host.json.

It is measured on the CPU: checks of arguments, dispatch and allocation. `operators.gpu` measures
the host time of a call for a GPU, which has launches as well. The calls alternate in batches in one
process, so that a slow moment of the machine affects all of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import provenance
import torch
from numeric import positive

import vispruner_cuda

BASELINE = "torch.topk"


def calls() -> dict[str, Callable[[], Any]]:
    """Calls for one image with 8 tokens."""
    g = torch.Generator().manual_seed(0)
    feats, attn = torch.randn(1, 8, 8, generator=g), torch.rand(1, 8, generator=g)
    return {
        BASELINE: lambda: torch.topk(attn, 4),
        "torch.ops.vispruner.prune": lambda: torch.ops.vispruner.prune(feats, attn, 4, 0.5, 8),
        "vispruner_cuda.prune": lambda: vispruner_cuda.prune(feats, attn, 4),
    }


def measure(rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Median microseconds per call, over rounds of `repeats` calls each."""
    functions = calls()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            if round_ > 0:  # the first is a warm-up
                times[name].append(1e6 * (time.perf_counter() - start) / repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        {"call": name, "us": round(us, 2), "ratio": round(us / medians[BASELINE], 2)}
        for name, us in medians.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m operators.host", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--rounds", type=positive, default=200, help="default: 200")
    parser.add_argument(
        "--repeats", type=positive, default=200, help="calls per round (default: 200)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = measure(options.rounds, options.repeats)
    for row in rows:
        print(f"{row['call']:<28} {row['us']:>7} us  {row['ratio']} x")
    print(f"wrote {provenance.write('host', {'rounds': options.rounds, 'calls': rows})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
