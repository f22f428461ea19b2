"""Computes the number of users that fit on a GPU, by retained tokens: results/capacity.json.

Nothing is measured. Weights are counted on models without memory, and the KV cache follows from
layers, key/value heads and tokens; both come from the published configurations in
`vispruner.shapes`.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from typing import Any

import provenance

from vispruner import flops, shapes
from vispruner.models import family_of
from vispruner.selection import Budget

GPU_BYTES = 80e9
UTILIZATION = 0.9  # vLLM's default of --gpu-memory-utilization
RESERVE_BYTES = 4e9  # activations, CUDA graphs, communication
TEXT_TOKENS = 384  # prompt and answer per user
USERS = (1_000, 10_000)
SHARES = (1.0, 1 / 3, 1 / 9, 1 / 18)


@dataclass(frozen=True)
class Case:
    """A published model and an image.

    Attributes:
        shape: name in `vispruner.shapes`; hub: name on the model hub.
        width, height: pixels of the image; image: its description in the table.
        tokens: per tile, for models that prune each tile separately.
    """

    shape: str
    hub: str
    width: int
    height: int
    image: str
    tokens: int | None = None


CASES = (
    Case("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf", 336, 336, "any image"),
    Case("llava-next-7b", "llava-hf/llava-v1.6-vicuna-7b-hf", 672, 672, "672 x 672", 576),
    Case("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", 1920, 1080, "1920 x 1080"),
    Case("qwen3-vl-8b", "Qwen/Qwen3-VL-8B-Instruct", 1920, 1080, "1920 x 1080"),
)


def visual_tokens(case: Case, config: Any, model: Any) -> list[int]:
    """Visual tokens of the image for each of SHARES, the first one unpruned."""
    family = family_of(model)
    options = {"tiles": "all"} if case.tokens else {}  # as the vLLM plugin prunes
    inputs = shapes.picture(config, case.height, case.width)
    (whole,) = family(model, Budget(k=1)).placeholders("image", inputs)
    counts = [whole]
    for share in SHARES[1:]:
        budget = Budget(k=max(1, round(share * (case.tokens or whole))))
        counts += family(model, budget, **options).kept("image", inputs)
    return counts


def row(visual: int, kv_bytes: int, weights: int) -> dict[str, Any]:
    """The result for one number of retained tokens.

    Args:
        kv_bytes: per token; weights: bytes.
    """
    sequence = (visual + TEXT_TOKENS) * kv_bytes
    room = GPU_BYTES * UTILIZATION - RESERVE_BYTES - weights
    users = int(room // sequence)
    return {
        "visual_tokens": visual,
        "kv_bytes_of_the_image": visual * kv_bytes,
        "users_per_gpu": users,
        "gpus": {str(wanted): math.ceil(wanted / users) for wanted in USERS},
    }


def compute() -> dict[str, Any]:
    """The content of capacity.json."""
    models = []
    for case in CASES:
        config = shapes.config_of(case.shape)
        model = shapes.empty_model(config)
        parameters = sum(p.numel() for p in model.parameters())
        inputs = shapes.picture(config, case.height, case.width)
        kv_bytes = flops.cost(config, inputs, [1], text=0).cache_bytes
        visual = visual_tokens(case, config, model)
        models.append(
            {
                "name": case.hub,
                "image": case.image,
                "parameters": parameters,
                "kv_bytes_of_a_token": kv_bytes,
                "rows": [row(count, kv_bytes, 2 * parameters) for count in visual],
            }
        )
    setup = {
        "gpu_bytes": GPU_BYTES,
        "utilization": UTILIZATION,
        "reserve_bytes": RESERVE_BYTES,
        "text_tokens": TEXT_TOKENS,
    }
    return {"setup": setup, "models": models}


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m models.capacity", description=str(__doc__).splitlines()[0]
    ).parse_args()
    print(f"wrote {provenance.write('capacity', compute())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
