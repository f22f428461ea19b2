"""GPU time of the operators, compared with common alternatives and with the hardware's floor.

    python -m operators.gpu                 all goals, baselines and curves: results/kernels.json
    python -m operators.gpu --goals --quick     the speed goals only
    python -m operators.gpu --device cpu --quick -o /tmp/x      a dry run of this script

Run in benchmarks/. Times are medians over many replays of one captured CUDA graph, measured with
events. The graph holds one call after the other, so that the times are not those of launching
graphs. Its calls have inputs of their own, together larger than the L2 cache (except for top-k).
Baselines get the same tensors in the same run; those that compile run in a separate process with
a time limit. Times per stage come from the profiler.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import provenance
import torch
import torch.nn.functional as F
from numeric import seconds
from torch import Tensor

from vispruner_cuda import plans

from . import baselines
from .workloads import (
    CURVES,
    CURVES_WITH_BASELINES,
    GOALS,
    PLANNED_GOALS,
    PLANNED_STAGES,
    SDPA,
    Case,
    Goal,
)

Call = Callable[[], Any]

# Ceilings that the floors are computed from: NVIDIA H200 SXM, datasheet and measured copy.
BYTES_PER_US = 4.3e6
INT8_PER_US = 1.98e9
F16_PER_US = 0.99e9
EXP_PER_US = 132 * 16 * 1.75e3
ROUND_US = 400 / 1750  # one dependent round of the loop: about 400 cycles


# ------------------------------------------------------------------------------------- the floor
def floor(case: Case) -> dict[str, float]:
    """Microseconds below which no implementation on these ceilings can be, by cause."""
    size = 4 if case.dtype == "float32" else 2
    b, n, c = case.images, case.tokens, case.channels
    if case.op == "prune":
        important = case.k // 2
        residual = n - important
        rounds = -(-(residual - (case.k - important)) // 8)
        waves = -(-b // 264)  # two blocks per multiprocessor
        return {
            "features": b * (n + 2 * case.k) * c * size / BYTES_PER_US,
            "gram": b * 3 * residual * residual * c / INT8_PER_US,
            "rounds": waves * rounds * ROUND_US,
        }
    if case.op == "cls_attention":
        return {"keys": b * case.heads * (1 + n) * c * size / BYTES_PER_US}
    if case.op.startswith("received"):
        passes = 1 if case.op.endswith("lse") else 2
        return {
            "products": passes * 2 * b * case.heads * n * n * c / F16_PER_US,
            "exponentials": passes * b * case.heads * n * n / EXP_PER_US,
        }
    if case.op == "topk":
        return {"scores": b * case.heads * n * size / BYTES_PER_US}
    return {
        "gram": b * 3 * n * n * c / INT8_PER_US,
        "output": b * n * n * 4 / BYTES_PER_US,
    }


# --------------------------------------------------------------------------------- the baselines
def simple_baselines(case: Case, x: dict[str, Tensor]) -> dict[str, Call]:
    """Baselines that need no compilation, on the same tensors."""
    if case.op == "topk":
        scores = x["attn"].float().sum(1)
        return {
            "torch.topk of summed heads": lambda: x["attn"].float().sum(1).topk(case.k),
            "torch.topk alone": lambda: scores.topk(case.k),
            "torch.sort alone": lambda: scores.sort(descending=True),
        }
    if case.op == "pairwise_cosine":
        normal = F.normalize(x["feats"], dim=-1)
        return {
            "torch.bmm alone": lambda: torch.bmm(normal, normal.transpose(1, 2)),
            "normalize and torch.bmm": case.call(x, baselines),
        }
    if case.op == "cls_attention":
        keys = torch.empty_like(x["k"])
        return {
            "eager softmax": case.call(x, baselines),
            "copy of the keys": lambda: keys.copy_(x["k"]),
        }
    if case.op.startswith("received"):
        q, k = (x[name].transpose(0, 1).unsqueeze(0) for name in ("q", "k"))
        return {SDPA: lambda: F.scaled_dot_product_attention(q, k, k)}
    feats, attn = x["feats"], x["attn"]
    copy = torch.empty_like(feats)
    found: dict[str, Call] = {"copy of the features": lambda: copy.copy_(feats)}
    if case.images <= 64 and case.tokens <= 4096:
        found["eager loop, batched"] = case.call(x, baselines)
    if case.images == 1:
        found["eager loop"] = lambda: baselines.prune_each(feats, attn, case.k)
    return found


# ------------------------------------------------------------------------------------ the clocks
def cpu_time(calls: Sequence[Call], seconds: float) -> float:
    """Median microseconds of one call, on the CPU (dry runs)."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        calls[len(times) % len(calls)]()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, one after the other."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def event_time(run: Sequence[Call], seconds: float) -> float:
    """Median microseconds of one of `run`, which take turns, between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def batch(count: int) -> float:
        begin.record()
        for i in range(count):
            run[i % len(run)]()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / count

    batch(len(run))
    once = max(batch(len(run)), 1.0)
    count = max(len(run), int(2e3 / once))  # a batch lasts two milliseconds or more
    stop = time.perf_counter() + seconds
    times = [batch(count)]
    while len(times) < 5 or (time.perf_counter() < stop and len(times) < 200):
        times.append(batch(count))
    return statistics.median(times)


def input_sets(case: Case, device: str, most: int = 64) -> list[dict[str, Tensor]]:
    """Enough sets of tensors that a round through them leaves nothing in the cache."""
    first = case.inputs(device)
    size = sum(t.numel() * t.element_size() for t in first.values())
    count = 2 if device == "cpu" else min(most, max(2, -(-(192 << 20) // max(size, 1))))
    return [first, *(case.inputs(device, seed) for seed in range(1, count))]


def gpu_or_cpu_time(
    calls: Sequence[Call], device: str, seconds: float, graph: bool = True
) -> float:
    if device == "cpu":
        return cpu_time(calls, seconds)
    if not graph:
        return event_time(calls, seconds)
    return event_time([captured(calls).replay], seconds) / len(calls)


def warm_up(device: str) -> None:
    """Keeps the GPU busy for a second, so that its clocks have risen."""
    if device == "cpu":
        return
    square = torch.ones(4096, 4096, device=device, dtype=torch.float16)
    end = time.perf_counter() + 1
    while time.perf_counter() < end:
        square @ square
        torch.cuda.synchronize()


def host_time(case: Case, device: str) -> float:
    """Median microseconds that one call occupies the host, with the GPU working behind it."""
    call = case.call(case.inputs(device))
    times: list[float] = []
    for _ in range(20):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            call()
        times.append((time.perf_counter() - start) / 20)
    return 1e6 * statistics.median(times)


def stage_times(case: Case) -> dict[str, float]:
    """Microseconds of each kernel of one call, from the profiler."""
    call = case.call(case.inputs("cuda"))
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    repeats = 20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    return {
        event.key: round(event.self_device_time_total / repeats, 3)
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    }


# ---------------------------------------------------------------------------- compiled baselines
COMPILED = {
    "eager loop in a CUDA graph": None,  # compiles nothing
    "torch.compile": {},
    "torch.compile reduce-overhead": {"mode": "reduce-overhead"},
    "torch.compile max-autotune": {"mode": "max-autotune"},
}


def compiled_baseline(name: str, case: Case, device: str, seconds: float) -> float:
    loop = case.call(case.inputs(device), baselines)
    options = COMPILED[name]
    if options is None:
        return gpu_or_cpu_time([loop], device, seconds, graph=device != "cpu")
    compiled = torch.compile(loop, **options)  # type: ignore[call-overload]
    for _ in range(3):
        compiled()
    return gpu_or_cpu_time([compiled], device, seconds, graph=False)


def compiled_baselines(
    arguments: argparse.Namespace,
) -> Iterator[tuple[str, float | None, str]]:
    """Each in a separate process: name, time or None, and the reason of None."""
    for name in COMPILED:
        say(f"compiled baseline: {name}")
        command = [sys.executable, "-m", "operators.gpu", "--baseline", name]
        command += ["--device", arguments.device]
        command += ["--seconds", str(arguments.seconds)]
        command += ["--quick"] if arguments.quick else []
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).resolve().parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=arguments.compile_limit)
            if process.returncode:
                reason = "".join(errors.strip().splitlines()[-1:]) or f"exit {process.returncode}"
                say(f"{name}: {reason}")
                yield name, None, reason
            else:
                yield name, float(output.split()[-1]), ""
        except subprocess.TimeoutExpired:
            yield name, None, f"no result in {arguments.compile_limit:g} s"
        finally:
            # Together with the compilers it started, which would keep its pipes open.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def plan_times(case: Case, device: str, seconds: float) -> list[dict[str, Any]]:
    """The case under every plan, in turn, so that a GPU that slows down slows all of them."""
    calls = [case.call(x) for x in input_sets(case, device)]
    choices = plans.choices()
    forced: list[dict[str, str]] = [{}]
    forced += [
        {stage: name}
        for stage in PLANNED_STAGES
        for name in choices.get(stage, ())
        if name not in ("auto", "dependent")  # "auto" is "dependent" where the GPU can
    ]
    times: list[list[float]] = [[] for _ in forced]
    for _ in range(3):
        for plan, measured in zip(forced, times, strict=True):
            with plans.use(**plan):  # in force when a call is made, or captured
                measured.append(gpu_or_cpu_time(calls, device, seconds))
    return [
        {"plan": plan, "us": statistics.median(measured)}
        for plan, measured in zip(forced, times, strict=True)
    ]


# --------------------------------------------------------------------------------------- reports
def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def shrunk(goal: Goal) -> Goal:
    """The goal at a size that takes a CPU moments, for dry runs."""
    case = goal.case
    small = replace(
        case,
        images=min(case.images, 2),
        tokens=min(case.tokens, 64),
        k=min(case.k, 16),
        channels=min(case.channels, 32),
    )
    return replace(goal, case=small)


def measure(goal: Goal, arguments: argparse.Namespace, with_baselines: bool) -> dict[str, Any]:
    device, seconds = arguments.device, arguments.seconds
    case = goal.case
    sets = input_sets(case, device)
    us = gpu_or_cpu_time([case.call(x) for x in sets], device, seconds)
    described = asdict(goal)
    result: dict[str, Any] = {
        **described.pop("case"),
        **described,
        "us": us,
        "us_per_image": us / case.images,
        "floor_us": floor(case),
    }
    if with_baselines:
        result["baselines_us"] = {}
        every = [simple_baselines(case, x) for x in sets]
        for name in every[0]:
            # Eager loops run as users run them; most are too long to capture.
            graph = not name.startswith("eager loop")
            result["baselines_us"][name] = gpu_or_cpu_time(
                [calls[name] for calls in every], device, seconds, graph=graph
            )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m operators.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--goals", action="store_true", help="the goals only, no curves")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile")
    parser.add_argument("--quick", action="store_true", help="short measurements")
    parser.add_argument("--seconds", type=seconds, help="per measurement (default: 0.3)")
    parser.add_argument("--compile-limit", type=seconds, default=120.0, help="seconds per baseline")
    parser.add_argument("-o", "--output", type=Path, default=provenance.RESULTS, help="directory")
    parser.add_argument("--baseline", choices=list(COMPILED), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"argument -o: must be a directory, got the file {arguments.output}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU found: --device cpu makes a dry run")
    if arguments.seconds is None:
        arguments.seconds = 0.05 if arguments.quick else 0.3

    dry = arguments.device == "cpu"
    goals = tuple(map(shrunk, GOALS)) if dry else GOALS
    first = goals[0].case
    if arguments.baseline:
        print(compiled_baseline(arguments.baseline, first, arguments.device, arguments.seconds))
        return 0

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that baselines end as well
    data: dict[str, Any] = {
        "dry_run": dry,
        "complete": False,  # all that was asked for
        "seconds": arguments.seconds,
        "goals_only": arguments.goals,
        "rows": [],
        "curves": {},
        "no_baseline": {},  # name to reason
    }

    def save() -> Path:
        """After each part, so that a time limit from outside loses only the rest."""
        name = "kernels_dry_run" if dry else "kernels"
        return provenance.write(name, data, arguments.output)

    warm_up(arguments.device)
    data["host_us"] = host_time(first, arguments.device)
    for goal in goals:
        row = measure(goal, arguments, with_baselines=True)
        if goal.name in PLANNED_GOALS:
            row["plans"] = plan_times(goal.case, arguments.device, arguments.seconds)
        data["rows"].append(row)
        say(f"{goal.name}: {row['us']:.1f} us")
        path = save()
    if not arguments.goals:
        for name, curve in CURVES.items():
            points = tuple(map(shrunk, curve)) if dry else curve
            data["curves"][name] = [
                measure(goal, arguments, with_baselines=name in CURVES_WITH_BASELINES)
                for goal in points
            ]
            say(f"curve over {name}")
            path = save()
    if not dry:  # after the times, because the profiler slows calls down
        for goal, row in zip(goals, data["rows"], strict=True):
            row["stages_us"] = stage_times(goal.case)
        path = save()
    if not arguments.no_compile:
        for baseline, time_, reason in compiled_baselines(arguments):
            data["rows"][0]["baselines_us"][baseline] = time_
            if time_ is None:
                data["no_baseline"][baseline] = reason
            path = save()
    data["complete"] = True
    path = save()
    print(path)
    print(json.dumps({row["name"]: round(row["us"], 2) for row in data["rows"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
