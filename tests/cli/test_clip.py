"""Features and [CLS] attention from hooks equal those from transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from vispruner.clip import LLAVA_1_5, ClipTower, TowerError

from .conftest import TINY


@pytest.mark.parametrize("feature_layer", [-2, -1, 1])
def test_cues_equal_eager_output(tiny_tower: Path, feature_layer: int) -> None:
    tower = ClipTower.load(str(tiny_tower))
    tower = ClipTower(tower.model, feature_layer)
    assert tower.config._attn_implementation == "sdpa"
    pixels = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    cues = tower.encode(pixels)

    eager = CLIPVisionModel.from_pretrained(tiny_tower, attn_implementation="eager").eval()
    with torch.no_grad():
        want = eager(pixels, output_attentions=True, output_hidden_states=True)
    layer = feature_layer if feature_layer < 0 else feature_layer - 1
    attention = want.attentions[layer][:, :, 0, 1:].mean(dim=1)
    assert attention.std() > 1e-4  # not uniform, otherwise the test would be meaningless
    torch.testing.assert_close(cues.scores, attention, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        cues.feats, want.hidden_states[feature_layer][:, 1:], atol=1e-4, rtol=1e-4
    )
    assert cues.scores.shape == (2, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tower(tiny_tower: Path, dtype: torch.dtype) -> None:
    cues = ClipTower.load(str(tiny_tower), dtype=dtype).encode(
        torch.zeros(1, 3, 112, 112, dtype=dtype)
    )
    assert cues.feats.dtype == dtype
    assert cues.scores.dtype == torch.float32


def test_two_passes_do_not_mix(tiny_tower: Path) -> None:
    tower = ClipTower.load(str(tiny_tower))
    pixels = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(2))
    first, second = tower.encode(pixels[:1]), tower.encode(pixels[1:])
    both = tower.encode(pixels)
    torch.testing.assert_close(torch.cat([first.feats, second.feats]), both.feats)


def test_vision_half_of_a_whole_clip_model(tmp_path: Path) -> None:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 9}
    text |= {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    CLIPModel(CLIPConfig(vision_config=TINY, text_config=text)).save_pretrained(tmp_path)
    assert ClipTower.load(str(tmp_path)).grid == (8, 8)


def test_shape_of_a_random_tower() -> None:
    tower = ClipTower.random(**TINY)
    assert tower.grid == (8, 8)
    assert len(tower.model.state_dict()) == len(ClipTower.random(**TINY).model.state_dict())
    grid = LLAVA_1_5["image_size"] // LLAVA_1_5["patch_size"]
    assert grid * grid == 576


def test_seed_of_a_random_tower() -> None:
    pixels = torch.zeros(1, 3, 112, 112)
    state = torch.random.get_rng_state()
    one, again, other = (ClipTower.random(seed=s, **TINY).encode(pixels).feats for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_missing_weights_are_an_error_and_not_random(tiny_tower: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_tower / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.2.self_attn.q_proj.weight"))
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_tower / "config.json").read_text())
    with pytest.raises(TowerError, match=r"lacks 1 of its weights.*q_proj\.weight"):
        ClipTower.load(str(tmp_path))


@pytest.mark.parametrize("feature_layer", [0, -5, 5, 99])
def test_missing_layer(tiny_tower: Path, feature_layer: int) -> None:
    model = ClipTower.load(str(tiny_tower)).model
    with pytest.raises(TowerError, match="feature layer"):
        ClipTower(model, feature_layer)
