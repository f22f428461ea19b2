"""What the dedup loop meets on features of several kinds: results/loop_counts.json.

The kernels' design rests on two counts (docs/performance.md), which no clock is needed for:

- in how many rounds a token of A has nobody of B in its neighbour list, by the length of the lists;
- how many tokens share a bucket when A is ranked, by the rule that buckets follow: steps of the
  longest chain that the 32 lanes of a warp walk, on average over the rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import provenance
import torch
import workloads
from rich.console import Console
from rich.progress import track
from torch import Tensor

import vispruner_cuda

STEP = 8
LIST_LENGTHS = (24, 32, 64)
FEW_TOKENS = 96  # A is not put into buckets up to here
SIZES = ((576, 1024, 64), (4096, 256, 410))  # tokens, channels, k


def features(kind: str, tokens: int, channels: int, seed: int) -> Tensor:
    """(N, C)"""
    if kind != "near duplicates":
        return workloads.make_feats(kind, 1, tokens, channels, seed=seed)[0]
    g = torch.Generator().manual_seed(seed)
    originals = torch.randn((tokens // 8, channels), generator=g)
    which = torch.randint(len(originals), (tokens,), generator=g)
    return originals[which] + 0.05 * torch.randn((tokens, channels), generator=g)


def equal_widths(buckets: int) -> Callable[[Tensor, Tensor], Tensor]:
    def bucket(keys: Tensor, before: Tensor) -> Tensor:
        high, low = before.max(), before.min()
        return ((high - keys) / (high - low) * buckets).long().clamp(0, buckets - 1)

    return bucket


def octaves(buckets: int, count: int = 16) -> Callable[[Tensor, Tensor], Tensor]:
    """The rule of csrc/cuda/dedup.cu."""
    shift = 23 - (buckets // count).bit_length() + 1

    def bits(x: Tensor) -> Tensor:
        return x.clamp(min=0).float().view(torch.int32)

    def bucket(keys: Tensor, before: Tensor) -> Tensor:
        first = bits(before.max() - before.min()) - ((count - 1) << 23)
        return ((bits(before.max() - keys) - first) >> shift).clamp(0, buckets - 1).long()

    return bucket


RULES = {
    "equal widths, 1024": equal_widths(1024),
    "16 octaves of 16": octaves(256),
    "16 octaves of 64": octaves(1024),
}


def rounds(cosines: Tensor, diverse: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A, B and the redundancies of A, round by round."""
    left = torch.arange(len(cosines))
    while len(left) > diverse:
        a, b = left[::2], left[1::2]
        keys = cosines[a][:, b].amax(dim=1)
        yield a, b, keys
        drop = min(STEP, len(left) - diverse, len(a))
        order = keys.argsort(descending=True, stable=True)
        left = torch.cat([a[order[drop:]], b])


def longest_chains(buckets: Tensor) -> float:
    """Mean over warps of the most tokens that share a bucket with one of its lanes' tokens."""
    shared = buckets.bincount()[buckets]
    return float(torch.stack([lanes.max() for lanes in shared.split(32)]).float().mean())


def count(feats: Tensor, k: int) -> dict[str, float]:
    """One image whose tokens are in ranking order."""
    diverse = k - k // 2
    cosines = vispruner_cuda.pairwise_cosine(feats[None, k // 2 :])[0]
    cosines.fill_diagonal_(-2.0)
    neighbours = cosines.topk(max(LIST_LENGTHS), dim=1).indices
    scans = dict.fromkeys(LIST_LENGTHS, 0)
    chains: dict[str, list[float]] = {rule: [] for rule in RULES}
    before = None
    total = 0
    for a, b, keys in rounds(cosines, diverse):
        total += 1
        in_b = torch.zeros(len(cosines), dtype=torch.bool)
        in_b[b] = True
        found = in_b[neighbours[a]]
        for length in LIST_LENGTHS:
            scans[length] += int((~found[:, :length].any(dim=1)).any())
        if before is not None and len(a) > FEW_TOKENS:
            for rule, bucket in RULES.items():
                chains[rule].append(longest_chains(bucket(keys, before)))
        before = keys
    counts: dict[str, float] = {"rounds": total}
    counts |= {f"rounds with a scan, lists of {length}": n for length, n in scans.items()}
    counts |= {f"chain, {rule}": sum(own) / len(own) for rule, own in chains.items()}
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8, help="images of each kind and size")
    options = parser.parse_args()
    console = Console(stderr=True)
    cases = [(kind, *size) for size in SIZES for kind in (*workloads.KINDS, "near duplicates")]
    results = []
    for kind, tokens, channels, k in track(cases, "features", console=console):
        own = [
            count(features(kind, tokens, channels, seed), k)
            for seed in range(options.images if tokens < 1000 else max(1, options.images // 8))
        ]
        means = {name: round(sum(c[name] for c in own) / len(own), 1) for name in own[0]}
        case = {"features": kind, "tokens": tokens, "channels": channels, "k": k}
        results.append({**case, "images": len(own), "counts": means})
    path = provenance.write("loop_counts", {"setup": {"step": STEP}, "results": results})
    console.print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
