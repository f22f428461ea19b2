"""Checks on a GPU that repeated calls return equal tokens, in any batch, stream, thread and graph.

Prints one JSON object: the number of repetitions of each kind, and the kinds that differed.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

import vispruner_cuda
from vispruner_cuda import reference

K = 64


def image(seed: int) -> tuple[Tensor, Tensor]:
    """(1, 576, 1024) fp16 features and (1, 16, 576) attention."""
    g = torch.Generator(device="cuda").manual_seed(seed)
    feats = torch.randn(1, 576, 1024, device="cuda", generator=g, dtype=torch.float16)
    return feats, torch.rand(1, 16, 576, device="cuda", generator=g)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000)
    repeats = parser.parse_args(argv).repeats
    if repeats < 1:
        parser.error(f"argument --repeats: must be at least 1, got {repeats}")
    images = [image(seed) for seed in range(256)]
    feats, attn = (torch.cat(parts) for parts in zip(*images, strict=True))
    expected = torch.cat([reference.prune(*images[i], K).indices for i in range(8)])
    report: dict[str, int] = {}
    differed: list[str] = []

    def check(name: str, got: Tensor, want: Tensor) -> None:
        report[name] = report.get(name, 0) + 1
        if not torch.equal(got, want):
            differed.append(name)

    for _ in range(repeats):
        check("repeated", vispruner_cuda.prune(feats[:1], attn[:1], K).indices, expected[:1])
    for i in range(8):
        check("alone", vispruner_cuda.prune(*images[i], K).indices[0], expected[i])
    check("batch of 8", vispruner_cuda.prune(feats[:8], attn[:8], K).indices, expected)
    check("batch of 256", vispruner_cuda.prune(feats, attn, K).indices[:8], expected)
    lengths = [576] * 8 + [100, 1, 333]
    extra = image(999)
    packed = torch.cat([feats[:8].flatten(0, 1), extra[0][0, :434]])
    packed_attn = torch.cat([attn[:8].transpose(0, 1).flatten(1), extra[1][0, :, :434]], dim=1)
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    ragged = vispruner_cuda.prune_varlen(packed, packed_attn, bounds, K).indices[: 8 * K]
    check("ragged", ragged.view(8, K) - 576 * torch.arange(8, device="cuda")[:, None], expected)

    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for round_ in range(50):
        results = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append(vispruner_cuda.prune(*images[(round_ + i) % 8], K).indices)
        torch.cuda.synchronize()
        for i, got in enumerate(results):
            check("streams", got[0], expected[(round_ + i) % 8])

    def work(thread: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(100):
                n = (thread + i) % 8
                got = vispruner_cuda.prune(*images[n], K).indices[0]
                if not torch.equal(got, expected[n]):
                    differed.append("threads")

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(t,)) for t in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    report["threads"] = 200

    static = [t.clone() for t in images[0]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = vispruner_cuda.prune(static[0], static[1], K)
    for i in range(100):
        for to, new in zip(static, images[i % 8], strict=True):
            to.copy_(new)
        graph.replay()
        check("graph replay", captured.indices[0], expected[i % 8])

    compiled = torch.compile(
        lambda f, a: vispruner_cuda.prune(f * 1, a, K).indices, mode="reduce-overhead"
    )
    for i in range(20):
        torch.compiler.cudagraph_mark_step_begin()
        check("torch.compile reduce-overhead", compiled(*images[i % 8])[0], expected[i % 8])

    print(json.dumps({"repeats": report, "differed": differed}))
    return 1 if differed else 0


if __name__ == "__main__":
    sys.exit(main())
