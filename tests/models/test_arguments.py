"""Arguments of transformers, and wrappers of models."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from support.generation import STEPS, close, generate
from support.tiny_models import (
    FAMILIES,
    Llava,
    LlavaNext,
    LlavaNextVideo,
    LlavaOnevision,
    Qwen3,
    Qwen25,
    Tiny,
    image,
    video,
)
from torch import Tensor, nn

import vispruner
from vispruner.clock import Clock
from vispruner.models import family_of
from vispruner_cuda import reference
from vispruner_cuda.methods import METHODS

K = 5
ONE, TWO = [1, image(0), 10, 11, 12], [1, 20, image(1), 22, image(2), 24, 25]
MIXES = ("qwen3.5", "qwen3.5-moe", "gemma3")  # linear attention; masks of images
GRID = ("qwen", "glm")  # families with grid positions


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param


# -------------------------------------------------------------------------------- positions, masks
def test_consecutive_positions_change_nothing(tiny: Tiny) -> None:
    if tiny.name.startswith(GRID):
        pytest.skip("flat positions differ from the family's positions")
    model, inputs = tiny.build(), tiny.inputs([TWO])
    mask = inputs.pop("attention_mask")
    places = torch.arange(mask.shape[1])[None]
    with vispruner.apply(model, k=K, **tiny.options), torch.no_grad():
        want = model(**inputs, use_cache=False).logits
        close(model(**inputs, position_ids=places, use_cache=False).logits, want)
        close(model(**inputs, attention_mask=mask, use_cache=False).logits, want)
        both = {"attention_mask": mask, "position_ids": places}
        close(model(**inputs, **both, use_cache=False).logits, want)


def test_packed_prompts_equal_separate_prompts(tiny: Tiny) -> None:
    model, rows = tiny.build(), [ONE, TWO, [1, 5, image(0)]]
    inputs = tiny.inputs([[part for row in rows for part in row]])
    inputs.pop("attention_mask")
    alone = [tiny.inputs([row]) for row in rows]
    with torch.no_grad():
        if tiny.name.startswith(
            GRID
        ):  # one row that counts tokens, and three rows of grid positions
            places = []
            for one, row in zip(alone, rows, strict=True):
                count = torch.arange(one["input_ids"].shape[1])[None, None]
                places.append(torch.cat([count, tiny.positions(model, one["input_ids"], row)]))
            packed = torch.cat(places, 2)
        else:
            packed = torch.cat([torch.arange(one["input_ids"].shape[1]) for one in alone])[None]
        with vispruner.apply(model, k=K, **tiny.options):
            want = torch.cat([model(**one, use_cache=False).logits[0] for one in alone])
            found = model(**inputs, position_ids=packed, use_cache=False).logits[0]
        if tiny.name in MIXES:
            apart = torch.cat([model(**one, use_cache=False).logits[0] for one in alone])
            mixed = model(**inputs, position_ids=packed, use_cache=False).logits[0]
            if not torch.allclose(mixed, apart, atol=1e-3):
                pytest.skip("the unpruned model does not separate packed prompts")
    close(found, want)


def test_packed_prompts_that_cannot_be_separated() -> None:
    tiny = Llava()
    model = tiny.build()
    row = tiny.inputs([[*ONE, *TWO]])
    row.pop("attention_mask")
    first = len(tiny.ids(ONE))
    places = torch.arange(row["input_ids"].shape[1])[None]
    from_three = torch.cat([places[:, :first], places[:, first:] - first + 3], 1)
    fill = len(tiny.ids([1, image(0), 10]))
    two = tiny.inputs([[1, image(0), 10, 11], [1, 10, *range(30, 30 + fill - 1)]])
    two.pop("attention_mask")
    pair = torch.cat([torch.arange(fill - 2), torch.arange(3)])[None].expand(2, -1)
    with vispruner.apply(model, k=K), torch.no_grad():
        with pytest.raises(ValueError, match="each must begin at 0, one begins at 3"):
            model(**row, position_ids=from_three)
        with pytest.raises(ValueError, match="pass all prompts in one row"):
            model(**two, position_ids=pair)


def test_positions_of_a_step_that_match_neither_prompt_nor_cache() -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([ONE])
    token, length = torch.tensor([[30]]), inputs["input_ids"].shape[1]
    with vispruner.apply(model, k=K), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        want = model(input_ids=token, past_key_values=copy.deepcopy(cache)).logits
        for start in (length, cache.get_seq_length()):
            step = {"input_ids": token, "position_ids": torch.tensor([[start]])}
            close(model(**step, past_key_values=copy.deepcopy(cache)).logits, want)
        step["position_ids"] = torch.tensor([[17]])
        with pytest.raises(ValueError, match=r"position_ids continue at \[17\]"):
            model(**step, past_key_values=cache)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32], ids=str)
@pytest.mark.parametrize("family", [Llava(), Qwen25(), Qwen3()], ids=lambda f: f.name)
def test_types_of_masks(family: Tiny, dtype: torch.dtype) -> None:
    model, inputs = family.build(), family.inputs([ONE, TWO])
    typed = inputs | {"attention_mask": inputs["attention_mask"].to(dtype)}
    with vispruner.apply(model, k=K), torch.no_grad():
        close(model(**typed).logits, model(**inputs).logits)
        if dtype != torch.bool:  # transformers cannot extend a bool mask step by step
            assert torch.equal(generate(model, typed), generate(model, inputs))


def test_masks_and_pixels_of_other_kinds(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs([TWO])
    mask = inputs["attention_mask"]
    name = next(n for n in inputs if n.startswith("pixel_values"))
    hidden = mask.clone()
    hidden[:, : len(tiny.ids([1, 20])) + 4] = 0
    with vispruner.apply(model, k=K, **tiny.options) as pruner, torch.no_grad():
        for broken, message in (
            ({"attention_mask": {"full_attention": mask}}, "got a dict"),
            ({"attention_mask": mask[:, None, None]}, r"must have shape \(B, L\)"),
            ({"attention_mask": (1.0 - mask) * -1e9 - 1.0}, "must hold 0"),
            ({name: list(inputs[name])}, f"{name} must be one tensor to be pruned, got a list"),
            ({"attention_mask": hidden}, "attention_mask hides"),
        ):
            for call in (model, lambda **kw: generate(model, kw)):
                with pytest.raises(ValueError, match=message):
                    call(**inputs | broken)
        assert pruner.last is None


# --------------------------------------------------------------------------------------- wrappers
def test_inside_the_wrapper_of_peft(tiny: Tiny) -> None:
    peft = pytest.importorskip("peft")
    model, inputs = tiny.build(), tiny.inputs([TWO])
    with torch.no_grad():
        with vispruner.apply(model, k=K, **tiny.options):
            want, answer = model(**inputs).logits, generate(model, inputs)
        adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        wrapped = peft.get_peft_model(model, adapters)  # new adapters have no effect
        for target in (wrapped, wrapped.get_base_model()):
            with vispruner.apply(target, k=K, **tiny.options):
                close(wrapped(**inputs).logits, want)
                assert torch.equal(generate(wrapped, inputs), answer)
        assert wrapped(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_calling_forward_itself_is_pruned() -> None:
    """As PEFT does; this test runs without PEFT."""
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([TWO])
    with vispruner.apply(model, k=K), torch.no_grad():
        assert torch.equal(model.forward(**inputs).logits, model(**inputs).logits)


def test_wrappers_that_are_refused() -> None:
    model = Llava().build()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(vispruner.UnsupportedModelError, match=r"model\._orig_mod"):
        vispruner.apply(compiled, k=K)
    with pytest.raises(vispruner.UnsupportedModelError, match=r"model\.module"):
        vispruner.apply(nn.DataParallel(model), k=K)
    with (
        vispruner.apply(model, k=K),
        pytest.raises(vispruner.UnsupportedModelError, match="DistributedDataParallel"),
    ):
        model._replicate_for_data_parallel()
    model._replicate_for_data_parallel()


@pytest.mark.parametrize("family", [Llava(), Qwen25(), LlavaNext()], ids=lambda f: f.name)
def test_a_saved_model_is_pruned_when_it_is_loaded(family: Tiny) -> None:
    model, inputs = family.build(), family.inputs([TWO])
    file = io.BytesIO()
    with vispruner.apply(model, k=K), torch.no_grad():
        torch.save(model, file)  # before a call, after which transformers itself prevents it
        want = generate(model, inputs)
    file.seek(0)
    with torch.no_grad():
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(generate(loaded, inputs), want)
        pruner = loaded._vispruner_pruner
        assert pruner.last.tokens_after < pruner.last.tokens_before
        pruner.remove()
        unpruned = generate(loaded, inputs)
        assert torch.equal(unpruned, generate(model, inputs))
        assert "generate" not in vars(loaded)
        assert "forward" not in vars(loaded)


def test_a_wrapped_forward() -> None:
    """remove() does not touch wrappers around the pruner's methods."""
    model, inputs = Llava().build(), Llava().inputs([TWO])
    with torch.no_grad():
        want = model(**inputs).logits
        pruner = vispruner.apply(model, k=K)
        inner = model.forward
        model.forward = lambda **kwargs: inner(**kwargs)
        pruner.remove()
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize(
    "family", [LlavaNext(), LlavaOnevision(), Qwen25()], ids=lambda family: family.name
)
def test_weights_that_accelerate_offloads(family: Tiny) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = family.build()
    inputs = family.inputs([TWO])
    if "video" in family.kinds and family.name == "llava-onevision":
        inputs = family.inputs([[1, image(0), 10, video(0), 11]])
    with torch.no_grad():
        with vispruner.apply(model, k=K):
            want, answer = model(**inputs).logits, generate(model, inputs)
            ready = vispruner.prepare(model, inputs)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert any(parameter.is_meta for parameter in model.parameters())
        with vispruner.apply(model, k=K):
            close(model(**inputs).logits, want)
            assert torch.equal(generate(model, inputs), answer)
            again = vispruner.prepare(model, inputs)
            close(again["inputs_embeds"], ready["inputs_embeds"])


def test_scores_of_weights_that_accelerate_offloads(tiny: Tiny) -> None:
    if tiny.name in ("glm4v", "glm4v-moe", "glm46v"):
        pytest.skip("the model does not run offloaded, pruned or not")
    accelerate = pytest.importorskip("accelerate")
    model = tiny.build()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.model.parameters()).is_meta
    vispruner.apply(model, k=K, check=True, **tiny.options).remove()


# ---------------------------------------------------------------- arguments with an entry per item
def as_list(call: dict[str, Any]) -> dict[str, Any]:
    return {"image_sizes": [tuple(size) for size in call["image_sizes"].tolist()]}


def as_tiles(call: dict[str, Any]) -> dict[str, Any]:
    """The tiles of all images, one after the other, instead of padded to the most of an image."""
    tiny = LlavaNext()
    counts = [tiny.tiles(image(n)) for n in range(4)]
    sizes = [tuple(tiny.size(image(n))) for n in range(4)]
    number = [counts[sizes.index(tuple(size))] for size in call["image_sizes"].tolist()]
    pixels = zip(call["pixel_values"], number, strict=True)
    return {"pixel_values": torch.cat([own[:count] for own, count in pixels])}


def in_groups(*counts: int) -> Any:
    return lambda call: {"batch_num_images": torch.tensor(counts)}


TILED = (LlavaNext(), LlavaNextVideo(), LlavaOnevision())
PARTS: list[tuple[Tiny, Any]] = [
    *((family, lambda call: {}) for family in FAMILIES),
    *((family, change) for family in TILED for change in (as_list, as_tiles)),
    *((LlavaOnevision(), in_groups(*counts)) for counts in ((4,), (2, 2), (1, 3), (1, 1, 2))),
]


@pytest.mark.parametrize(("family", "change"), PARTS)
def test_a_part_of_the_items_is_encoded_as_among_all(family: Tiny, change: Any) -> None:
    model = family.build()
    pruning = family_of(model)(model, vispruner.Budget(k=K), **family.options)
    for kind, make in (("image", image), ("video", video)):
        if kind not in pruning.encoders:
            continue
        call = family.media([make(n) for n in range(4)])
        call |= change(call) if kind == "image" else {}
        inputs = pruning.inputs_of(kind, call)
        assert inputs is not None

        def features(inputs: dict[str, Any], kind: str = kind) -> list[Tensor]:
            found = pruning.encode(kind, inputs, Clock(torch.device("cpu")))
            counts = [item.after for item in found.items]
            parts = [part.reshape(-1, part.shape[-1]) for part in found.output.pooler_output]
            rows = torch.cat(parts)
            if len(rows) < sum(counts):  # 5.17 adds the line ends of videos later
                counts = [len(rows) // len(counts)] * len(counts)
            return list(rows[: sum(counts)].split(counts))

        with torch.no_grad():
            every = features(inputs)
            for items in ([0], [1, 3], [2, 3], [0, 2], [3]):
                some = pruning.take(kind, inputs, items)
                sizes = pruning.placeholders(kind, inputs)
                assert pruning.placeholders(kind, some) == [sizes[item] for item in items]
                for found, item in zip(features(some), items, strict=True):
                    close(found, every[item])


@pytest.mark.parametrize(
    ("family", "change"),
    [(family, change) for family in TILED for change in (as_list, as_tiles)]
    + [(LlavaOnevision(), lambda call: {"batch_num_images": [len(call["image_sizes"])]})],
)
def test_a_new_image_in_the_second_turn(family: Tiny, change: Any) -> None:
    model = family.build()
    alone = "batch_num_images" in change(family.media([image(0)]))
    picture = [image(2)] if not alone else [199] * 37  # an image among others is not cut into tiles

    def call(row: list[Any], count: int) -> dict[str, Any]:
        inputs = family.inputs([row]) | family.media([image(2)] * count)
        return inputs | change(inputs)

    first = [1, *picture, 20, *picture, 22]
    with vispruner.apply(model, k=K, **family.options) as pruner:
        output = generate(model, call(first, 2), return_dict_in_generate=True)
        answer = output.sequences[0, -STEPS:].tolist()
        again = call([*first, *answer, 30, *picture, 31], 3)
        want = generate(model, again)
        assert torch.equal(generate(model, again, past_key_values=output.past_key_values), want)
        assert pruner.last is not None
        assert len(pruner.last.items) == 1


def test_numbers_of_images_that_do_not_match() -> None:
    family = LlavaOnevision()
    model = family.build()
    call = family.inputs([TWO]) | {"batch_num_images": torch.tensor([3])}
    complaint = "batch_num_images has 3 images, image_sizes 2: pass what"
    with vispruner.apply(model, k=K), pytest.raises(ValueError, match=complaint):
        model(**call)


# -------------------------------------------------------------------------------- budgets, checks
def test_a_budget() -> None:
    model, inputs = Llava().build(), Llava().inputs([TWO])
    with torch.no_grad():
        with vispruner.apply(model, k=K, important_ratio=0.2, step=2):
            want = model(**inputs).logits
        budget = vispruner.Budget(k=K, important_ratio=0.2, step=2)
        with vispruner.apply(model, budget) as pruner:
            assert pruner.budget is budget
            assert torch.equal(model(**inputs).logits, want)
    for more in ({"step": 4}, {"method": "topk"}, {"seed": 0}):
        with pytest.raises(ValueError, match="pass only the Budget"):
            vispruner.apply(model, budget, **more)


OPTIONS = {"vispruner": {"step": 3}, "random": {"seed": 5}, "scope": {"scope_alpha": 0.5}}


@pytest.mark.parametrize("method", METHODS)
def test_methods(tiny: Tiny, method: str) -> None:
    """In every family: the tokens that the reference selects."""
    model, options = tiny.build(), OPTIONS.get(method, {})
    selected: list[tuple[Any, ...]] = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for name in ("select", "select_packed"):
            original = getattr(vispruner.Budget, name)
            patch.setattr(vispruner.Budget, name, _recorded(original, selected))
        with vispruner.apply(model, k=K, method=method, **options, **tiny.options) as pruner:
            model(**tiny.inputs([TWO]))
    assert pruner.budget.method == method
    assert selected
    for feats, scores, *packing, indices in selected:
        if packing:
            lengths, counts = packing
            bounds = [0, *itertools.accumulate(lengths)]
            want = reference.prune_varlen(
                feats.float(), scores, bounds, list(counts), method=method, **options
            )
        else:
            want = reference.prune(feats.float(), scores, K, method=method, **options)
        assert torch.equal(indices, want.indices)


def _recorded(original: Any, calls: list[tuple[Any, ...]]) -> Any:
    def select(budget: Any, *args: Any) -> Any:
        kept = original(budget, *args)
        calls.append((*args, kept[1]))
        return kept

    return select


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scores_equal_eager_attention(tiny: Tiny, dtype: torch.dtype) -> None:
    model = tiny.build(dtype)
    vispruner.apply(model, k=K, check=True, **tiny.options).remove()
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert "forward" not in vars(model)


def test_a_changed_attention_layer_is_detected(tiny: Tiny) -> None:
    """Simulates a release that scales or normalizes the query differently."""
    model = tiny.build()
    changed = 0
    towers = ("vision_tower", "vision_model", "visual", "image_tower", "video_tower")
    for path, module in model.named_modules():
        scaled = hasattr(module, "scaling") or hasattr(module, "scale")
        if scaled and any(tower in path for tower in towers):
            original = module.forward
            name = "scaling" if hasattr(module, "scaling") else "scale"

            def forward(
                *args: Any, m: Any = module, run: Any = original, name: str = name, **kwargs: Any
            ) -> Any:
                before = getattr(m, name)
                setattr(m, name, 1.5 * before)
                try:
                    return run(*args, **kwargs)
                finally:
                    setattr(m, name, before)

            module.forward = forward
            changed += 1
    assert changed
    with pytest.raises(vispruner.UnsupportedModelError, match="do not match its attention"):
        vispruner.apply(model, k=K, check=True, **tiny.options)
    assert "generate" not in vars(model)
