"""GPU time of the operators, beside what a user would pick instead and beside the floor.

    python benchmarks/operators_gpu.py             all rows, baselines, curves: results/kernels.json
    python benchmarks/operators_gpu.py --rows --quick  the rows of the speed goals alone
    python benchmarks/operators_gpu.py --device cpu --quick -o /tmp/x   a dry run of this script

Times are medians over many replays of captured CUDA graphs, measured with events; inputs rotate
through more memory than the L2 cache holds. Peers get the same tensors in the same run; those that
compile run in a process of their own with a time limit. The stage times come from the profiler.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import baselines
import provenance
import torch
import torch.nn.functional as F
from torch import Tensor

import vispruner_cuda
from vispruner_cuda import plans

Call = Callable[[], Any]

# Ceilings that the floors are counted with: NVIDIA H200 SXM, datasheet and measured copy.
BYTES_PER_US = 4.3e6
INT8_PER_US = 1.98e9
F16_PER_US = 0.99e9
EXP_PER_US = 132 * 16 * 1.75e3
ROUND_US = 400 / 1750  # one dependent round of the loop: about 400 cycles


@dataclass(frozen=True)
class Row:
    """One speed goal.

    Attributes:
        goal, aim: microseconds for the whole call, or for one image where `per` is "image"; or,
            with `relative_to`, multiples of the floor or of that baseline's time.
    """

    name: str
    op: str
    images: int
    tokens: int
    channels: int
    k: int
    goal: float | None
    aim: float | None
    per: str = "call"
    heads: int = 16
    dtype: str = "float16"
    relative_to: str | None = None


SDPA = "scaled_dot_product_attention"

ROWS = (
    Row("1 image", "prune", 1, 576, 1024, 64, 40, 25),
    Row("1 image, bf16", "prune", 1, 576, 1024, 64, 40, 25, dtype="bfloat16"),
    Row("5 tiles (LLaVA-NeXT)", "prune", 5, 576, 1024, 64, 50, 30),
    Row("64 images", "prune", 64, 576, 1024, 64, 2.5, 1.5, per="image"),
    Row("256 images", "prune", 256, 576, 1024, 64, 2.0, 1.2, per="image"),
    Row("4096 tokens (Qwen)", "prune", 1, 4096, 3584, 410, 3000, 1500),
    Row(
        "[CLS] attention, 16 images", "cls_attention", 16, 577, 64, 0, 1.3, 1.1, relative_to="floor"
    ),
    Row(
        "[CLS] attention, 64 images", "cls_attention", 64, 577, 64, 0, 1.3, 1.1, relative_to="floor"
    ),
    Row("received attention", "received_attention", 1, 4096, 80, 0, 1.2, 0.8, relative_to=SDPA),
    Row(
        "received attention, lse",
        "received_attention_lse",
        1,
        4096,
        80,
        0,
        1.2,
        0.8,
        relative_to=SDPA,
    ),
    Row("top-k of 576", "topk", 1, 576, 0, 64, None, None),
    Row("top-k of 64 x 576", "topk", 64, 576, 0, 64, None, None),
    Row("pairwise cosine", "pairwise_cosine", 1, 576, 1024, 0, None, None),
    Row("pairwise cosine, 64 images", "pairwise_cosine", 64, 576, 1024, 0, None, None),
)

CURVES: dict[str, tuple[Row, ...]] = {
    "tokens": tuple(
        Row(str(n), "prune", 1, n, 1024, 64, None, None)
        for n in (256, 576, 1024, 2048, 4096, 8192, 16384)
    ),
    "images": tuple(
        Row(str(b), "prune", b, 576, 1024, 64, None, None)
        for b in (1, 2, 4, 8, 16, 32, 64, 256, 1024)
    ),
    "k": tuple(
        Row(str(k), "prune", 1, 576, 1024, k, None, None) for k in (32, 64, 128, 192, 320, 575)
    ),
    "channels": tuple(
        Row(str(c), "prune", 1, 576, c, 64, None, None) for c in (256, 768, 1024, 1536, 4096, 8192)
    ),
    "dtype": tuple(
        Row(d, "prune", 8, 576, 1024, 64, None, None, dtype=d)
        for d in ("float16", "bfloat16", "float32")
    ),
}

CURVES_WITH_BASELINES = ("tokens", "images")

# Rows to measure under every plan of these stages (docs/performance.md).
PLANNED_STAGES = ("launch", "rank", "gram", "sort")
PLANNED_ROWS = ("1 image", "64 images", "4096 tokens (Qwen)")


# ------------------------------------------------------------------------------------- the floor
def floor(row: Row) -> dict[str, float]:
    """Microseconds below which no implementation on these ceilings can be, by cause."""
    size = 4 if row.dtype == "float32" else 2
    b, n, c = row.images, row.tokens, row.channels
    if row.op == "prune":
        important = row.k // 2
        residual = n - important
        rounds = -(-(residual - (row.k - important)) // 8)
        waves = -(-b // 264)  # two blocks a multiprocessor
        return {
            "features": b * (n + 2 * row.k) * c * size / BYTES_PER_US,
            "gram": b * 3 * residual * residual * c / INT8_PER_US,
            "rounds": waves * rounds * ROUND_US,
        }
    if row.op == "cls_attention":
        return {"keys": b * row.heads * n * c * size / BYTES_PER_US}
    if row.op.startswith("received"):
        passes = 1 if row.op.endswith("lse") else 2
        return {
            "products": passes * 2 * b * row.heads * n * n * c / F16_PER_US,
            "exponentials": passes * b * row.heads * n * n / EXP_PER_US,
        }
    if row.op == "topk":
        return {"scores": b * row.heads * n * size / BYTES_PER_US}
    return {
        "gram": b * 3 * n * n * c / INT8_PER_US,
        "output": b * n * n * 4 / BYTES_PER_US,
    }


# ------------------------------------------------------------------------------------ the inputs
def tensors(row: Row, device: str, seed: int) -> dict[str, Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, row.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=dtype)

    b, h, n, c = row.images, row.heads, row.tokens, row.channels
    if row.op == "cls_attention":
        return {"q": normal(b, h, c), "k": normal(b, n, h, c).transpose(1, 2)}
    if row.op.startswith("received"):
        return {"q": normal(n, h, c), "k": normal(n, h, c), "lse": normal(h, n).float()}
    attn = (2 * normal(b, h, n)).softmax(-1)
    if row.op == "topk":
        return {"attn": attn}
    return {"feats": normal(b, n, c), "attn": attn}


def call_of(row: Row, x: dict[str, Tensor]) -> Call:
    scale = max(row.channels, 1) ** -0.5
    if row.op == "prune":
        return lambda: vispruner_cuda.prune(x["feats"], x["attn"], row.k)
    if row.op == "topk":
        return lambda: vispruner_cuda.topk(x["attn"], row.k)
    if row.op == "pairwise_cosine":
        return lambda: vispruner_cuda.pairwise_cosine(x["feats"])
    if row.op == "cls_attention":
        return lambda: vispruner_cuda.cls_attention(x["q"], x["k"], scale)
    lse = x["lse"] if row.op.endswith("lse") else None
    return lambda: vispruner_cuda.received_attention(x["q"], x["k"], scale, lse=lse)


def simple_baselines(row: Row, x: dict[str, Tensor]) -> dict[str, Call]:
    """Peers that need no compilation, on the same tensors."""
    if row.op == "topk":
        scores = x["attn"].float().sum(1)
        return {
            "torch.topk of summed heads": lambda: x["attn"].float().sum(1).topk(row.k),
            "torch.topk alone": lambda: scores.topk(row.k),
            "torch.sort alone": lambda: scores.sort(descending=True),
        }
    if row.op == "pairwise_cosine":
        normal = F.normalize(x["feats"], dim=-1)
        return {
            "torch.bmm alone": lambda: torch.bmm(normal, normal.transpose(1, 2)),
            "normalize and torch.bmm": lambda: baselines.pairwise_cosine(x["feats"]),
        }
    if row.op == "cls_attention":
        q, k = x["q"], x["k"]
        copy = torch.empty_like(k)
        return {
            "eager softmax": lambda: baselines.cls_attention(q, k, row.channels**-0.5),
            "copy of the keys": lambda: copy.copy_(k),
        }
    if row.op.startswith("received"):
        q, k = (x[name].transpose(0, 1).unsqueeze(0) for name in ("q", "k"))
        return {SDPA: lambda: F.scaled_dot_product_attention(q, k, k)}
    feats, attn = x["feats"], x["attn"]
    copy = torch.empty_like(feats)
    found: dict[str, Call] = {"copy of the features": lambda: copy.copy_(feats)}
    if row.images <= 64 and row.tokens <= 4096:
        found["eager loop, batched"] = lambda: baselines.prune_batched(feats, attn, row.k)
    if row.images == 1:
        found["eager loop"] = lambda: baselines.prune_each(feats, attn, row.k)
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


def captured(call: Call) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
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


def input_sets(row: Row, device: str, most: int = 64) -> list[dict[str, Tensor]]:
    """Enough sets of tensors that a round through them leaves nothing in the cache."""
    first = tensors(row, device, 0)
    size = sum(t.numel() * t.element_size() for t in first.values())
    count = 2 if device == "cpu" else min(most, max(2, -(-(192 << 20) // max(size, 1))))
    return [first, *(tensors(row, device, seed) for seed in range(1, count))]


def gpu_or_cpu_time(
    calls: Sequence[Call], device: str, seconds: float, graph: bool = True
) -> float:
    if device == "cpu":
        return cpu_time(calls, seconds)
    if not graph:
        return event_time(calls, seconds)
    return event_time([captured(c).replay for c in calls], seconds)


def host_time(row: Row, device: str) -> float:
    """Median microseconds that one call keeps the host, the GPU working behind it."""
    call = call_of(row, tensors(row, device, 0))
    times: list[float] = []
    for _ in range(20):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            call()
        times.append((time.perf_counter() - start) / 20)
    return 1e6 * statistics.median(times)


def stage_times(row: Row) -> dict[str, float]:
    """Microseconds of each kernel of one call, from the profiler."""
    call = call_of(row, tensors(row, "cuda", 0))
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
    "torch.compile": {},
    "torch.compile reduce-overhead": {"mode": "reduce-overhead"},
    "torch.compile max-autotune": {"mode": "max-autotune"},
    "eager loop in a CUDA graph": None,
}


def compiled_baseline(name: str, row: Row, device: str, seconds: float) -> float:
    x = tensors(row, device, 0)

    def loop() -> Any:
        return baselines.prune_batched(x["feats"], x["attn"], row.k)

    options = COMPILED[name]
    if options is None:
        return gpu_or_cpu_time([loop], device, seconds, graph=device != "cpu")
    compiled = torch.compile(loop, **options)  # type: ignore[call-overload]
    for _ in range(3):
        compiled()
    return gpu_or_cpu_time([compiled], device, seconds, graph=False)


def compiled_baselines(
    row: Row, arguments: argparse.Namespace
) -> Iterator[tuple[str, float | None]]:
    """Each in a process of its own; None where the time limit came first."""
    for name in COMPILED:
        say(f"compiled baseline: {name}")
        command = [sys.executable, __file__, "--baseline", name, "--device", arguments.device]
        command += ["--seconds", str(arguments.seconds)]
        command += ["--quick"] if arguments.quick else []
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=arguments.compile_limit)
            if process.returncode:
                say(f"{name}: {errors.strip().splitlines()[-1:]}")
            yield name, float(output.split()[-1]) if process.returncode == 0 else None
        except subprocess.TimeoutExpired:
            yield name, None
        finally:
            # With the compilers it has started, which would keep its pipes open.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def plan_times(row: Row, device: str, seconds: float) -> list[dict[str, Any]]:
    """The row under every plan, in turn, so that a GPU that slows down slows all of them."""
    calls = [call_of(row, x) for x in input_sets(row, device)]
    choices = plans.choices()
    forced: list[dict[str, str]] = [{}]
    forced += [
        {stage: name}
        for stage in PLANNED_STAGES
        for name in choices.get(stage, ())
        if name not in ("auto", "dependent")  # which "auto" is where it can be
    ]
    times: list[list[float]] = [[] for _ in forced]
    for _ in range(3):
        for plan, own in zip(forced, times, strict=True):
            with plans.use(**plan):  # in force when a call is made, or captured
                own.append(gpu_or_cpu_time(calls, device, seconds))
    return [
        {"plan": plan, "us": statistics.median(own)}
        for plan, own in zip(forced, times, strict=True)
    ]


# --------------------------------------------------------------------------------------- reports
def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def shrunk(row: Row) -> Row:
    """The row at a size that a dry run on a CPU takes moments for."""
    small = {"images": min(row.images, 2), "tokens": min(row.tokens, 64), "k": min(row.k, 16)}
    return Row(**{**asdict(row), **small, "channels": min(row.channels, 32)})


def measure(
    row: Row, arguments: argparse.Namespace, with_baselines: bool, with_stages: bool = False
) -> dict[str, Any]:
    device, seconds = arguments.device, arguments.seconds
    sets = input_sets(row, device)
    own = gpu_or_cpu_time([call_of(row, x) for x in sets], device, seconds)
    result: dict[str, Any] = {
        **asdict(row),
        "us": own,
        "us_per_image": own / row.images,
        "floor_us": floor(row),
    }
    if with_baselines:
        result["baselines_us"] = {}
        for name, baseline in simple_baselines(row, sets[0]).items():
            # Eager programs run as users run them; they are too long to capture in most cases.
            eager = name.startswith("eager loop")
            graph = not eager
            result["baselines_us"][name] = gpu_or_cpu_time([baseline], device, seconds, graph=graph)
    if with_stages and device != "cpu":
        result["stages_us"] = stage_times(row)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rows", action="store_true", help="the goals alone, no curves")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--quick", action="store_true", help="short measurements")
    parser.add_argument("--seconds", type=float, help="of each measurement (default 0.3)")
    parser.add_argument("--compile-limit", type=float, default=120.0, help="seconds a baseline")
    parser.add_argument("-o", "--output", type=Path, default=provenance.RESULTS, help="directory")
    parser.add_argument("--baseline", choices=list(COMPILED), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU: --device cpu makes a dry run")
    if arguments.seconds is None:
        arguments.seconds = 0.05 if arguments.quick else 0.3

    dry = arguments.device == "cpu"
    rows = tuple(map(shrunk, ROWS)) if dry else ROWS
    if arguments.baseline:
        print(compiled_baseline(arguments.baseline, rows[0], arguments.device, arguments.seconds))
        return 0

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that baselines are ended, too
    data: dict[str, Any] = {"dry_run": dry, "rows": [], "curves": {}}

    def save() -> Path:
        """After each part: a time limit from outside then costs the rest alone."""
        name = "kernels_dry_run" if dry else "kernels"
        return provenance.write(name, data, arguments.output)

    data["host_us"] = host_time(rows[0], arguments.device)
    for row in rows:
        data["rows"].append(measure(row, arguments, with_baselines=True, with_stages=True))
        if row.name in PLANNED_ROWS:
            data["rows"][-1]["plans"] = plan_times(row, arguments.device, arguments.seconds)
        say(f"{row.name}: {data['rows'][-1]['us']:.1f} us")
        path = save()
    if not arguments.rows:
        for name, curve in CURVES.items():
            points = tuple(map(shrunk, curve)) if dry else curve
            data["curves"][name] = [
                measure(row, arguments, with_baselines=name in CURVES_WITH_BASELINES)
                for row in points
            ]
            say(f"curve over {name}")
            path = save()
    if not arguments.no_compile:
        for baseline, time_ in compiled_baselines(rows[0], arguments):
            data["rows"][0]["baselines_us"][baseline] = time_
            path = save()
    print(path)
    print(json.dumps({row["name"]: round(row["us"], 2) for row in data["rows"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
