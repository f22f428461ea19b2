"""A tiny CLIP tower on disk and a photograph, so that the demo runs in a moment."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from PIL import Image

NEEDED = ("PIL", "rich", "transformers")  # the extra [transformers]
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
    """A directory as save_pretrained makes it: 8 x 8 patches, 4 layers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    directory = tmp_path_factory.mktemp("tower")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Far from uniform attention: the initialization of 0.02 leaves it nearly flat.
        model = CLIPVisionModel(CLIPVisionConfig(**TINY, initializer_factor=4.0))
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def photo() -> Image.Image:
    """160 x 120 pixels, no two patches alike."""
    from PIL import Image

    width, height = 160, 120
    image = Image.new("RGB", (width, height))
    image.putdata(
        [(x * 255 // width, y * 255 // height, (7 * x + 13 * y) % 256)
         for y in range(height) for x in range(width)]
    )  # fmt: skip
    return image
