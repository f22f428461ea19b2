"""Whether a build of the host-run kernels agrees with the reference: `python -m support.agreement
MODULE` prints "agrees" or how it does not."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from support.host_kernels import Kernels
from support.problems import Problem
from vispruner_cuda import reference

PROBLEMS = [
    Problem(2, 130, 33, 5, 20, features="clustered"),
    Problem(1, 200, 20, None, 17, features="few_values", attention="ties", dtype=torch.float16),
    Problem(1, 90, 31, 2, 9, features="constant", attention="constant", dtype=torch.bfloat16),
    Problem(1, 1200, 3, None, 40, 0.0, 120, features="few_values", attention="ties"),
    Problem(1, 300, 65, 3, 2, features="normal"),
    Problem(1, 1100, 16, None, 40, 0.0, 120, features="clustered"),
    Problem(1, 400, 16, None, 150, features="smooth", dtype=torch.float16),
]


def attention_differs(kernels: Kernels) -> str | None:
    """Attention scores have an error bound instead of equality."""
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.float32):
        q, k = (torch.randn((150, 2, 40), generator=g).to(dtype) for _ in range(2))
        got = kernels.received_attention(q, k, 0.2, [0, 131, 150])
        want = reference.received_attention(q, k, 0.2, [0, 131, 150])
        if not torch.allclose(got, want, rtol=1e-4, atol=0):
            return f"received_attention, {dtype}"
        heads = k.transpose(0, 1).unsqueeze(0)
        got = kernels.cls_attention(q[:1], heads, 0.2)
        if not torch.allclose(got, reference.cls_attention(q[:1], heads, 0.2), rtol=1e-4, atol=0):
            return f"cls_attention, {dtype}"
    return None


def verdict(kernels: Kernels) -> str:
    """Whether all results are those of the reference, on every problem and schedule."""
    for problem in PROBLEMS:
        feats, attn = problem.tensors()
        expected = reference.prune(feats, attn, problem.k, **problem.keywords())
        for schedule in (0, 1, 5):
            kernels.schedule = schedule
            try:
                got = kernels.prune(feats, attn, problem.k, **problem.keywords())
            except RuntimeError as error:  # a barrier that some threads never reach
                return str(error)
            scores = kernels.topk(attn, problem.tokens).scores
            if not (
                torch.equal(got.indices, expected.indices)
                and torch.equal(got.feats, expected.feats)
                and torch.equal(scores, reference.topk(attn, problem.tokens).scores)
            ):
                return f"differs: {problem}, schedule {schedule}"
    for schedule in (0, 1, 5):
        kernels.schedule = schedule
        try:
            differs = attention_differs(kernels)
        except RuntimeError as error:
            return str(error)
        if differs:
            return f"differs: {differs}, schedule {schedule}"
    return "agrees"


if __name__ == "__main__":
    print(verdict(Kernels(Path(sys.argv[1]))))
