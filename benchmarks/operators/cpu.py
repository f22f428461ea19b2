"""Measures the CPU operators against eager PyTorch and writes results/cpu.json.

With `--methods` it measures every method of `prune` and writes results/methods_cpu.json.

All candidates of a case run in one process on the same tensors, interleaved round by round, so
that a slow moment of the machine affects all of them; the table has medians. Before timing, every
operator is compared with the reference. Extra memory is the growth of the peak resident set over
one `prune` call in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import provenance
import torch
import torch.nn.functional as F
from numeric import threads
from rich.console import Console
from rich.progress import Progress

import vispruner_cuda

from . import baselines
from .workloads import CPU_CASES, CPU_MEMORY_CASES, CPU_METHOD_CASES, Case

OPERATOR = "vispruner_cuda"


def candidates(case: Case) -> dict[str, Callable[[], Any]]:
    """The operator and its baselines as functions without arguments."""
    x = case.inputs()
    found = {OPERATOR: case.call(x)}
    if case.op == "prune":
        found["eager loop"] = lambda: baselines.prune_each(
            x["feats"], x["attn"], case.k, method=case.method
        )
        if case.images > 1:
            found["eager loop, batched"] = case.call(x, baselines)
        return found
    names = {"topk": "mean, torch.topk", "pairwise_cosine": "normalize, matmul",
             "dedup": "eager loop"}  # fmt: skip
    found[names.get(case.op, "softmax of q k")] = case.call(x, baselines)
    if case.op == "received_attention":
        # For comparison: the cost of the tower's attention, which gives no scores.
        q, k = (x[name].transpose(0, 1).unsqueeze(0) for name in ("q", "k"))
        found["one SDPA forward"] = lambda: F.scaled_dot_product_attention(q, k, k)
    return found


def check(case: Case) -> None:
    """Compares the operator with the reference: bit for bit, scores within a tolerance."""
    x = case.inputs()
    got, want = (case.call(x, module)() for module in (vispruner_cuda, vispruner_cuda.reference))
    if case.is_score:
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-7)
        return
    if isinstance(got, torch.Tensor):
        got, want = (got,), (want,)
    if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
        raise SystemExit(f"{case.name}: the operator and the reference differ")


def measure(case: Case, rounds: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Interleaved timings of one case, in milliseconds."""
    functions = candidates(case)
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
        tick()
    medians = {name: statistics.median(values) for name, values in times.items()}
    minima = {name: min(values) for name, values in times.items()}
    return {
        "name": case.name,
        "op": case.op,
        **({"method": case.method} if case.op == "prune" else {}),
        "images": case.images,
        "tokens": case.tokens,
        "channels": case.channels,
        "dtype": case.dtype,
        "k": case.k,
        "rounds": rounds,
        "median_ms": {name: round(value, 4) for name, value in medians.items()},
        "min_ms": {name: round(value, 4) for name, value in minima.items()},
        "speedup": round(_speedup(medians), 2),
        "speedup_of_minima": round(_speedup(minima), 2),
    }


def _speedup(times: dict[str, float]) -> float:
    """How many times faster than the fastest baseline."""
    return min(value for name, value in times.items() if name != OPERATOR) / times[OPERATOR]


# ------------------------------------------------------------------------------------ memory
def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def peak_growth(case: Case) -> int:
    """Growth of the peak resident set over the first call of this size in this process."""
    x = case.inputs()
    feats, attn = x["feats"], x["attn"]
    vispruner_cuda.prune(feats[:, :96].clone(), attn[..., :96].clone(), 8)  # threads and code
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = _status("VmHWM")
    vispruner_cuda.prune(feats, attn, case.k)
    return _status("VmHWM") - before


def memory(case: Case, threads: int) -> dict[str, Any]:
    """Extra memory of one call, measured in a fresh process."""
    command = [sys.executable, "-m", "operators.cpu", "--memory-of", case.name]
    command += ["--threads", str(threads)]
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    extra = int(done.stdout)
    residual = case.tokens - case.k // 2
    feats = case.images * case.tokens * case.channels * (4 if case.dtype == "float32" else 2)
    gram = 4 * residual * residual
    return {
        "name": case.name,
        "peak_extra_bytes": extra,
        "gram_bytes": gram,
        "features_bytes": feats,
        "copies_of_features_besides_gram": round((extra - gram) / feats, 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m operators.cpu", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--threads", type=threads, default=2, help="torch threads (default: 2)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of the small cases; no file")
    parser.add_argument("--methods", action="store_true", help="every method of prune instead")
    parser.add_argument("--memory-of", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        (case,) = (c for c in CPU_MEMORY_CASES if c.name == options.memory_of)
        print(peak_growth(case))
        return 0

    measured = CPU_METHOD_CASES if options.methods else CPU_CASES
    cases = [c for c in measured if not options.quick or c.tokens <= 576]
    rounds = {c: 3 if options.quick else c.rounds for c in cases}
    speed = []
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task("", total=sum(rounds.values()))
        for case in cases:
            progress.update(task, description=f"{case.name:<42}")
            check(case)
            row = measure(case, rounds[case], lambda: progress.advance(task))
            speed.append(row)
            progress.console.print(
                f"{case.name:<42} {row['median_ms']}  "
                f"{row['speedup']}x (minima: {row['speedup_of_minima']}x)"
            )
    if options.methods:
        if not options.quick:
            console.print(f"wrote {provenance.write('methods_cpu', {'speed': speed})}")
        return 0
    extra = [
        memory(c, options.threads) for c in CPU_MEMORY_CASES if not options.quick or c.tokens < 1000
    ]
    for row in extra:
        console.print(json.dumps(row))
    if not options.quick:
        console.print(f"wrote {provenance.write('cpu', {'speed': speed, 'memory': extra})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
