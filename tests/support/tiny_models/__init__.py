"""Tiny random models of every family, with prompts and a separate pruned run.

The separate run does not use `vispruner`: attention weights come from an eager tower, the tokens
from the reference, and the language model runs on the retained embeddings without a cache.
"""

from .base import *  # noqa: F403
from .base import (
    Llava,
    LlavaNext,
    LlavaNextTiles,
    LlavaOnevision,
    LlavaSiglip,
    LlavaWithCls,
    Qwen2,
    Qwen3,
    Qwen25,
    Tiny,
    VideoLlava,
)
from .gemma import Gemma3
from .glm import Glm4v, Glm4vMoe, Glm46V, GlmOcr
from .idefics import Idefics3, SmolVLM
from .internvl import InternVL, InternVLNormed
from .next_video import LlavaNextVideo
from .qwen_more import Qwen3Moe, Qwen35, Qwen35Moe

FAMILIES: tuple[Tiny, ...] = (
    Llava(), LlavaSiglip(), LlavaWithCls(), LlavaNext(), LlavaNextTiles(), LlavaOnevision(),
    VideoLlava(), Qwen2(), Qwen25(), Qwen3(), Qwen3Moe(), Qwen35(), Qwen35Moe(), Glm4v(),
    Glm4vMoe(), Glm46V(), GlmOcr(), LlavaNextVideo(), InternVL(), InternVLNormed(), Gemma3(),
    Idefics3(), SmolVLM(),
)  # fmt: skip
