"""The comparison can fail: each change of a kernel below is noticed.

A copy of csrc is changed in one place, built and compared with the reference like the real one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import environment, host_kernels


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str


BARRIER = "__syncthreads();"
MUTATIONS = [
    Mutation(
        "ranking: no barrier before the tile is read",
        "cuda/rank.cu",
        "        tile[i] = score_key(attention, image.first_attention, base + i);\n      }\n"
        f"      {BARRIER}",
        "        tile[i] = score_key(attention, image.first_attention, base + i);\n      }\n",
    ),
    Mutation(
        "ranking: ties go to the higher token",
        "cuda/rank.cu",
        "(base + i >= token ? 1u : 0u)",
        "(base + i <= token ? 1u : 0u)",
    ),
    Mutation(
        "score: the other heads in the opposite order",
        "cuda/rank.cu",
        "(int64_t h = 1; h < view.heads; ++h)",
        "(int64_t h = view.heads - 1; h > 0; --h)",
    ),
    Mutation(
        "quantization: one level less",
        "include/vispruner/numerics.h",
        "kQuantMax = 2047.0f",
        "kQuantMax = 2046.0f",
    ),
    Mutation(
        "quantization: digits of another split",
        "cuda/rank.cu",
        "kBias = 32 * 64 + 32",
        "kBias = 32 * 64",
    ),
    Mutation(
        "Gram: low digits forgotten",
        "include/vispruner/numerics.h",
        "- int64_t{63} * ll",
        "- int64_t{64} * ll",
    ),
    Mutation(
        "Gram: the stage is read before it is complete",
        "cuda/gram.cu",
        f"    {BARRIER}  // the stage is here for all, and the one before it is free\n",
        "",
    ),
    Mutation(
        "neighbours: the greatest key of each lane is left out",
        "cuda/neighbours.cu",
        "keys[v] >= threshold || (ties > 0",
        "(keys[v] >= threshold && keys[v] != most) || (ties > 0",
    ),
    Mutation(
        "neighbours: the list is read before it is complete",
        "cuda/neighbours.cu",
        "  meet<kWarps>();\n  const int count",
        "  const int count",
    ),
    Mutation(
        "dedup: no barrier between look-up and sorting",
        "cuda/dedup.cu",
        "if (__syncthreads_or(left)) {",
        "if (left) {",
    ),
    Mutation(
        "dedup: sorting does not wait for the scans",
        "cuda/dedup.cu",
        f"      {BARRIER}\n      if (threadIdx.x == 0) *shared.missing = 0;",
        "      if (threadIdx.x == 0) *shared.missing = 0;",
    ),
    Mutation(
        "dedup: tokens stay in B that were there two rounds ago",
        "cuda/dedup.cu",
        "round.next_in_b[w] = 0;",
        "round.next_in_b[w] |= 0;",
    ),
    Mutation(
        "dedup: ties are not stable",
        "cuda/dedup.cu",
        "(other >= p ? 1u : 0u)",
        "(other <= p ? 1u : 0u)",
    ),
    Mutation(
        "dedup: the tokens of a bucket are not told apart",
        "cuda/dedup.cu",
        "rank += beats(state, other, key, p);\n      other",
        "rank += other < p;\n      other",
    ),
    Mutation(
        "dedup: buckets do not wait for their counts to be summed",
        "cuda/dedup.cu",
        "if (__syncthreads_or(crowded)) return false;",
        "if (crowded) return false;",
    ),
    Mutation(
        "dedup: buckets count among those before them",
        "cuda/dedup.cu",
        "if (lane > b / kWarp) atomicAdd",
        "if (lane >= b / kWarp) atomicAdd",
    ),
    Mutation(
        "dedup: a lower key falls into an earlier bucket",
        "cuda/dedup.cu",
        "max(high - key_float(key), 0.0f)",
        "max(key_float(key), 0.0f)",
    ),
    Mutation(
        "dedup: merging forgets stability",
        "cuda/dedup.cu",
        "(uint64_t{~key} << 32) | static_cast<uint32_t>(p)",
        "(uint64_t{~key} << 32) | (0xffffu - static_cast<uint32_t>(p))",
    ),
    Mutation(
        "dedup: B is not scanned when the list runs out",
        "cuda/dedup.cu",
        "for (int b = 2 * lane + 1; b < round.n; b += 2 * kWarp)",
        "for (int b = 2 * lane + 1; b < 2; b += 2 * kWarp)",
    ),
    Mutation(
        "gather: 4-byte copies of rows of odd length",
        "cuda/gather.cu",
        "} else if (misaligned % 4 == 0) {",
        "} else if (misaligned % 2 == 0) {",
    ),
    Mutation(
        "gather: does not wait for the kernel before it",
        "cuda/gather.cu",
        "  begin_dependent();\n",
        "",
    ),
    Mutation(
        "Gram: the tiles beside the diagonal are not mirrored",
        "cuda/gram.cu",
        "if (i < column0) {",
        "if (i + S::kRows < column0) {",
    ),
    Mutation(
        "Gram: the sum of two digits carries into the next byte",
        "cuda/gram.cu",
        "((a & ~kSigns) + (b & ~kSigns)) ^ ((a ^ b) & kSigns)",
        "a + b",
    ),
    Mutation(
        "[CLS] attention: no barrier before the weights are made",
        "cuda/cls_attention.cu",
        f"  {BARRIER}  // the dots are there, too\n",
        "",
    ),
    Mutation(
        "[CLS] attention: its own column is not dropped",
        "cuda/cls_attention.cu",
        "if (t > 0) out[t - 1] = static_cast<float>(dots[t] / sum);",
        "if (t < patches) out[t] = static_cast<float>(dots[t] / sum);",
    ),
    Mutation(
        "received attention: a tile is read before it is complete",
        "cuda/received_attention.cu",
        f"    {BARRIER}  // this tile is here for all, and the one before it is free\n",
        "",
    ),
    Mutation(
        "received attention: two of the four lanes of a row are forgotten",
        "cuda/received_attention.cu",
        "for (int offset = 1; offset < 4; offset *= 2)",
        "for (int offset = 1; offset < 2; offset *= 2)",
    ),
    Mutation(
        "received attention: columns beyond the last token count",
        "cuda/received_attention.cu",
        "tile_sum += first_column + 8 * n + c < tokens ? weight : 0.0f;",
        "tile_sum += weight;",
    ),
]


def verdict(module: Path) -> str:
    """What support/agreement.py finds, in a process of its own: a changed kernel may crash."""
    done = subprocess.run(
        [sys.executable, "-m", "support.agreement", str(module)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Workbench:
    """A copy of csrc that is changed, built incrementally and restored."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.csrc = directory / "csrc"
        shutil.copytree(host_kernels.ROOT / "csrc", self.csrc)

    def verdict(self) -> str:
        return verdict(host_kernels.build(self.csrc, self.directory / "build"))


@pytest.fixture(scope="module")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    bench = Workbench(tmp_path_factory.mktemp("mutations"))
    assert bench.verdict() == "agrees"  # unchanged
    return bench


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation_is_noticed(mutation: Mutation, workbench: Workbench) -> None:
    file = workbench.csrc / mutation.file
    original = file.read_text()
    assert original.count(mutation.old) == 1, "the place to change has moved"
    try:
        file.write_text(original.replace(mutation.old, mutation.new))
        assert workbench.verdict() != "agrees"
    finally:
        file.write_text(original)
