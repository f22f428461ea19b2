"""A small but complete set of calls for compute-sanitizer: every kernel, plan, dtype and odd size.

compute-sanitizer --tool memcheck python benchmarks/sanitize.py
"""

from __future__ import annotations

import os

import torch

import vispruner_cuda

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def main() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        feats, attn = random(3, 131, 33, dtype=dtype), random(3, 2, 131, dtype=dtype)
        vispruner_cuda.prune(feats, attn, 17)
        vispruner_cuda.prune(feats[:, 1:], attn[..., 1:], 130, important_ratio=1.0)
        vispruner_cuda.dedup(feats, 65, step=3)
        vispruner_cuda.pairwise_cosine(feats)
        vispruner_cuda.topk(attn, 9)
        vispruner_cuda.cls_attention(feats[:, :2], feats.unsqueeze(1).repeat(1, 2, 1, 1), 0.2)
        packed = random(150, 3, 72, dtype=dtype)
        vispruner_cuda.received_attention(packed, packed, 0.1, [0, 70, 70, 150])
        vispruner_cuda.received_attention(packed, packed, 0.1, lse=torch.zeros(3, 150).cuda() + 5)
    vispruner_cuda.prune_varlen(
        random(400, 64), random(4, 400), [0, 1, 200, 200, 329, 400], [3, 20, 1, 128, 99]
    )
    for plan in ("lists_shared", "state_shared", "workspace"):
        os.environ["VISPRUNER_DEDUP_PLAN"] = plan
        for sort in ("buckets", "counting"):  # the long one is merged if it has no buckets
            os.environ["VISPRUNER_SORT_PLAN"] = sort
            vispruner_cuda.prune(random(2, 200, 64), random(2, 200), 20)
            vispruner_cuda.prune(random(1, 1100, 16), random(1, 1100), 60, step=250)
    del os.environ["VISPRUNER_SORT_PLAN"]
    for n in (300, 1100):  # all alike: crowded buckets, which give way to counting and merging
        vispruner_cuda.prune(random(1, 1, 16).expand(1, n, 16), random(1, n), 60, step=100)
    os.environ["VISPRUNER_LAUNCH"] = "dependent"
    for tokens, tiles in (("8", "32"), ("32", "64"), ("32", "128")):
        os.environ["VISPRUNER_RANK_PLAN"] = f"tokens_{tokens}"
        os.environ["VISPRUNER_GRAM_PLAN"] = f"tiles_{tiles}"
        vispruner_cuda.prune(random(2, 161, 200), random(2, 161), 20)
        vispruner_cuda.pairwise_cosine(random(2, 161, 200))
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
