"""Unusual calls: correct as without pruning, or refused in one line."""

from __future__ import annotations

import collections
import copy
import threading
import warnings
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from support.generation import STEPS, close, generate
from support.tiny_models import (
    Llava,
    LlavaNext,
    Qwen3,
    Qwen25,
    Tiny,
    image,
)
from torch import Tensor

import vispruner

K = 5
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"
FAMILIES: tuple[Tiny, ...] = (Llava(), LlavaNext(), Qwen25(), Qwen3())
TWO = [1, 20, image(1), 22, image(2), 24, 25]
ROWS = [[1, image(0), 10, 11, 12], TWO]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param


# ---------------------------------------------------------------------------------- the cache
def test_the_cache_under_its_newest_name(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs(ROWS)
    with vispruner.apply(model, k=K), torch.no_grad():
        output = generate(model, inputs, return_dict_in_generate=True)
        cache, answer = output[CACHE], output.sequences
        ids = torch.cat([answer, torch.tensor([[30, 31], [33, 34]])], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, STEPS + 2).long()], 1)
        call = inputs | {"input_ids": ids, "attention_mask": mask} | tiny.typed(ids)
        expected = generate(model, call)
        assert torch.equal(generate(model, call, **{CACHE: copy.deepcopy(cache)}), expected)
        tail = {"input_ids": ids[:, -3:], "attention_mask": mask, CACHE: cache}
        if not hasattr(model.model, "rope_deltas"):  # else forward counts padding, pruned or not
            tail["position_ids"] = (mask.cumsum(1) - 1)[:, -3:]
        logits = model(**tail).logits
        close(logits[:, -1], model(**call).logits[:, -1])


def test_a_decoding_loop_with_the_newest_name(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs([TWO])
    with vispruner.apply(model, k=K), torch.no_grad():
        expected = generate(model, inputs)[0, -STEPS:].tolist()
        output, found = model(**inputs, use_cache=True), []
        for _ in range(STEPS):
            scores = output.logits[:, -1].clone()
            scores[:, 198:] = -torch.inf
            found.append(int(scores.argmax()))
            token = torch.tensor([found[-1:]])
            output = model(input_ids=token, **{CACHE: output[CACHE]})
    assert found == expected


def test_two_decoding_loops_in_turns(tiny: Tiny) -> None:
    """The position of a conversation depends on its cache, not on the last call."""
    model = tiny.build()
    asks = [tiny.inputs([[1, image(3), 10]]), tiny.inputs([TWO])]
    with vispruner.apply(model, k=K), torch.no_grad():
        expected = [generate(model, inputs)[0, -STEPS:].tolist() for inputs in asks]
        outputs, found = [model(**inputs, use_cache=True) for inputs in asks], [[], []]
        for _ in range(STEPS):
            for n in range(2):
                scores = outputs[n].logits[:, -1].clone()
                scores[:, 198:] = -torch.inf
                found[n].append(int(scores.argmax()))
                token = torch.tensor([found[n][-1:]])
                outputs[n] = model(input_ids=token, **{CACHE: outputs[n][CACHE]})
    assert found == expected


def test_rows_of_a_cache(tiny: Tiny) -> None:
    """Operations of the cache also change the layout; other changes are refused."""
    model, inputs = tiny.build(), tiny.inputs(ROWS)
    token = torch.tensor([[30], [31]])

    def mask(rows: list[int]) -> Tensor:
        one = torch.ones(len(rows), 1).long()
        return torch.cat([inputs["attention_mask"][rows], one], 1)

    with vispruner.apply(model, k=K), torch.no_grad():
        cache = model(**inputs, use_cache=True)[CACHE]
        want = model(
            input_ids=token, attention_mask=mask([0, 1]), **{CACHE: copy.deepcopy(cache)}
        ).logits
        for change, rows in (
            (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
            (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
            (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        ):
            other = copy.deepcopy(cache)
            change(other)
            call = {"input_ids": token[rows], "attention_mask": mask(rows), CACHE: other}
            close(model(**call).logits, want[rows])
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:1], layer.values[:1]
        with pytest.raises(ValueError, match="the cache has 1 rows now and had 2"):
            model(input_ids=token[:1], attention_mask=mask([0]), **{CACHE: cache})


def test_later_turns_with_images_that_have_no_placeholder(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs([TWO])
    other = tiny.media([image(1), image(2), image(3)])
    with vispruner.apply(model, k=K), torch.no_grad():
        output = generate(model, inputs, return_dict_in_generate=True)
        ids = torch.cat([output.sequences, torch.tensor([[30, 31]])], 1)
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | tiny.typed(ids)
        with pytest.raises(ValueError, match="placeholders"):
            generate(model, call | other, **{CACHE: copy.deepcopy(output[CACHE])})
        same = tiny.media([image(1), image(2)])
        expected = generate(model, call | same)
        assert torch.equal(generate(model, call | same, **{CACHE: output[CACHE]}), expected)


# -------------------------------------------------------------------- threads and nested calls
@pytest.mark.parametrize("family", [Llava(), LlavaNext(), Qwen25()], ids=lambda f: f.name)
def test_threads(family: Tiny) -> None:
    model = family.build()
    asks = [family.inputs([[1, image(n), 10 + n, 11]]) for n in range(3)]
    seen: collections.Counter[str] = collections.Counter()
    with vispruner.apply(model, k=K), torch.no_grad():
        expected = [(generate(model, ask), model(**ask).logits) for ask in asks]

        def work(n: int) -> None:
            for _ in range(6):
                try:
                    with torch.no_grad():
                        right = torch.equal(generate(model, asks[n]), expected[n][0])
                        right &= torch.equal(model(**asks[n]).logits, expected[n][1])
                    seen["right" if right else "wrong"] += 1
                except Exception as error:  # noqa: PERF203
                    seen[repr(error)] += 1

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert seen == {"right": 18}


def test_a_thread_that_encodes_without_pruning() -> None:
    """Hooks of one thread's call do not affect other threads' calls of the same modules."""
    tiny = Llava()
    model, ask = tiny.build(), tiny.inputs([[1, image(0), 10]])
    pixels = tiny.media([image(1)])["pixel_values"]
    want = model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
    stop, wrong = threading.Event(), []

    def encode() -> None:
        while not stop.is_set():
            with torch.no_grad():
                found = model.model.get_image_features(pixel_values=pixels, return_dict=True)
            wrong.extend([1] if not torch.equal(found.pooler_output[0], want[0]) else [])

    with vispruner.apply(model, k=K), torch.no_grad():
        expected = model(**ask).logits
        thread = threading.Thread(target=encode)
        thread.start()
        try:
            for _ in range(20):
                assert torch.equal(model(**ask).logits, expected)
        finally:
            stop.set()
            thread.join(60)
    assert not wrong


def test_a_forward_inside_generate_is_pruned(tiny: Tiny) -> None:
    """A logits processor that calls the same model."""
    model, inputs = tiny.build(), tiny.inputs([TWO])
    inner = tiny.inputs([[1, image(0), 10]])
    with vispruner.apply(model, k=K), torch.no_grad():
        expected, plain = model(**inner).logits, generate(model, inputs)
        nested = generate(model, inner)
        seen = []

        def processor(ids: Tensor, scores: Tensor) -> Tensor:
            seen.append((model(**inner).logits, generate(model, inner)))
            return scores

        chosen = transformers.LogitsProcessorList([processor])
        assert torch.equal(generate(model, inputs, logits_processor=chosen), plain)
    assert len(seen) == STEPS
    assert all(torch.equal(a, expected) and torch.equal(b, nested) for a, b in seen)


def test_encoder_outputs_passed_by_the_caller() -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([TWO])
    if VERSION < (5, 18):
        pytest.skip("this release of transformers takes none")
    with torch.no_grad():
        encoded = model.model.get_image_features(
            pixel_values=inputs["pixel_values"], return_dict=True
        )
        call = {n: v for n, v in inputs.items() if n != "pixel_values"}
        call["mm_encoder_outputs"] = {"image": encoded}
        want = model(**call).logits
        with vispruner.apply(model, k=K):
            with pytest.warns(UserWarning, match="mm_encoder_outputs are used unpruned"):
                assert torch.equal(model(**call).logits, want)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model(**call)


@pytest.mark.parametrize(
    ("strict", "error"),
    [(False, vispruner.UnsupportedModelError), (True, torch._dynamo.exc.Unsupported)],
)
def test_an_exported_model_is_refused(strict: bool, error: type[Exception]) -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([[1, image(0), 5]])
    refusal = pytest.raises(error, match="a pruned model cannot be exported")
    with vispruner.apply(model, k=K), torch.no_grad(), refusal:
        torch.export.export(model, (), {**inputs, "use_cache": False}, strict=strict)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_model_is_refused() -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([[1, image(0), 5]])

    def logits(*tensors: Tensor) -> Any:
        return model(**dict(zip(inputs, tensors, strict=True)), use_cache=False).logits

    refusal = pytest.raises(vispruner.UnsupportedModelError, match="cannot be exported")
    with vispruner.apply(model, k=K), torch.no_grad(), refusal:
        torch.jit.trace(logits, tuple(inputs.values()), check_trace=False)


# ------------------------------------------------------------------------------ continuous batching
@pytest.mark.parametrize("family", [Llava(), Qwen25()], ids=lambda family: family.name)
def test_continuous_batching_is_not_pruned(family: Tiny) -> None:
    model = family.build(torch.float32)
    placeholder = family.ids([image(0)])[-1]
    prompts = [[1, 5, 6, 7], [1, 8, 9], [1, placeholder, 9]]
    settings = {
        "generation_config": transformers.GenerationConfig(
            max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0
        ),
        # by default the cache takes most of the machine's memory
        "continuous_batching_config": transformers.ContinuousBatchingConfig(
            num_blocks=8, max_batch_tokens=64
        ),
        "progress_bar": False,
    }

    def answers() -> list[Any]:
        found = model.generate_batch(prompts, **settings)
        return [(found[name].generated_tokens, found[name].error) for name in sorted(found)]

    want = answers()
    assert [error for _, error in want] == [None] * 3
    with vispruner.apply(model, k=K):
        assert answers() == want


def test_images_in_a_paged_cache() -> None:
    class PagedAttentionCache:
        """Of generate_batch, which does not pass pixels; it cannot be made without a model."""

    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([TWO])
    with (
        vispruner.apply(model, k=K),
        pytest.raises(ValueError, match="PagedAttentionCache packs"),
    ):
        model(**inputs, **{CACHE: PagedAttentionCache()})
