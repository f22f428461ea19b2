"""Counts the work of the kernels of one call, without a GPU: `python -m ptx.counts` from within
tests/.

Prints, per kernel: launches, warp instructions by class, the longest block, accesses of shared and
global memory against the least that could move as many bytes, barriers, atomics, and the source
lines that cost most. Counts are of PTX instructions; docs/performance.md says what they can and
cannot tell.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support import compiled_kernels
from support.compiled_kernels import A100, ADA, H100, Kernels
from support.problems import FEATURE_KINDS, features
from torch import Tensor

from vispruner_cuda import methods

DEVICES = {"sm_80": A100, "sm_89": ADA, "sm_90": H100}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OPERATORS = ("prune", "topk", "pairwise_cosine", "cls_attention", "received_attention")


def aligned(tensor: Tensor) -> Tensor:
    """A copy at a multiple of 512 bytes, as torch allocates on a GPU."""
    raw = torch.empty(tensor.numel() * tensor.element_size() + 512, dtype=torch.uint8)
    skip = -raw.data_ptr() % 512
    view = raw[skip : skip + tensor.numel() * tensor.element_size()].view(tensor.dtype)
    return view.view(tensor.shape).copy_(tensor)


def call(kernels: Kernels, o: argparse.Namespace) -> Callable[[], Any]:
    """The call to count, with its inputs."""
    g = torch.Generator().manual_seed(0)
    dtype = DTYPES[o.dtype]

    def normal(*shape: int) -> Tensor:
        return aligned(torch.randn(shape, generator=g).to(dtype))

    if o.operator == "cls_attention":
        q, k = (
            normal(o.images, o.heads, o.channels),
            normal(o.images, o.heads, o.tokens, o.channels),
        )
        return lambda: kernels.cls_attention(q, k, o.channels**-0.5)
    if o.operator == "received_attention":
        q, k = (normal(o.tokens, o.heads, o.channels) for _ in range(2))
        return lambda: kernels.received_attention(q, k, o.channels**-0.5)
    feats = aligned(features(o.features, (o.images, o.tokens, o.channels), g).to(dtype))
    attn = aligned(torch.rand((o.images, o.heads, o.tokens), generator=g).to(dtype))
    if o.operator == "topk":
        return lambda: kernels.topk(attn, o.k)
    if o.operator == "pairwise_cosine":
        return lambda: kernels.pairwise_cosine(feats)
    return lambda: kernels.prune(feats, attn, o.k, method=o.method)


def count(kernels: Kernels, o: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The counters of each kernel, in the order of its first launch."""
    run = call(kernels, o)
    kernels.device = DEVICES[o.device]
    kernels.options = {"profile": True, "races": o.checks, "initialized": o.checks}
    kernels.module.clear_counters()
    kernels.module.take_runtime_calls()
    with kernels.plans.use(**dict(plan.split("=", 1) for plan in o.plan)):
        run()
    order = {name: i for i, name in reversed(list(enumerate(kernels.kernel_names())))}
    found = {n.replace("> >", ">>"): c for n, c in kernels.module.counters().items()}
    return {name: found[name] for name in sorted(found, key=lambda n: order[n])}


def traffic(counters: dict[str, Any], what: str, unit: str) -> str | None:
    requests, least = counters[f"{what}_requests"], counters[f"{what}_ideal"]
    if not requests:
        return None
    actual = counters[f"{what}_{unit}"]
    excess = actual / max(least, 1)
    return f"{requests:,} requests, {actual:,} {unit}, least {least:,} ({excess:.2f} x)"


def report(name: str, c: dict[str, Any], most_lines: int) -> list[str]:
    """The report of one kernel."""
    warps = c["warp_instructions"]
    classes = sorted(c["warp"].items(), key=lambda item: -item[1])
    lines = sorted(c["lines"].items(), key=lambda item: -item[1])[:most_lines]
    launches = f"{c['launches']} of {c['blocks'] // c['launches']:,} x {c['threads']} threads"
    shared = f"{c['static_shared']} + {c['dynamic_shared']} bytes of shared memory"
    lanes = c["thread_instructions"] / warps / 32
    rows = [
        ("launches", f"{launches}, {shared}"),
        ("instructions", f"{warps:,} of warps, {lanes:.0%} of the lanes on"),
        ("longest block", f"{c['longest_block']:,} instructions"),
        ("by class", ", ".join(f"{what} {n:,}" for what, n in classes if n)),
        ("branches", f"{c['divergent_branches']:,} of {c['branches']:,} divergent"),
        ("barriers", f"{c['barriers']:,} of blocks, {c['warp_syncs']:,} within warps"),
        ("shared memory", traffic(c, "shared", "wavefronts")),
        ("matrix loads", traffic(c, "matrix", "wavefronts")),
        ("atomics", traffic(c, "atomic", "serial")),
        ("global loads", traffic(c, "load", "sectors")),
        ("global stores", traffic(c, "store", "sectors")),
        ("async copies", traffic(c, "async", "sectors")),
        ("  into shared", traffic(c, "async_shared", "wavefronts")),
        ("costly lines", "; ".join(f"{line} {n / warps:.1%}" for line, n in lines) or None),
    ]
    return [name, *(f"  {title:14} {text}" for title, text in rows if text)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ptx.counts", description=__doc__.split("\n")[0]
    )
    parser.add_argument("operator", nargs="?", default="prune", choices=OPERATORS)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=576)
    parser.add_argument("--channels", type=int, default=1024, help="of a token, or of a head")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--method", default=methods.DEFAULT, choices=methods.METHODS)
    parser.add_argument("--features", default="normal", choices=FEATURE_KINDS)
    parser.add_argument("--dtype", default="float16", choices=DTYPES)
    parser.add_argument("--device", default="sm_90", choices=DEVICES)
    parser.add_argument(
        "--plan",
        action="append",
        default=[],
        metavar="STAGE=NAME",
        help="a launch plan; repeatable",
    )
    parser.add_argument("--csrc", type=Path, help="another copy of the kernels")
    parser.add_argument("--checks", action="store_true", help="look for races and such, slower")
    parser.add_argument("--lines", type=int, default=12, help="source lines to name per kernel")
    parser.add_argument("--json", action="store_true", help="print the counters as JSON")
    o = parser.parse_args(argv)
    if missing := compiled_kernels.not_tested():
        print(missing, file=sys.stderr)
        return 1
    kernels = Kernels(compiled_kernels.build_module(o.csrc))
    try:
        counted = count(kernels, o)
    except (ValueError, RuntimeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    if o.json:
        for counters in counted.values():
            del counters["executed"], counters["spots"]
        print(json.dumps(counted, indent=1))
        return 0
    print("\n\n".join("\n".join(report(name, c, o.lines)) for name, c in counted.items()))
    calls = kernels.module.take_runtime_calls()
    print("\nCUDA runtime: " + ", ".join(f"{name} {n}" for name, n in sorted(calls.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
