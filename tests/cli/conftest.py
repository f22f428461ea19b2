"""Tiny checkpoints on disk and a test image, so that every command is fast."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from PIL import Image

NEEDED = ("PIL", "rich", "rich_argparse", "transformers")  # the extra [transformers]
if not all(importlib.util.find_spec(name) for name in NEEDED):
    collect_ignore_glob = ["test_*.py"]

TINY = {
    "image_size": 112,
    "patch_size": 14,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="session")
def tiny_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory: 8 x 8 patches, 4 layers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    directory = tmp_path_factory.mktemp("tower")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # A large factor, because the usual initialization gives nearly uniform attention.
        model = CLIPVisionModel(CLIPVisionConfig(**TINY, initializer_factor=4.0))
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def photo() -> Image.Image:
    """160 x 120 pixels, all patches different."""
    from PIL import Image

    width, height = 160, 120
    image = Image.new("RGB", (width, height))
    image.putdata(
        [(x * 255 // width, y * 255 // height, (7 * x + 13 * y) % 256)
         for y in range(height) for x in range(width)]
    )  # fmt: skip
    return image


WORDS = ("<unk>", "<pad>", "<s>", "</s>", "<image>", "USER", "ASSISTANT", ":", "?", "what", "is")


def _processor(kind: str) -> Any:
    """Resizes images to 112 pixels and splits text into words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*WORDS, *(f"w{i}" for i in range(200 - len(WORDS)))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>",
        eos_token="</s>", additional_special_tokens=["<image>"],
    )  # fmt: skip
    sizes = {"size": {"shortest_edge": 112}, "crop_size": {"height": 112, "width": 112}}
    common = {"patch_size": 14, "vision_feature_select_strategy": "default",
              "num_additional_image_tokens": 1, "image_token": "<image>"}  # fmt: skip
    if kind == "llava":
        images = transformers.CLIPImageProcessorPil(**sizes)
        return transformers.LlavaProcessor(images, fast, **common)
    images = transformers.LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=PINPOINTS)
    return transformers.LlavaNextProcessor(images, fast, **common)


PINPOINTS = [[112, 224], [224, 112], [224, 224]]


def _checkpoint(directory: Path, kind: str) -> Path:
    import transformers

    settings: dict[str, Any] = {
        "vision_config": transformers.CLIPVisionConfig(**TINY),
        "text_config": transformers.LlamaConfig(
            vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, pad_token_id=1, bos_token_id=2, eos_token_id=3,
        ),
        "image_token_id": WORDS.index("<image>"),
    }  # fmt: skip
    if kind == "llava_next":
        settings["image_grid_pinpoints"] = PINPOINTS
    config = transformers.AutoConfig.for_model(kind, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.15)
    model.save_pretrained(directory)
    _processor(kind).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-1.5 checkpoint with its processor: 8 x 8 patches."""
    return _checkpoint(tmp_path_factory.mktemp("llava"), "llava")


@pytest.fixture(scope="session")
def tiny_llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-NeXT checkpoint with its processor: up to 5 tiles of 8 x 8 patches."""
    return _checkpoint(tmp_path_factory.mktemp("llava_next"), "llava_next")


@pytest.fixture
def photo_path(photo: Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    photo.save(path)
    return path
