"""Invalid input: a clear error before anything is computed, and an unchanged model."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from support import tiny_models
from support.tiny_models import (
    IMAGE,
    Glm4v,
    Idefics3,
    InternVL,
    Llava,
    LlavaNext,
    LlavaNextVideo,
    LlavaOnevision,
    Qwen25,
    Tiny,
    VideoLlava,
    image,
    llama,
    video,
)

import vispruner
from vispruner.models import Encoded, Family
from vispruner.models.llava import Llava as LlavaFamily
from vispruner.models.qwen_vl_v1 import resampled_scores
from vispruner.models.refused import REFUSED

FAMILIES: tuple[Tiny, ...] = (Llava(), LlavaNext(), Qwen25(), VideoLlava())
TOWERS: tuple[Tiny, ...] = (Llava(), LlavaNext(), LlavaOnevision(), InternVL(), VideoLlava())
ROW = [1, 20, image(1), 22, image(2), 24, 25]


def untouched(model: Any) -> None:
    assert "generate" not in vars(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    vispruner.apply(model, k=5).remove()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of k and ratio"),
        ({"k": 5, "ratio": 0.5}, ValueError, "exactly one of k and ratio"),
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": -3}, ValueError, "k must be at least 1"),
        ({"k": 2.5}, TypeError, "k must be an int"),
        ({"k": True}, TypeError, "k must be an int"),
        ({"k": "5"}, TypeError, "k must be an int"),
        ({"ratio": 0.0}, ValueError, r"ratio must be in \(0, 1\]"),
        ({"ratio": 1.5}, ValueError, r"ratio must be in \(0, 1\]"),
        ({"ratio": float("nan")}, ValueError, r"ratio must be in \(0, 1\]"),
        ({"ratio": "all"}, TypeError, "ratio must be a float"),
        ({"k": 5, "important_ratio": 1.5}, ValueError, "important_ratio"),
        ({"k": 5, "step": 0}, ValueError, "step must be at least 1"),
        ({"k": 5, "step": 2**63}, ValueError, "step must be at most 9223372036854775807, got 92"),
        ({"ratio": 10**400}, ValueError, r"ratio must be in \(0, 1\], got 1000"),
        ({"k": torch.ones(2, 2).numpy()}, TypeError, r"k must be .* got numpy.ndarray of shape"),
        ({"k": 5, "method": "divprune"}, ValueError, "method must be one of vispruner, topk"),
        ({"k": 5, "method": 3}, TypeError, "method must be a str"),
        (
            {"k": vispruner.Budget(5, method="topk"), "method": "vispruner"},
            ValueError,
            "pass only the Budget",
        ),
        ({"k": 5, "method": "mmr", "step": 4}, ValueError, "step is a parameter of method vispr"),
        ({"k": 5, "seed": 1}, ValueError, "seed is a parameter of method random"),
        ({"k": 5, "method": "scope", "scope_alpha": 0.3}, ValueError, "a multiple of 0.25"),
        ({"k": 5, "method": "mmr", "mmr_lambda": -1.0}, ValueError, r"in \[0, 100\], got -1.0"),
        ({"k": 5, "tiles": "all"}, ValueError, "tiles='all' is not an option of llava"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Llava().build()
    with pytest.raises(error, match=message) as raised:
        vispruner.apply(model, **arguments)
    assert "\n" not in str(raised.value)
    untouched(model)


def test_bad_layout_of_tiles() -> None:
    tiny = LlavaNext()
    model = tiny.build()
    with pytest.raises(ValueError, match="tiles must be one of unpad, all"):
        vispruner.apply(model, k=5, tiles="some")
    untouched(model)
    with vispruner.apply(model, k=36, tiles="all"), pytest.raises(ValueError, match="lower k"):
        model(**tiny.inputs([[1, image(0), 10]]))


def test_twice() -> None:
    model = Llava().build()
    pruner = vispruner.apply(model, k=5)
    with pytest.raises(ValueError, match="already pruned"):
        vispruner.apply(model, k=6)
    assert model._vispruner_pruner is pruner
    pruner.remove()
    untouched(model)


def test_a_budget_that_is_set_later() -> None:
    """It would be ignored."""
    model = Llava().build()
    with vispruner.apply(model, k=5) as pruner:
        with pytest.raises(AttributeError, match=r"budget cannot be set, .* call remove\(\)"):
            pruner.budget = vispruner.Budget(k=20)
        with pytest.raises(AttributeError):
            pruner.budget.k = 20  # type: ignore[misc]
        assert pruner.budget.k == 5
    untouched(model)


@pytest.mark.parametrize("family", [Llava(), LlavaNext(), Qwen25()], ids=lambda one: one.name)
def test_scores_without_weights_cannot_be_checked(family: Tiny) -> None:
    model = family.build().to("meta")
    with pytest.raises(vispruner.UnsupportedModelError, match=r"check=True .* omit check=True"):
        vispruner.apply(model, k=5, check=True)
    untouched(model)


def test_grids_in_a_list() -> None:
    tiny = Qwen25()
    model, inputs = tiny.build(), tiny.inputs([ROW])
    inputs["image_grid_thw"] = inputs["image_grid_thw"].tolist()
    with (
        vispruner.apply(model, k=5),
        pytest.raises(ValueError, match="image_grid_thw must be a te"),
    ):
        model(**inputs)


def test_unknown_models_and_parts_of_models() -> None:
    text = transformers.LlamaForCausalLM(llama(num_hidden_layers=1))
    with pytest.raises(vispruner.UnsupportedModelError, match=r"llava.*qwen2_vl.*register"):
        vispruner.apply(text, k=5)
    with pytest.raises(vispruner.UnsupportedModelError, match="Supported"):
        vispruner.apply(torch.nn.Linear(2, 2), k=5)
    with pytest.raises(vispruner.UnsupportedModelError, match="whole"):
        vispruner.apply(Llava().build().model, k=5)


def test_models_that_are_refused_by_name() -> None:
    for model_type, reason in REFUSED.items():
        config = type("Config", (), {"model_type": model_type})()
        model = type("SomeModel", (), {"config": config})()
        with pytest.raises(vispruner.UnsupportedModelError) as caught:
            vispruner.apply(model, k=5)
        assert str(caught.value) == (
            f"cannot prune a SomeModel (model type {model_type!r}): {reason}"
        )
        assert model_type not in vispruner.supported()


def test_settings_of_families_that_are_refused() -> None:
    video = LlavaNextVideo()
    config = video.config()
    config.spatial_pool_mode = "conv"
    with pytest.raises(vispruner.UnsupportedModelError, match="spatial_pool_mode='conv'"):
        vispruner.apply(video.architecture()(config), k=5)
    model, inputs = Glm4v().build(), Glm4v().inputs([ROW])
    with vispruner.apply(model, k=5), pytest.raises(ValueError, match="pixel_values_videos cannot"):
        model(**inputs, pixel_values_videos=inputs["pixel_values"])
    tiny = Idefics3()
    model, inputs = tiny.build(), tiny.inputs([ROW])
    mask = torch.ones((*inputs["pixel_values"].shape[:2], 112, 112), dtype=torch.bool)
    with vispruner.apply(model, k=5), torch.no_grad():
        want = model(**inputs).logits
        assert torch.equal(model(**inputs, pixel_attention_mask=mask).logits, want)
        mask[0, 1, 100:] = False
        with pytest.raises(ValueError, match="pixel_attention_mask hides"):
            model(**inputs, pixel_attention_mask=mask)
        with pytest.raises(ValueError, match=r"must have shape \(B, pictures, 3, 112, 112\)"):
            model(**inputs | {"pixel_values": inputs["pixel_values"][..., :56, :56]})


@pytest.mark.parametrize("layer", [0, -5, [-2, -1], 9])
def test_feature_layers_without_attention(layer: Any) -> None:
    model = Llava().build()
    model.config.vision_feature_layer = layer
    with pytest.raises(vispruner.UnsupportedModelError, match="vision_feature_layer"):
        vispruner.apply(model, k=5)
    model.config.vision_feature_layer = -2
    untouched(model)


def test_paged_attention() -> None:
    model = Llava().build()
    model.config._attn_implementation_internal = "paged|sdpa"
    with pytest.raises(vispruner.UnsupportedModelError, match="paged"):
        vispruner.apply(model, k=5)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param


def nothing_runs(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a part of the model computes anything."""

    def run(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model ran")

    for name, module in model.model.named_children():
        if name != "language_model":
            monkeypatch.setattr(module, "forward", run)


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_placeholders_and_images_do_not_match(
    tiny: Tiny, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build()
    inputs = tiny.inputs([ROW])
    ids = inputs["input_ids"]
    nothing_runs(model, monkeypatch)
    with vispruner.apply(model, k=5) as pruner:
        method = model.generate if call == "generate" else model
        last = int((ids[0] == IMAGE).nonzero()[-1])
        for broken in (
            inputs | {"input_ids": ids.clone().index_fill_(1, torch.tensor([last]), 7)},
            inputs | {"input_ids": ids.masked_fill(ids == IMAGE, 7)},
            inputs | tiny.media([image(1)]),
            inputs | tiny.media([image(1), image(2), image(3)]),
            {name: inputs[name] for name in ("input_ids", "attention_mask")},
        ):
            with pytest.raises(ValueError, match="image"):
                method(**broken)
        assert pruner.last is None


def test_images_in_the_wrong_rows(tiny: Tiny) -> None:
    model = tiny.build()
    inputs = tiny.inputs([[1, image(0), 10], [1, image(1), 11]])
    one, other = (
        tiny.inputs([[1, image(0), 10], [1, 11]]),
        tiny.inputs([[1, 12], [1, image(1), 11]]),
    )
    assert one["input_ids"].shape[0] == other["input_ids"].shape[0]
    ids = inputs["input_ids"].clone()
    first = (ids == IMAGE).nonzero()[0]
    ids[first[0], first[1]] = 7  # one too few in row 0, one too many in row 1
    ids[1, 0 if int(ids[1, 0]) == 0 else -1] = IMAGE
    with vispruner.apply(model, k=5), pytest.raises(ValueError, match="row 0"):
        model(**inputs | {"input_ids": ids})


def test_other_inconsistent_arguments() -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([ROW])
    with vispruner.apply(model, k=5):
        with pytest.raises(ValueError, match="attention_mask has 3 columns"):
            model(**inputs | {"attention_mask": torch.ones(1, 3)})
        with pytest.raises(ValueError, match=r"must have shape \(B, L\)"):
            model(**inputs | {"attention_mask": torch.ones(1, 1, 3, 3)})
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="inputs_embeds"):
            model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
        with pytest.raises(ValueError, match="logits_to_keep"):
            model(**inputs, logits_to_keep=torch.tensor([3]))
        with pytest.raises(ValueError, match="nothing to prune"):
            vispruner.prepare(model, {"input_ids": torch.tensor([[5, 6]])})
    with pytest.raises(ValueError, match="apply"):
        vispruner.prepare(model, inputs)


def test_caches_that_do_not_match() -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([ROW])
    settings = {"max_new_tokens": 3, "return_dict_in_generate": True, "do_sample": False}
    with vispruner.apply(model, k=5):
        output = model.generate(**inputs, **settings)
        cache = output.past_key_values
        with pytest.raises(ValueError, match="the whole conversation"):
            model.generate(input_ids=torch.tensor([[5]]), past_key_values=cache)
        with pytest.raises(ValueError, match="a batch of 1"):
            model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
        cache.crop(4 - cache.get_seq_length())
        with pytest.raises(ValueError, match="was cut"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_sizes_that_do_not_match() -> None:
    tiny = Qwen25()
    model, inputs = tiny.build(), tiny.inputs([ROW])
    with vispruner.apply(model, k=5):
        with pytest.raises(ValueError, match="the pixels have"):
            model(**inputs | {"pixel_values": inputs["pixel_values"][:-4]})
        with pytest.raises(ValueError, match="image_grid_thw must come"):
            model(**{n: v for n, v in inputs.items() if n != "image_grid_thw"})
    tiny_next = LlavaNext()
    model, inputs = tiny_next.build(), tiny_next.inputs([ROW])
    with vispruner.apply(model, k=5):
        with pytest.raises(ValueError, match="tiles that image_sizes require"):
            model(**inputs | {"pixel_values": inputs["pixel_values"][:, :2]})
        with pytest.raises(ValueError, match="image_sizes must come"):
            model(**{n: v for n, v in inputs.items() if n != "image_sizes"})


def test_an_error_in_the_encoder_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = VideoLlava()
    model, inputs = tiny.build(), tiny.inputs([[1, image(0), video(0), 5]])
    projector = type(model.model.multi_modal_projector)

    def run(*args: object) -> None:
        raise ArithmeticError

    with vispruner.apply(model, k=5):
        with monkeypatch.context() as patched:
            patched.setattr(projector, "forward", run)
            with pytest.raises(ArithmeticError):
                model.generate(**inputs)
        for name, module in model.named_modules():
            assert not name.endswith("_proj") or not module._forward_hooks
            assert not name.endswith("projector") or not module._forward_pre_hooks
        model(**inputs)
    untouched(model)


@pytest.mark.parametrize("tiny", tiny_models.FAMILIES, ids=lambda tiny: tiny.name)
def test_features_that_no_encoder_computes(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's method returns stored features, so that no hook runs."""
    model, inputs = tiny.build(), tiny.inputs([[1, image(0), 5]])
    encode = model.model.get_image_features
    with torch.no_grad():
        stored = encode(**tiny.media([image(0)]), return_dict=True)

    @functools.wraps(encode)
    def cached(*args: Any, **kwargs: Any) -> Any:
        return copy.deepcopy(stored)

    with vispruner.apply(model, k=5, **tiny.options), torch.no_grad():
        want = model(**inputs).logits
        with monkeypatch.context() as patched:
            patched.setattr(model.model, "get_image_features", cached)
            with pytest.raises(
                RuntimeError, match=r"tower ran without calling the \w+ proj"
            ) as raised:
                model(**inputs)
        assert "\n" not in str(raised.value)
        assert torch.equal(model(**inputs).logits, want)
    untouched(model)


@pytest.mark.parametrize("tiny", TOWERS, ids=lambda tiny: tiny.name)
def test_features_that_no_projector_computes(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.build(), tiny.inputs([[1, image(0), 5]])
    projector = model.model.multi_modal_projector
    encode = model.model.get_image_features

    @functools.wraps(encode)
    def direct(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(type(projector), "__call__", type(projector).forward)
            return encode(*args, **kwargs)

    monkeypatch.setattr(model.model, "get_image_features", direct)
    with vispruner.apply(model, k=5), torch.no_grad():
        with pytest.raises(RuntimeError, match="without calling multi_modal_projector") as raised:
            model(**inputs)
        assert "\n" not in str(raised.value)


def test_a_model_that_was_compiled_before() -> None:
    """Its compiled code does not call hooks that are registered later."""
    torch.compiler.reset()
    tiny = LlavaNext()
    model, inputs = tiny.build(), tiny.inputs([[1, image(0), 5]])
    model.compile(backend="eager")
    with torch.no_grad():
        model(**inputs)
        with (
            vispruner.apply(model, k=5),
            pytest.raises(RuntimeError, match="tower ran without calling the query projection"),
        ):
            model(**inputs)


def test_a_custom_family() -> None:
    class First(LlavaFamily):
        """Records its calls."""

        def encode(self, modality: str, inputs: Any, clock: Any) -> Encoded:
            encoded = super().encode(modality, inputs, clock)
            calls.append(modality)
            return encoded

    calls: list[str] = []
    tiny = Llava()
    model = tiny.build()
    try:
        vispruner.register("llava", First)
        with vispruner.apply(model, k=5):
            model(**tiny.inputs([ROW]))
        assert calls == ["image"]
    finally:
        vispruner.register("llava", LlavaFamily)
    with pytest.raises(TypeError, match="subclass"):
        vispruner.register("mine", object)  # type: ignore[arg-type]
    assert issubclass(First, Family)


def test_scores_of_a_resampler() -> None:
    patches = torch.rand(2, 30)
    attention = torch.randn(2, 4, 7, 30).softmax(-1)
    scores = resampled_scores(patches, attention)
    torch.testing.assert_close(scores[1, 3], (attention[1, :, 3].mean(0) * patches[1]).sum())
    torch.testing.assert_close(resampled_scores(patches, attention.mean(1)), scores)
    with pytest.raises(ValueError, match="attention must have shape"):
        resampled_scores(patches[:1], attention)
