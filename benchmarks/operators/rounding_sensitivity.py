"""Measures how much of the selection survives a rounding error: results/rounding_sensitivity.json.

Runs the eager loop of the method (baselines.py) in float64, in float32, in float32 with the
channels in reversed order (the same sums in another order) and in bfloat16, and the canonical
numerics of this project, all on the same features, and compares the retained tokens:

- agreement with the float64 loop, of the important and of the diverse half, and the share of
  images with identical results;
- coverage: the mean over dropped tokens of the best cosine to a retained one (float64), which the
  loop is meant to maximize, compared with a random choice of the diverse half.

Features are random, clustered, smooth, and those of drawn scenes in the embedded model's tower.
One ninth of the tokens is retained, like 64 of LLaVA-1.5's 576.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import provenance
import torch
import torch.nn.functional as F
from numeric import positive
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import vispruner_cuda

from . import baselines, workloads

FEATURES = ("random", "clustered", "smooth")
RATIO = 0.5
SHARE = 1 / 9  # of the tokens is retained
BASE = "loop, float64"


def _loop(dtype: torch.dtype, reverse: bool = False) -> Callable[[Tensor, Tensor, int], Tensor]:
    def run(feats: Tensor, scores: Tensor, k: int) -> Tensor:
        x = feats.flip(-1) if reverse else feats
        return baselines.prune_one(x.to(dtype), scores, k, RATIO)

    return run


def _canonical(feats: Tensor, scores: Tensor, k: int) -> Tensor:
    return vispruner_cuda.prune(feats[None], scores[None], k, important_ratio=RATIO).indices[0]


def _canonical_shuffled(feats: Tensor, scores: Tensor, k: int) -> Tensor:
    """Reversed channels and a batch of three: the operator's answer may not change."""
    batch = feats.flip(-1).expand(3, -1, -1)
    kept = vispruner_cuda.prune(batch, scores.expand(3, -1), k, important_ratio=RATIO)
    return kept.indices[2]


VARIANTS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    BASE: _loop(torch.float64),
    "loop, float32": _loop(torch.float32),
    "loop, float32, channels reversed": _loop(torch.float32, reverse=True),
    "loop, bfloat16": _loop(torch.bfloat16),
    "canonical v1": _canonical,
    "canonical v1, channels reversed, in a batch": _canonical_shuffled,
}
RANDOM = "random diverse half"


def _share(a: set[int], b: set[int]) -> float:
    return len(a & b) / max(1, len(a))


def coverage(feats: Tensor, retained: Tensor) -> float:
    """Mean over dropped tokens of the best cosine to a retained one."""
    unit = F.normalize(feats.double(), dim=-1)
    dropped = torch.ones(len(feats), dtype=torch.bool)
    dropped[retained] = False
    return float((unit[dropped] @ unit[retained].T).amax(dim=1).mean())


def compare(feats: Tensor, scores: Tensor, k: int, seed: int) -> dict[str, dict[str, float]]:
    """All variants on one image."""
    k_important = int(k * RATIO)
    ranking = scores.argsort(descending=True, stable=True)
    important = set(ranking[:k_important].tolist())
    kept = {name: run(feats, scores, k) for name, run in VARIANTS.items()}
    generator = torch.Generator().manual_seed(seed)
    others = ranking[k_important:]
    drawn = others[torch.randperm(len(others), generator=generator)[: k - k_important]]
    kept[RANDOM] = torch.cat([ranking[:k_important], drawn])

    base = set(kept[BASE].tolist())
    canonical = set(kept["canonical v1"].tolist())
    found = {}
    for name, indices in kept.items():
        tokens = set(indices.tolist())
        found[name] = {
            "important_agreement": _share(important & base, tokens),
            "diverse_agreement": _share(base - important, tokens),
            "diverse_agreement_with_canonical": _share(canonical - important, tokens),
            "identical": float(tokens == base),
            "coverage": coverage(feats, indices),
        }
    return found


def synthetic(kind: str, images: int) -> Iterator[tuple[Tensor, Tensor]]:
    for image in range(images):
        feats = workloads.make_feats(kind, 1, 576, 1024, seed=image)[0]
        yield feats, workloads.make_attention(1, 576, seed=image)[0].mean(dim=0)


def drawn_scenes(images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Patch features and scores of scenes in the embedded model's trained tower."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from vispruner import embedded
    from vispruner.clip import ClipTower
    from vispruner.embedded import scenes

    model: Any = LlavaForConditionalGeneration.from_pretrained(embedded.path(), dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(embedded.path()).image_processor
    tower = ClipTower(model.model.vision_tower.eval(), model.config.vision_feature_layer)
    for seed in range(images):
        scene = scenes.draw(seed, split="numerics").image
        cues = tower.encode(processor(images=scene, return_tensors="pt")["pixel_values"])
        yield cues.feats[0], cues.scores[0]


def mean(rows: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Rows of the table: each variant's means over the images."""
    table: list[dict[str, Any]] = []
    for name in rows[0]:
        values = {
            key: round(sum(row[name][key] for row in rows) / len(rows), 4) for key in rows[0][name]
        }
        table.append({"variant": name, **values})
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m operators.rounding_sensitivity",
        description=str(__doc__).splitlines()[0],
    )
    parser.add_argument("--images", type=positive, default=32, help="images per kind")
    parser.add_argument("--quick", action="store_true", help="2 images per kind, no file")
    options = parser.parse_args(arguments)
    images = 2 if options.quick else options.images
    sources = {kind: synthetic(kind, images) for kind in FEATURES}
    sources["drawn scenes"] = drawn_scenes(images)

    console = Console(stderr=True)
    results = []
    with Progress(console=console) as progress:
        task = progress.add_task("", total=images * len(sources))
        for kind, source in sources.items():
            progress.update(task, description=f"{kind:<12}")
            rows = []
            for image, (feats, scores) in enumerate(source):
                tokens, channels = feats.shape
                k = round(tokens * SHARE)
                rows.append(compare(feats, scores, k, seed=image))
                progress.advance(task)
            shape = {"tokens": tokens, "channels": channels, "k": k}
            results.append({"features": kind, "images": len(rows), **shape, "variants": mean(rows)})
    for result in results:
        console.print(f"{result['features']}, {result['images']} images")
        variants: Any = result["variants"]
        for row in variants:
            numbers = "  ".join(f"{x:6.3f}" for x in row.values() if isinstance(x, float))
            console.print(f"  {row['variant']:<46}{numbers}")
    if not options.quick:
        setup = {"important_ratio": RATIO}
        path = provenance.write("rounding_sensitivity", {"setup": setup, "results": results})
        console.print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
