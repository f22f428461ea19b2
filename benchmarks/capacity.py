"""Computes how many users fit on a GPU for each number of retained tokens, into capacity.json.

Nothing is measured: weights are counted on models without memory, made of the published shapes, and
the KV cache follows from the layers, key/value heads and tokens of a sequence.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import provenance
import torch
import transformers

GPU_BYTES = 80e9
UTILIZATION = 0.9  # vLLM's default of --gpu-memory-utilization
RESERVE_BYTES = 4e9  # activations, CUDA graphs, communication
TEXT_TOKENS = 384  # prompt and answer of a user
USERS = (1_000, 10_000)
SHARES = (1.0, 1 / 3, 1 / 9, 1 / 18)


@dataclass(frozen=True)
class Model:
    """A published model.

    Attributes:
        name: on the model hub.
        image: what its row is computed for.
        pictures: pictures (tiles) of that image; tokens: visual tokens of each.
        whole: visual tokens of the unpruned image, if not pictures * tokens.
        make: the model, on the meta device.
        layers, kv_heads, head_dim: of the language model.
    """

    name: str
    image: str
    pictures: int
    tokens: int
    make: Callable[[], Any]
    layers: int
    kv_heads: int
    head_dim: int = 128
    whole: int | None = None

    def visual_tokens(self, share: float) -> int:
        """Tokens of the image where each picture keeps a share of its own."""
        if share == 1:
            return self.whole or self.pictures * self.tokens
        return self.pictures * max(1, round(share * self.tokens))

    @property
    def kv_bytes(self) -> int:
        """Of one token, in 16 bits: keys and values of every layer."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


def _clip() -> Any:
    return transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14,
    )  # fmt: skip


def _vicuna() -> Any:
    return transformers.LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32,
    )  # fmt: skip


def _llava() -> Any:
    config = transformers.LlavaConfig(vision_config=_clip(), text_config=_vicuna())
    return transformers.LlavaForConditionalGeneration(config)


def _llava_next() -> Any:
    config = transformers.LlavaNextConfig(vision_config=_clip(), text_config=_vicuna())
    return transformers.LlavaNextForConditionalGeneration(config)


def _qwen25() -> Any:
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
    }  # fmt: skip
    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, tie_word_embeddings=False
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3() -> Any:
    vision = {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
        "out_hidden_size": 4096, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }  # fmt: skip
    text = {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128,
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(
        vision_config=vision, text_config=text, tie_word_embeddings=False
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def _merged(height: int, width: int, side: int) -> int:
    """Visual tokens of an image that is resized to whole squares of `side` pixels."""
    return round(height / side) * round(width / side)


MODELS = (
    Model("llava-hf/llava-1.5-7b-hf", "any image", 1, 576, _llava, 32, 32),
    Model(
        "llava-hf/llava-v1.6-vicuna-7b-hf", "672 x 672", 5, 576, _llava_next, 32, 32,
        whole=576 + 48 * (48 + 1),
    ),
    Model(
        "Qwen/Qwen2.5-VL-7B-Instruct", "1920 x 1080", 1, _merged(1080, 1920, 28), _qwen25, 28, 4
    ),
    Model("Qwen/Qwen3-VL-8B-Instruct", "1920 x 1080", 1, _merged(1080, 1920, 32), _qwen3, 36, 8),
)  # fmt: skip


def row(model: Model, weights: int, share: float) -> dict[str, Any]:
    """What one number of retained tokens comes to."""
    visual = model.visual_tokens(share)
    sequence = (visual + TEXT_TOKENS) * model.kv_bytes
    room = GPU_BYTES * UTILIZATION - RESERVE_BYTES - weights
    users = int(room // sequence)
    return {
        "visual_tokens": visual,
        "kv_bytes_of_the_image": visual * model.kv_bytes,
        "users_per_gpu": users,
        "gpus": {str(wanted): math.ceil(wanted / users) for wanted in USERS},
    }


def compute() -> dict[str, Any]:
    """The content of capacity.json."""
    models = []
    for model in MODELS:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in model.make().parameters())
        models.append(
            {
                "name": model.name,
                "image": model.image,
                "parameters": parameters,
                "kv_bytes_of_a_token": model.kv_bytes,
                "rows": [row(model, 2 * parameters, share) for share in SHARES],
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
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(f"wrote {provenance.write('capacity', compute())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
