"""All uses of generate and forward work unchanged on a pruned model."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from support.generation import STEPS, generate
from support.tiny_models import (
    IMAGE,
    Gemma3,
    Glm4v,
    Idefics3,
    InternVL,
    Llava,
    LlavaNext,
    Qwen3,
    Qwen25,
    Tiny,
    VideoLlava,
    image,
    video,
)
from torch import Tensor

import vispruner
from vispruner.phases import Clock, Prefill, unpruned

K = 5
TOLERANCE = 1e-5
FAMILIES: tuple[Tiny, ...] = (
    Llava(), LlavaNext(), Qwen25(), Qwen3(), VideoLlava(), Gemma3(), Idefics3(), InternVL(),
    Glm4v(),
)  # fmt: skip
TWO = [1, 20, image(1), 22, image(2), 24, 25]
ROWS = [[1, image(0), 10, 11, 12], TWO]
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def repeatable(tiny: Tiny) -> list[Any]:
    """Rows whose images the release does not mix up when it repeats them."""
    mixed = VERSION == (5, 18) or (VERSION > (5, 18) and tiny.name.startswith("glm"))
    return [ROWS[0], [1, 20, image(1), 24, 25]] if mixed else ROWS


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param


def test_rows_of_several_images_are_repeated_in_order_or_refused(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs([TWO])
    with vispruner.apply(model, k=K):
        greedy = generate(model, inputs)
        assert torch.equal(greedy, generate(model, inputs, num_return_sequences=1))
        repeat = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
        if repeatable(tiny) is ROWS:
            assert torch.equal(generate(model, inputs, **repeat), greedy.expand(3, -1))
            return
        for call in (repeat, {"num_beams": 2}):
            with pytest.raises(ValueError, match=r"transformers 5\.\d+.* mixes up the images"):
                generate(model, inputs, **call)


def takes_encoder_outputs(model: Any) -> bool:
    """Since transformers 5.18; before, prefill in chunks does not work with pixels."""
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def embedded(tiny: Tiny, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The shortened prompt as embeddings, for the unpruned model's generate."""
    with vispruner.apply(model, k=K), torch.no_grad():
        ready = vispruner.prepare(model, inputs)
    return {name: ready[name] for name in ("inputs_embeds", "attention_mask")}


@pytest.mark.parametrize(
    "mode",
    [
        {"cache_implementation": "static"},
        {"use_cache": True, "return_dict_in_generate": True, "output_scores": True},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=lambda mode: next(iter(mode)),
)
def test_other_modes_of_greedy_decoding(tiny: Tiny, mode: dict[str, Any]) -> None:
    rows = [TWO] if "prompt_lookup_num_tokens" in mode else ROWS
    model, inputs = tiny.build(), tiny.inputs(rows)
    with vispruner.apply(model, k=K):
        expected = generate(model, inputs)
        found = generate(model, inputs, **mode)
    sequences = found if isinstance(found, Tensor) else found.sequences
    assert torch.equal(sequences, expected)


def test_without_a_cache(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs(ROWS)
    with vispruner.apply(model, k=K):
        assert torch.equal(generate(model, inputs, use_cache=False), generate(model, inputs))


def test_eager_attention(tiny: Tiny) -> None:
    inputs = tiny.inputs([TWO])  # with padding, eager attention in float64 is NaN, pruned or not
    answers = []
    for attention in ("sdpa", "eager"):
        model = tiny.build(attention=attention)
        with vispruner.apply(model, k=K):
            answers.append(generate(model, inputs))
    assert torch.equal(*answers)


def test_assisted_decoding() -> None:
    tiny = Llava()
    model, assistant, inputs = tiny.build(), tiny.build(), tiny.inputs([TWO])
    with vispruner.apply(model, k=K):
        expected = generate(model, inputs)
        if takes_encoder_outputs(model):
            assert torch.equal(generate(model, inputs, assistant_model=assistant), expected)


def test_compiled_language_model(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs(ROWS)
    with vispruner.apply(model, k=K):
        expected = generate(model, inputs)
        tiny.reader(model).compile(backend="eager")
        assert torch.equal(generate(model, inputs), expected)
    torch.compiler.reset()


def test_decoding_compiles_in_one_graph() -> None:
    """With a static cache, generate compiles the whole model, including its hooks."""
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([TWO])
    with vispruner.apply(model, k=K), torch.no_grad():
        cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=120)
        generate(model, inputs, past_key_values=cache)
        delattr(cache, "_vispruner_layout")  # as it is inside generate
        step = {
            "input_ids": torch.tensor([[5]]),
            "position_ids": torch.tensor([[40]]),
            "past_key_values": cache,
        }
        compiled = torch.compile(model.__call__, backend="eager", fullgraph=True)
        assert compiled(**step).logits.shape == (1, 1, 200)
    torch.compiler.reset()


def test_placement_hooks_of_accelerate() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    tiny = LlavaNext()
    model, inputs = tiny.build(), tiny.inputs(ROWS)
    with vispruner.apply(model, k=K):
        expected = generate(model, inputs)
    hooks.attach_align_device_hook(model, execution_device="cpu")
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook("cpu", io_same_device=True))
    with vispruner.apply(model, k=K) as pruner:
        assert torch.equal(generate(model, inputs), expected)
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    assert pruner.last is not None


@pytest.mark.parametrize("first", ["apply", "prepare"])
@pytest.mark.parametrize("keep", [False, True])
def test_wrappers_of_accelerate(first: str, keep: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    tiny = Llava()
    model, inputs = tiny.build().float(), tiny.inputs(ROWS[:1])
    inputs["pixel_values"] = inputs["pixel_values"].float()
    length = inputs["input_ids"].shape[1]
    if first == "prepare":
        model = accelerator.prepare(model)
    pruner = vispruner.apply(model, k=K)
    if first == "apply":
        model = accelerator.prepare(model)
    pruned = model(**inputs).logits.shape[1]
    assert pruned == tiny.build()(**tiny.inputs([[1, 10, 11, 12]])).logits.shape[1] + K
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=keep)
    assert model(**inputs).logits.shape[1] == pruned
    generate(model, inputs)
    assert pruner.last is not None
    assert pruner.last.prompt_after == pruned
    pruner.remove()
    assert model(**inputs).logits.shape[1] == length


def test_seconds_of_videos() -> None:
    tiny = Qwen25()
    model = tiny.build()
    inputs = tiny.inputs([[1, image(0), 10, video(0), 11], [1, video(1), 20, 21]])
    inputs["second_per_grid_ts"] = [0.5, 3.0]
    settings = {"return_dict_in_generate": True, "output_logits": True}
    expected = generate(model, inputs, **settings)
    with vispruner.apply(model, ratio=1.0):
        found = generate(model, inputs, **settings)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


def test_chunked_prefill(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs(ROWS)
    chunked = VERSION >= (5, 23)
    with vispruner.apply(model, k=K):
        if not chunked:
            with pytest.raises(ValueError, match="prefill_chunk_size"):
                generate(model, inputs, prefill_chunk_size=7)
            return
        turn = generate(model, inputs, return_dict_in_generate=True)
        expected = turn.sequences
        assert torch.equal(generate(model, inputs, prefill_chunk_size=7), expected)
        # a later turn
        ids = torch.cat([expected, torch.tensor([[30, 31, 32], [33, 34, 35]])], 1)
        call = without_pixels(whole(tiny, inputs, ids))
        cached = {"past_key_values": turn.past_key_values, "prefill_chunk_size": 2}
        if hasattr(model.model, "rope_deltas"):
            with pytest.raises(
                ValueError, match="prefill_chunk_size=2 cannot be used behind a cache"
            ):
                generate(model, call, **cached)
        else:
            assert torch.equal(
                generate(model, call, **cached), generate(model, whole(tiny, inputs, ids))
            )


@pytest.mark.parametrize("beams", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_equal_beams_over_embeddings(beams: dict[str, Any]) -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs(repeatable(tiny))
    expected = generate(model, embedded(tiny, model, inputs), **beams)
    with vispruner.apply(model, k=K):
        found = generate(model, inputs, **beams)
    assert torch.equal(found[:, inputs["input_ids"].shape[1] :], expected)


def test_beams_of_a_batch_equal_beams_of_each_row(tiny: Tiny) -> None:
    model = tiny.build()
    with vispruner.apply(model, k=K):
        inputs = tiny.inputs(repeatable(tiny))
        together = generate(model, inputs, num_beams=3)[:, inputs["input_ids"].shape[1] :]
        for number, row in enumerate(repeatable(tiny)):
            alone = tiny.inputs([row])
            found = generate(model, alone, num_beams=3)[:, alone["input_ids"].shape[1] :]
            assert torch.equal(found[0], together[number])


def test_beams_with_videos() -> None:
    for tiny in (VideoLlava(), Qwen25(), Qwen3()):
        rows = [[1, image(0), 10, video(0), 11], [1, video(1), 20, 21]]
        model = tiny.build()
        with vispruner.apply(model, k=K):
            inputs = tiny.inputs(rows)
            together = generate(model, inputs, num_beams=2)[:, inputs["input_ids"].shape[1] :]
            for number, row in enumerate(rows):
                alone = tiny.inputs([row])
                found = generate(model, alone, num_beams=2)[:, alone["input_ids"].shape[1] :]
                assert torch.equal(found[0], together[number])


def test_sampling() -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs(repeatable(tiny))
    settings = {"do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(0)
    expected = generate(model, embedded(tiny, model, inputs), **settings)
    with vispruner.apply(model, k=K):
        torch.manual_seed(0)
        found = generate(model, inputs, **settings)
    assert torch.equal(found[:, inputs["input_ids"].shape[1] :], expected)
    assert torch.equal(
        found[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(2, 0)
    )


class Recorder:
    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streaming_shows_the_full_prompt(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs([TWO])
    streamer = Recorder()
    with vispruner.apply(model, k=K):
        answer = generate(model, inputs, streamer=streamer)
    assert [t for part in streamer.seen for t in part] == answer[0].tolist()
    assert streamer.seen[0] == inputs["input_ids"][0].tolist()
    assert streamer.ended


def test_max_length_counts_the_full_prompt(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs([TWO])
    length = inputs["input_ids"].shape[1] + 3
    config = transformers.GenerationConfig(max_length=length, pad_token_id=0)
    with vispruner.apply(model, k=K):
        found = model.generate(**inputs, max_length=length, do_sample=False)
        assert found.shape[1] == length
        assert model.generate(**inputs, generation_config=config).shape[1] == length
        assert config.max_length == length


def test_positional_and_masked_out_arguments() -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs(ROWS)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    mask = inputs["attention_mask"]
    with vispruner.apply(model, k=K), torch.no_grad():
        expected = generate(model, inputs)
        settings = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": [198, 199]}
        assert torch.equal(
            model.generate(ids, pixel_values=pixels, attention_mask=mask, **settings), expected
        )
        # without a mask, padding is detected by its token
        assert torch.equal(model.generate(inputs=ids, pixel_values=pixels, **settings), expected)
        assert torch.equal(model(ids, pixels, mask).logits, model(**inputs).logits)
        assert isinstance(model(**inputs, return_dict=False), tuple)


def test_text_only_prompts_are_unchanged(tiny: Tiny) -> None:
    model = tiny.build()
    text = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4).long()}
    expected, logits = generate(model, text), model(**text).logits
    with vispruner.apply(model, k=K) as pruner:
        assert torch.equal(generate(model, text), expected)
        assert torch.equal(model(**text).logits, logits)
        assert pruner.last is None
        generate(model, tiny.inputs([TWO]))
        assert torch.equal(generate(model, text), expected)


# ------------------------------------------------------------------------------- multiple turns
def first_turn(model: Any, tiny: Tiny, rows: list[Any]) -> tuple[dict[str, Any], Tensor, Any]:
    inputs = tiny.inputs(rows)
    output = generate(model, inputs, return_dict_in_generate=True)
    return inputs, output.sequences, output.past_key_values


def whole(tiny: Tiny, inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The inputs of a prompt that was continued to `ids`."""
    more = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), more).long()], 1)
    return inputs | {"input_ids": ids, "attention_mask": mask} | tiny.typed(ids)


def without_pixels(call: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in call.items() if not n.startswith(("pixel", "image", "video"))}


@pytest.mark.parametrize("pixels", ["again", "omitted"])
def test_second_turn_with_the_cache_equals_a_new_start(tiny: Tiny, pixels: str) -> None:
    model = tiny.build()
    with vispruner.apply(model, k=K):
        inputs, sequences, cache = first_turn(model, tiny, ROWS)
        ids = torch.cat([sequences, torch.tensor([[30, 31, 32], [33, 34, 35]])], 1)
        call = whole(tiny, inputs, ids)
        expected = generate(model, call)
        again = call if pixels == "again" else without_pixels(call)
        copied = copy.deepcopy(cache)  # for several questions about one image
        found = generate(model, again, past_key_values=cache, return_dict_in_generate=True)
        assert torch.equal(found.sequences, expected)
        assert torch.equal(generate(model, again, past_key_values=copied), expected)
        # a third turn
        ids = torch.cat([expected, torch.tensor([[40, 41], [42, 43]])], 1)
        call = whole(tiny, inputs, ids)
        third = generate(model, without_pixels(call), past_key_values=found.past_key_values)
        assert torch.equal(third, generate(model, call))


class StoppedError(Exception):
    """A user stops an answer."""


class StoppingStreamer:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.begun = False

    def put(self, tokens: Tensor) -> None:
        if self.begun:
            self.tokens.append(int(tokens))
            if len(self.tokens) == 4:
                raise StoppedError
        self.begun = True

    def end(self) -> None:
        raise AssertionError("the answer was not stopped")


@pytest.mark.parametrize("pixels", ["again", "omitted"])
@pytest.mark.parametrize("stopped", ["first", "second"])
@pytest.mark.parametrize("between", [3, 60])  # tokens: more than are dropped
def test_a_turn_after_a_stopped_one(tiny: Tiny, stopped: str, pixels: str, between: int) -> None:
    model = tiny.build()
    row = [1, image(0), *range(10, 10 + between)]
    cache = transformers.DynamicCache(config=model.config.get_text_config())

    def turn(streamer: Any = None) -> Tensor:
        call = tiny.inputs([row])
        if cache.get_seq_length() and pixels == "omitted":
            call = without_pixels(call)
        return generate(model, call, past_key_values=cache, max_new_tokens=6, streamer=streamer)

    with vispruner.apply(model, k=K):
        if stopped == "second":
            row += [*turn()[0, -6:].tolist(), 30]
        streamer = StoppingStreamer()
        with pytest.raises(StoppedError):
            turn(streamer)
        row += [*streamer.tokens, 31, 32]
        fresh = generate(model, tiny.inputs([row]), max_new_tokens=6)
        assert torch.equal(turn(), fresh)


def test_a_new_image_in_a_stopped_turn(tiny: Tiny) -> None:
    if tiny.name == "gemma3" and VERSION < (5, 23):
        pytest.skip("refused, as in the next test")
    model = tiny.build()
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    row = [1, image(0), 5, 6]
    with vispruner.apply(model, k=K):
        generate(model, tiny.inputs([row]), past_key_values=cache, max_new_tokens=1)
        row += [30, image(3), *range(31, 91)]
        streamer = StoppingStreamer()
        with pytest.raises(StoppedError):
            generate(model, tiny.inputs([row]), past_key_values=cache, streamer=streamer)
        row += [*streamer.tokens, 31, 32]
        call = tiny.inputs([row])
        fresh = generate(model, call)
        found = generate(model, without_pixels(call), past_key_values=cache)
        assert torch.equal(found, fresh)


def test_a_step_after_a_stopped_forward(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs(ROWS)

    def stop(*_: Any) -> None:
        raise StoppedError

    def logits(*, stopped: bool) -> Tensor:
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        if stopped:  # after the cache is filled
            hook = model.lm_head.register_forward_pre_hook(stop)
            with pytest.raises(StoppedError):
                model(**inputs, past_key_values=cache)
            hook.remove()
        else:
            model(**inputs, past_key_values=cache)
        ids = torch.cat([inputs["input_ids"], torch.tensor([[30], [31]])], 1)
        mask = whole(tiny, inputs, ids)["attention_mask"]
        step: Tensor = model(
            input_ids=ids[:, -1:], attention_mask=mask, past_key_values=cache
        ).logits
        return step

    with vispruner.apply(model, k=K), torch.no_grad():
        assert torch.equal(logits(stopped=True), logits(stopped=False))


def test_a_turn_that_fails_before_it_reads_the_prompt(tiny: Tiny) -> None:
    model = tiny.build()
    with vispruner.apply(model, k=K):
        inputs, sequences, cache = first_turn(model, tiny, ROWS[:1])
        call = whole(tiny, inputs, torch.cat([sequences, torch.tensor([[30, 31]])], 1))
        expected = generate(model, call)
        with pytest.raises(ValueError, match="nothing"):
            generate(model, call, past_key_values=cache, custom_generate=fails)
        assert torch.equal(generate(model, call, past_key_values=cache), expected)


def fails(*_: Any, **__: Any) -> None:
    raise ValueError("nothing was read")


def test_a_new_image_in_the_second_turn(tiny: Tiny) -> None:
    model = tiny.build()
    if tiny.name == "gemma3" and VERSION < (5, 23):
        refused_after_a_cache(model, tiny)
        return
    with vispruner.apply(model, k=K) as pruner:
        _, sequences, cache = first_turn(model, tiny, ROWS)
        answers = sequences[:, -STEPS:].tolist()
        rows = [
            [*ROWS[0], *answers[0], 30, image(3), 31],
            [*ROWS[1], *answers[1], 33, 34, 35],
        ]
        # rows differ in length: the second is padded inside, between its turns
        new = [[30, *tiny.tokens(image(3)), 31], [33, 34, 35]]
        width = max(map(len, new))
        tail = torch.tensor([[0] * (width - len(n)) + n for n in new])
        tail_mask = torch.tensor([[0] * (width - len(n)) + [1] * len(n) for n in new])
        before = tiny.inputs(ROWS)
        ids = torch.cat([sequences, tail], 1)
        mask = torch.cat([before["attention_mask"], torch.ones(2, STEPS).long(), tail_mask], 1)
        media = tiny.media([image(0), image(3), image(1), image(2)])
        call = {"input_ids": ids, "attention_mask": mask} | tiny.typed(ids) | media
        found = generate(model, call, past_key_values=copy.deepcopy(cache))[:, -STEPS:]
        assert pruner.last is not None
        assert len(pruner.last.items) == 1  # the others are in the cache
        call |= tiny.media([image(3)])
        only_new = generate(model, call, past_key_values=cache)[:, -STEPS:]
        assert torch.equal(only_new, found)
        fresh = generate(model, tiny.inputs(rows))[:, -STEPS:]
        assert torch.equal(found, fresh)


def refused_after_a_cache(model: Any, tiny: Tiny) -> None:
    with vispruner.apply(model, k=K):
        inputs, sequences, cache = first_turn(model, tiny, ROWS[:1])
        new = torch.tensor([[30, *tiny.tokens(image(3)), 31]])
        call = whole(tiny, inputs, torch.cat([sequences, new], 1))
        with pytest.raises(ValueError, match="masks new images after a cache wrongly"):
            generate(model, call | tiny.media([image(3)]), past_key_values=cache)


def test_an_image_after_a_cached_text(tiny: Tiny) -> None:
    """The cached beginning of a conversation, such as a system prompt."""
    if tiny.name == "gemma3" and VERSION < (5, 23):
        pytest.skip("refused, as in the previous test")
    model = tiny.build()
    row = [1, 5, 6, 7, image(1), 8, 9]
    inputs = tiny.inputs([row])
    with vispruner.apply(model, k=K), torch.no_grad():
        expected = generate(model, inputs)
        cache = model(input_ids=inputs["input_ids"][:, :4], use_cache=True).past_key_values
        assert torch.equal(generate(model, inputs, past_key_values=cache), expected)


def test_a_custom_decoding_loop(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs([TWO])
    with vispruner.apply(model, k=K), torch.no_grad():
        expected = generate(model, inputs)[0, -STEPS:].tolist()
        output = model(**inputs, use_cache=True)
        found = []
        for _ in range(STEPS):
            scores = output.logits[:, -1].clone()
            scores[:, 198:] = -torch.inf
            token = scores.argmax(-1, keepdim=True)
            found.append(int(token))
            output = model(input_ids=token, past_key_values=output.past_key_values)
    assert found == expected


def test_a_decoding_loop_with_padding() -> None:
    """The caller's mask has the columns of the full prompt."""
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([[1, 10, 11], TWO])
    with vispruner.apply(model, k=K), torch.no_grad():
        expected = generate(model, inputs)[:, -STEPS:]
        output = model(**inputs, use_cache=True)
        mask, found = inputs["attention_mask"], []
        for _ in range(STEPS):
            scores = output.logits[:, -1].clone()
            scores[:, 198:] = -torch.inf
            found.append(scores.argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones(2, 1).long()], 1)
            output = model(
                input_ids=found[-1], attention_mask=mask, past_key_values=output.past_key_values
            )
    assert torch.equal(torch.cat(found, 1), expected)


def test_a_decoding_loop_over_the_language_model(tiny: Tiny) -> None:
    """Callers of prepare() may continue with the model."""
    if tiny.name == "gemma3":
        pytest.skip("its inputs cannot be prepared")
    model, inputs = tiny.build(), tiny.inputs(ROWS)
    with vispruner.apply(model, k=K), torch.no_grad():
        expected = generate(model, inputs)[:, -1 - STEPS : -STEPS + 1]
        cache = transformers.DynamicCache()
        ready = vispruner.prepare(model, inputs | {"past_key_values": cache})
        hidden = tiny.reader(model)(**ready).last_hidden_state[:, -1:]
        scores = model.lm_head(hidden)[:, -1]
        scores[:, 198:] = -torch.inf
        token = scores.argmax(-1, keepdim=True)
        assert torch.equal(token, expected[:, 1:])
        columns = cache.get_seq_length()
        model(input_ids=token, past_key_values=cache)
        assert cache.get_seq_length() == columns + 1


def test_a_static_cache_passed_by_the_caller(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs(ROWS)
    with vispruner.apply(model, k=K):
        expected = generate(model, inputs)
        cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=200)
        assert torch.equal(generate(model, inputs, past_key_values=cache), expected)


def test_training(tiny: Tiny) -> None:
    """Gradients reach the projector through the retained tokens."""
    model, inputs = tiny.build(), tiny.inputs([TWO])
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids > 190, -100)
    with vispruner.apply(model, k=K):
        model.train()
        model(**inputs, labels=labels).loss.backward()
    inner = model.model
    places = ("multi_modal_projector", "connector", "visual")
    part = next(getattr(inner, place) for place in places if hasattr(inner, place))
    part = getattr(part, "merger", part)
    gradients = [p.grad for p in part.parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[:1])


def test_a_deep_copy_prunes_itself(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs([TWO])
    with vispruner.apply(model, k=K) as pruner:
        expected = generate(model, inputs)
        pruner.last = None
        copied = copy.deepcopy(model)
        assert torch.equal(generate(copied, inputs), expected)
        assert pruner.last is None


def test_the_report(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs([TWO])
    with vispruner.apply(model, k=K) as pruner:
        generate(model, inputs)
    report = pruner.last
    assert report is not None
    assert report.tokens_before == int((inputs["input_ids"] == IMAGE).sum())
    assert report.prompt_before - report.prompt_after == report.tokens_before - report.tokens_after
    for item, own in zip(report.items, (image(1), image(2)), strict=True):
        assert item.before == tiny.length(own)
        keep, features = tiny.chosen(own, K)
        assert item.after == len(features)
        cells = int(torch.tensor(item.grid).prod())
        assert int(item.indices.max()) < cells
        if item.before == cells:
            assert torch.equal(item.indices, keep.nonzero()[:, 0])
        assert len(item.scores) == cells == sum(item.lengths)
        important = torch.zeros(cells, dtype=torch.bool)
        important[item.indices[item.important]] = True
        pictures = zip(item.scores.split(item.lengths), important.split(item.lengths), strict=True)
        for (scores, best), count in zip(pictures, item.ranked, strict=True):
            # In a padded tile, some of the best cells are padding.
            assert best.sum() <= count
            if item.before == cells:
                assert torch.equal(scores[best].sort().values, scores.sort().values[-count:])
    family = pruner._family
    media = family.inputs_of("image", inputs)
    assert media is not None
    expected = family.kept("image", media)
    assert all(item.after <= most for item, most in zip(report.items, expected, strict=True))
    if tiny.name != "llava-next":  # which removes padding
        assert [item.after for item in report.items] == expected
    phases = report.milliseconds
    assert set(phases) == {"vision", "score", "select", "rewrite", "prefill", "decode"}
    assert all(value > 0 for value in phases.values())


def test_phases_of_an_unpruned_model() -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([TWO])
    with unpruned(model) as clock:
        want = generate(model, inputs)
    phases = clock.milliseconds()
    assert set(phases) == {"vision", "prefill", "decode"}
    assert all(value > 0 for value in phases.values())
    with unpruned(model) as clock:
        pass
    assert clock.milliseconds() == {}
    assert torch.equal(generate(model, inputs), want)
    assert "generate" not in vars(model)
    assert clock.milliseconds() == {}


def test_a_clock_removes_taken_spans() -> None:
    clock = Clock(torch.device("cpu"))
    with clock("outer"), clock("inner"):
        pass
    everything = clock.milliseconds()
    assert clock.take() == everything
    assert clock.take() == clock.milliseconds() == {}


def test_prefill_ends_with_the_prompt() -> None:
    clock = Clock(torch.device("cpu"))
    prefill = Prefill(clock, columns=10)
    with clock("prefill"):
        for columns, over in ((4, False), (5, False), (3, True)):
            assert prefill.read({"input_ids": torch.zeros(2, columns)}) == over
            assert ("prefill" in clock.milliseconds()) == over
    assert set(clock.milliseconds()) == {"prefill", "decode"}
