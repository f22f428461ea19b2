"""A small but complete set of calls for compute-sanitizer: all kernels, plans, dtypes, odd sizes.

compute-sanitizer --tool memcheck python benchmarks/verify/sanitize.py

Inputs are computed on the CPU: gpu_check.sh has the tools watch the kernels of this library only,
and what another kernel wrote would be uninitialized memory to initcheck. It knows of copies.
"""

from __future__ import annotations

import torch

import vispruner_cuda
from vispruner_cuda import plans

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).cuda()


def main() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        feats, attn = random(3, 131, 33, dtype=dtype), random(3, 2, 131, dtype=dtype)
        vispruner_cuda.prune(feats, attn, 17)
        vispruner_cuda.prune(feats[:, 1:], attn[..., 1:], 130, important_ratio=1.0)
        vispruner_cuda.dedup(feats, 65, step=3)
        vispruner_cuda.pairwise_cosine(feats)
        vispruner_cuda.topk(attn, 9)
        vispruner_cuda.cls_attention(feats[:, :2], random(3, 2, 131, 33, dtype=dtype), 0.2)
        packed = random(150, 3, 72, dtype=dtype)
        vispruner_cuda.received_attention(packed, packed, 0.1, [0, 70, 70, 150])
        vispruner_cuda.received_attention(packed, packed, 0.1, lse=torch.full((3, 150), 5.0).cuda())
    vispruner_cuda.prune_varlen(
        random(400, 64), random(4, 400), [0, 1, 200, 200, 329, 400], [3, 20, 1, 128, 99]
    )
    for dedup in plans.choices()["dedup"]:
        for sort in plans.choices()["sort"]:  # without buckets, a long list is merged
            with plans.use(dedup=dedup, sort=sort):
                vispruner_cuda.prune(random(2, 200, 64), random(2, 200), 20)
                if dedup != "lists_shared":  # 1070 tokens are too many for most GPUs
                    vispruner_cuda.prune(random(1, 1100, 16), random(1, 1100), 60, step=250)
    for n in (300, 1100):  # equal tokens: full buckets, so A is counted or merged
        vispruner_cuda.prune(random(1, 1, 16).expand(1, n, 16), random(1, n), 60, step=100)
    for neighbours in plans.choices()["neighbours"]:
        with plans.use(neighbours=neighbours):
            vispruner_cuda.prune(random(2, 200, 64), random(2, 200), 20)
    launch = plans.choices()["launch"][-1]  # dependent, if the GPU supports it
    for rank in plans.choices()["rank"]:
        for gram in plans.choices()["gram"]:
            with plans.use(rank=rank, gram=gram, launch=launch):
                vispruner_cuda.prune(random(2, 161, 200), random(2, 161), 20)
                vispruner_cuda.pairwise_cosine(random(2, 161, 200))
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
