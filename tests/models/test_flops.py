"""Operations computed from a configuration equal those that torch counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from support.tiny_models import FAMILIES, Tiny, image
from torch.utils.flop_counter import FlopCounterMode

import vispruner
from vispruner import flops, shapes
from vispruner.models import family_of
from vispruner.selection import Budget

K = 5


def counted(function: Any, *args: Any, **kwargs: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args, **kwargs)
    return counter.get_total_flops()


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param


def test_costs_equal_torchs_counts(tiny: Tiny) -> None:
    model = tiny.build(torch.float32, attention="eager")  # every attention as products
    inputs = tiny.inputs([[1, image(0), 10, 11, 12]])
    prompt = inputs["input_ids"].shape[1]
    family = family_of(model)(model, Budget(k=K), **tiny.options)
    media = family.inputs_of("image", inputs)
    assert media is not None
    visual = family.placeholders("image", media)
    if tiny.name.startswith("qwen3.5"):
        with pytest.raises(ValueError, match="linear attention of qwen3_5"):
            flops.cost(model.config, media, visual, text=prompt - sum(visual))
        assert flops.vision_flops(model.config, media, 0) == pytest.approx(
            counted(model.model.get_image_features, **media), rel=2e-3
        )
        return
    cost = flops.cost(model.config, media, visual, text=prompt - sum(visual), new=3)

    vision = counted(model.model.get_image_features, **media)
    everything = counted(model, **inputs, logits_to_keep=1)
    # The counter includes the products for rotary embeddings, a few in ten thousand.
    assert cost.vision == pytest.approx(vision, rel=2e-3)
    assert cost.prefill == pytest.approx(everything - vision, rel=2e-3)

    answer = {"do_sample": False, "suppress_tokens": [198, 199]}
    whole = counted(model.generate, **inputs, **answer, max_new_tokens=3)
    assert cost.decode == pytest.approx(whole - everything, rel=2e-3)
    cache = model.generate(
        **inputs, **answer, max_new_tokens=1, return_dict_in_generate=True
    ).past_key_values
    layers = cache.layers
    assert 2 * cost.cache_bytes == sum(
        x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values)
    )

    with vispruner.apply(model, k=K, **tiny.options) as pruner:
        pruned = counted(model.generate, **inputs, **answer, max_new_tokens=1)
    assert pruner.last is not None
    kept = pruner.last.tokens_after
    cost = flops.cost(
        model.config, media, [kept], text=prompt - sum(visual),
        projected=family.projected("image", media),
    )  # fmt: skip
    assert cost.vision + cost.prefill == pytest.approx(pruned, rel=2e-3)


@pytest.mark.parametrize("name", shapes.MODELS)
def test_published_shapes(name: str) -> None:
    config = shapes.config_of(name)
    model = shapes.empty_model(config)
    family = family_of(model)(model, Budget(k=64))
    inputs = shapes.picture(config, 672, 672)
    before, after = family.placeholders("image", inputs), family.kept("image", inputs)
    # From the papers and processors: 24 x 24; 5 tiles of them and 48 line ends; 27 x 27 and four
    # tiles of them with 54 line ends; 672 / 28 squared; 672 / 32 squared.
    want = {"llava-1.5": 576, "llava-next": 2928, "qwen2": 576, "qwen3": 441}
    known = next((n for start, n in want.items() if name.startswith(start)), None)
    assert known is None or before == [known]
    assert after[0] < before[0]
    parameters = sum(p.numel() for p in model.parameters())
    billions = float(name.rsplit("-", 1)[1].removesuffix("b"))
    assert 0.95 * billions < parameters / 1e9 < 1.2 * billions


def test_paper_accounting_of_llava() -> None:
    config = shapes.config_of("llava-1.5-7b")
    share = {k: flops.visual_only_flops(config, k) / flops.visual_only_flops(config, 576)
             for k in (64, 53)}  # fmt: skip
    assert share[64] == pytest.approx(0.108, abs=1e-3)
    assert share[53] == pytest.approx(0.09, abs=1e-3)


def test_long_answers_are_summed_over_their_tokens() -> None:
    config = shapes.config_of("llava-1.5-7b")
    inputs = shapes.picture(config, 336, 336)

    def decode(prompt: int, new: int) -> int:
        return flops.cost(config, inputs, [prompt], text=1, new=new).decode

    assert decode(576, 1) == 0
    assert decode(576, 9) == sum(decode(576 + n, 2) for n in range(8))
    assert decode(576, 2**31) > 2**31 * decode(576, 2)  # at once, not token by token


def test_names_and_types_that_are_not_known() -> None:
    with pytest.raises(ValueError, match=r"no model named 'gpt', there are: llava-1\.5-7b"):
        shapes.config_of("gpt")
    config = shapes.config_of("llava-1.5-7b").text_config
    with pytest.raises(ValueError, match=r"model type 'llama' is not known, only gemma3, .*llava"):
        shapes.picture(config, 336, 336)


def test_numbers_in_the_documentation() -> None:
    config = shapes.config_of("llava-1.5-7b")
    inputs = shapes.picture(config, 336, 336)
    whole = flops.cost(config, inputs, [576], text=64)
    pruned = flops.cost(config, inputs, [64], text=64, projected=64)
    text = (Path(__file__).resolve().parents[2] / "docs" / "integration.md").read_text()
    for before, after in (
        (whole.visual_only, pruned.visual_only),
        (whole.prefill, pruned.prefill),
        (whole.prefill + whole.vision, pruned.prefill + pruned.vision),
    ):
        less = 100 * (after / before - 1)
        assert f"| {before / 1e12:.2f} T | {after / 1e12:.2f} T | {less:.0f} % |" in text
    assert f"{whole.cache_bytes >> 20} to {pruned.cache_bytes >> 20} MiB" in text
