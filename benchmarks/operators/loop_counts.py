"""Counts the work of the dedup loop on features of several kinds: results/loop_counts.json.

The kernels' design rests on two counts (docs/performance.md), which need no clock:

- the number of rounds in which a token of A has no token of B in its neighbour list, by list
  length;
- the number of tokens that share a bucket when A is ranked, by bucket rule: steps of the longest
  chain that the 32 lanes of a warp walk, averaged over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence

import provenance
import torch
from numeric import positive
from rich.console import Console
from rich.progress import track
from torch import Tensor

import vispruner_cuda

from . import workloads

STEP = 8
LIST_LENGTHS = (24, 32, 64)
FEW_TOKENS = 96  # up to here A is not put into buckets
SIZES = ((576, 1024, 64), (4096, 256, 410))  # tokens, channels, k


def equal_widths(buckets: int) -> Callable[[Tensor, Tensor], Tensor]:
    def bucket(keys: Tensor, before: Tensor) -> Tensor:
        high, low = before.max(), before.min()
        return ((high - keys) / (high - low) * buckets).long().clamp(0, buckets - 1)

    return bucket


def octaves(buckets: int, count: int = 16) -> Callable[[Tensor, Tensor], Tensor]:
    """The rule of csrc/cuda/methods/vispruner.cu."""
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
    """Mean over warps of the largest bucket that one of its lanes' tokens is in."""
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
    counts |= {f"chain, {rule}": statistics.mean(lengths) for rule, lengths in chains.items()}
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m operators.loop_counts", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--images", type=positive, default=8, help="images per kind and size")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    cases = [(kind, *size) for size in SIZES for kind in workloads.KINDS]
    results = []
    for kind, tokens, channels, k in track(cases, "features", console=console):
        counts = [
            count(workloads.make_feats(kind, 1, tokens, channels, seed)[0], k)
            for seed in range(options.images if tokens < 1000 else max(1, options.images // 8))
        ]
        means = {name: round(sum(c[name] for c in counts) / len(counts), 1) for name in counts[0]}
        case = {"features": kind, "tokens": tokens, "channels": channels, "k": k}
        results.append({**case, "images": len(counts), "counts": means})
    path = provenance.write("loop_counts", {"setup": {"step": STEP}, "results": results})
    console.print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
