"""Rows that are padded by the caller, by pruning, or by both equal the rows alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from support.generation import STEPS, close, generate
from support.tiny_models import (
    Gemma3,
    Glm4v,
    Idefics3,
    InternVL,
    Llava,
    LlavaNext,
    Qwen3,
    Qwen25,
    Qwen35,
    Tiny,
    image,
)
from torch import Tensor

import vispruner
from vispruner import releases
from vispruner.hf import rope_delta
from vispruner.hf.labels import Columns
from vispruner.hf.layout import shorten

K = 5
EVERYTHING = 10**6
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
COUNTING = (Llava(), LlavaNext(), InternVL(), Idefics3(), Gemma3())  # positions count columns
GRID = (Qwen25(), Qwen3(), Glm4v())
PICTURE = [1, image(1), 10, 11]
TWO = [1, 20, image(1), 22, image(2), 24, 25]
NEXT = torch.tensor([[30], [31]])


def text(length: int) -> list[int]:
    return [1, *(5 + i % 9 for i in range(length - 1))]


def extended(mask: Tensor) -> Tensor:
    return torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)


def step_alone(model: Any, tiny: Tiny, row: Any, token: Tensor) -> Tensor:
    output = model(**tiny.inputs([row]), use_cache=True)
    return model(input_ids=token[None], past_key_values=output.past_key_values).logits[0, -1]


# ------------------------------------------------------------------------- a step of the caller
@pytest.mark.parametrize("longer", [0, 9])
@pytest.mark.parametrize("tiny", [*COUNTING, *GRID], ids=lambda tiny: tiny.name)
def test_a_step_after_a_batch_whose_longest_row_has_no_image(tiny: Tiny, longer: int) -> None:
    """The shortened prompt is as wide as the prompt: the mask's width does not say whose it is."""
    model = tiny.build()
    rows = [PICTURE, text(len(tiny.ids(PICTURE)) + longer)]
    inputs = tiny.inputs(rows)
    with vispruner.apply(model, k=K), torch.no_grad():
        expected = step_alone(model, tiny, PICTURE, NEXT[0])
        output = model(**inputs, use_cache=True)
        mask = extended(inputs["attention_mask"])
        found = model(input_ids=NEXT, attention_mask=mask, past_key_values=output.past_key_values)
        close(found.logits[0, -1], expected)
        # generate with the new tokens and a mask of all
        output = generate(model, inputs, return_dict_in_generate=True)
        ids = torch.cat([output.sequences, NEXT], 1)
        more = torch.ones(2, STEPS + 1).long()
        mask = torch.cat([inputs["attention_mask"], more], 1)
        again = generate(
            model, inputs | {"input_ids": ids, "attention_mask": mask} | tiny.typed(ids)
        )
        new = {"input_ids": ids[:, -2:], "attention_mask": mask} | tiny.typed(ids[:, -2:])
        found = generate(model, new, past_key_values=output.past_key_values)
        assert torch.equal(found[:, -STEPS:], again[:, -STEPS:])


def test_a_step_with_the_mask_of_the_cache() -> None:
    """The other meaning of a mask of that width."""
    tiny = Llava()
    model = tiny.build()
    inputs = tiny.inputs([PICTURE, text(len(tiny.ids(PICTURE)) + 9)])
    with vispruner.apply(model, k=K), torch.no_grad():
        expected = step_alone(model, tiny, PICTURE, NEXT[0])
        mask = vispruner.prepare(model, inputs)["attention_mask"]
        assert mask.shape == inputs["attention_mask"].shape
        output = model(**inputs, use_cache=True)
        call = {"attention_mask": extended(mask), "past_key_values": output.past_key_values}
        close(model(input_ids=NEXT, **call).logits[0, -1], expected)


@pytest.mark.parametrize("k", [EVERYTHING, K])
@pytest.mark.parametrize("tiny", COUNTING, ids=lambda tiny: tiny.name)
def test_a_step_after_a_batch_padded_on_the_right(tiny: Tiny, k: int) -> None:
    """The row without padding, as without pruning."""
    model = tiny.build()
    inputs = tiny.inputs([PICTURE, text(len(tiny.ids(PICTURE)) - 1)], "right")
    with vispruner.apply(model, k=k), torch.no_grad():
        expected = step_alone(model, tiny, PICTURE, NEXT[0])
        output = model(**inputs, use_cache=True)
        cache, mask = output.past_key_values, extended(inputs["attention_mask"])
        found = model(input_ids=NEXT, attention_mask=mask, past_key_values=cache)
        close(found.logits[0, -1], expected)


@pytest.mark.parametrize("tiny", [*COUNTING, *GRID], ids=lambda tiny: tiny.name)
def test_a_step_after_generate(tiny: Tiny) -> None:
    """The rows have no padding before pruning; generate counts positions by the mask."""
    model = tiny.build()
    rows = [PICTURE, text(len(tiny.ids(PICTURE)))]
    with vispruner.apply(model, k=K), torch.no_grad():
        output = generate(model, tiny.inputs(rows), return_dict_in_generate=True)
        answers = output.sequences[:, -STEPS:].tolist()
        cache = output.past_key_values
        # the last token of an answer is not in the cache
        found = model(input_ids=output.sequences[:, -1:], past_key_values=copy.deepcopy(cache))
        mask = torch.ones_like(output.sequences)
        token = output.sequences[:, -1:]
        masked = model(input_ids=token, attention_mask=mask, past_key_values=cache)
        for row in (0, 1):
            alone = model(**tiny.inputs([[*rows[row], *answers[row]]])).logits[0, -1]
            close(masked.logits[row, -1], alone)
            close(found.logits[row, -1], alone)


@pytest.mark.parametrize("tiny", COUNTING, ids=lambda tiny: tiny.name)
def test_a_later_turn_in_which_one_row_has_an_image(tiny: Tiny) -> None:
    """Without position ids, the padding that pruning adds between the turns does not count."""
    if tiny.name == "gemma3":
        pytest.skip("needs token_type_ids of the conversation")
    model = tiny.build()
    first = tiny.inputs([[1, 5, 6, 7], [1, 8, 9, 4]])
    new = [30, image(3), 31]
    rows = [[1, 5, 6, 7, *new], [1, 8, 9, 4, *text(len(tiny.ids(new)))]]
    every = tiny.inputs(rows)
    own = {name: value for name, value in every.items() if name not in ("token_type_ids",)}
    own |= {"input_ids": every["input_ids"][:, 4:]}
    with vispruner.apply(model, k=K), torch.no_grad():
        expected = [model(**tiny.inputs([row])).logits[0, -1] for row in rows]
        cache = model(**first, use_cache=True).past_key_values
        found = model(**own, past_key_values=cache)
        for row in (0, 1):
            close(found.logits[row, -1], expected[row])
        mask = extended(every["attention_mask"])
        step = model(input_ids=NEXT, attention_mask=mask, past_key_values=cache)
        for row in (0, 1):
            close(step.logits[row, -1], step_alone(model, tiny, rows[row], NEXT[row]))


@pytest.mark.parametrize("tiny", [*COUNTING[:-1], *GRID], ids=lambda tiny: tiny.name)
def test_turns_in_which_different_rows_have_images(tiny: Tiny) -> None:
    """What pruning adds to a row in one turn counts in the next ones as well."""
    model = tiny.build()
    new = [30, image(3), 31]
    other = [32, *text(len(tiny.ids(new)) - 1)]
    turns = [[new, other], [new, other], [other, new]]
    with vispruner.apply(model, k=K), torch.no_grad():
        rows: list[list[Any]] = [[], []]
        cache = None
        for turn in turns:
            rows = [[*before, *more] for before, more in zip(rows, turn, strict=True)]
            call = {n: v for n, v in tiny.inputs(turn).items() if n != "attention_mask"}
            output = model(**call, use_cache=True, past_key_values=cache)
            cache = output.past_key_values
            for row in (0, 1):
                close(output.logits[row, -1], model(**tiny.inputs([rows[row]])).logits[0, -1])


@pytest.mark.parametrize("tiny", [*COUNTING, *GRID], ids=lambda tiny: tiny.name)
def test_a_step_of_embeddings_equals_a_step_of_ids(tiny: Tiny) -> None:
    model = tiny.build()
    inputs = tiny.inputs([[1, 5, image(1), 10], TWO])
    embeds = model.get_input_embeddings()(NEXT)
    with vispruner.apply(model, k=K), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        mask = extended(inputs["attention_mask"])
        call = {"attention_mask": mask, "past_key_values": copy.deepcopy(cache)}
        expected = model(input_ids=NEXT, **call).logits
        call["past_key_values"] = copy.deepcopy(cache)
        close(model(inputs_embeds=embeds, **call).logits, expected)
        with pytest.raises(ValueError, match=r"generate cannot continue .* pass input_ids"):
            generate(
                model, {"inputs_embeds": embeds, "attention_mask": mask, "past_key_values": cache}
            )


# ------------------------------------------------------- prompts on the left, answers on the right
ANSWERS = [[30, 31, 32, 33], [40, 41]]


def mixed(tiny: Tiny) -> dict[str, Any]:
    """Prompts padded on the left and answers padded on the right, as for reinforcement learning."""
    inputs = tiny.inputs([[1, image(0), 10], TWO])
    width = max(map(len, ANSWERS))
    answers = torch.tensor([answer + [0] * (width - len(answer)) for answer in ANSWERS])
    ids = torch.cat([inputs["input_ids"], answers], 1)
    mask = torch.cat([inputs["attention_mask"], (answers != 0).long()], 1)
    return inputs | {"input_ids": ids, "attention_mask": mask} | tiny.typed(ids)


@pytest.mark.parametrize("options", [{"k": EVERYTHING}, {"k": K}, {"k": K, "logits": "prompt"}])
@pytest.mark.parametrize("tiny", [*COUNTING, *GRID], ids=lambda tiny: tiny.name)
def test_the_last_columns_are_those_of_the_answers(tiny: Tiny, options: dict[str, Any]) -> None:
    model, call = tiny.build(), mixed(tiny)
    with torch.no_grad():
        unpruned = model(**call).logits[call["attention_mask"].bool()]
        with vispruner.apply(model, **options):
            found = model(**call, logits_to_keep=5).logits
            assert found.shape[1] == 5
            for row, (prompt, answer) in enumerate(
                zip([[1, image(0), 10], TWO], ANSWERS, strict=True)
            ):
                alone = model(**tiny.inputs([[*prompt, *answer]])).logits[0]
                close(found[row, : len(answer) + 1], alone[-len(answer) - 1 :])
            if options["k"] == EVERYTHING:
                assert torch.equal(model(**call).logits[call["attention_mask"].bool()], unpruned)


def test_the_last_columns_of_a_batch_padded_on_the_right() -> None:
    """Equally long prompts that retain different numbers of tokens."""
    tiny = LlavaNext()
    model = tiny.build()
    rows: list[list[Any]] = [[1, image(0), 10], [1, image(1), 10]]
    lengths = [len(tiny.ids(row)) for row in rows]
    rows = [[*[1] * (max(lengths) - n), *row] for row, n in zip(rows, lengths, strict=True)]
    inputs = tiny.inputs([[*rows[0], 30, 31], [*rows[1], 40]], "right")
    with vispruner.apply(model, k=K), torch.no_grad():
        found = model(**inputs, logits_to_keep=3).logits
        close(found[0], model(**tiny.inputs([[*rows[0], 30, 31]])).logits[0, -3:])
        close(found[1, :2], model(**tiny.inputs([[*rows[1], 40]])).logits[0, -2:])


def test_holes_of_a_mask_stay() -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([[1, image(0), 10, 11, 12], TWO])
    inputs["attention_mask"][:, -2] = 0
    here = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits[here]
        with vispruner.apply(model, k=EVERYTHING):
            assert torch.equal(model(**inputs).logits[here], expected)


def test_last_columns_that_reach_into_an_image_are_refused() -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([TWO])
    refused = pytest.raises(ValueError, match="logits_to_keep=6 reaches into the images")
    with vispruner.apply(model, k=K), torch.no_grad(), refused:
        model(**inputs, logits_to_keep=6)
    with vispruner.apply(model, k=EVERYTHING), torch.no_grad():  # nothing is dropped
        assert model(**inputs, logits_to_keep=6).logits.shape[1] == 6


# ------------------------------------------------------------- padding that the model cannot skip
@pytest.mark.parametrize(("tiny", "tail", "refused"), [
    (Qwen35(), 4, True), (Gemma3(), 70, True), (Gemma3(), 4, False), (Qwen3(), 4, False),
], ids=lambda value: getattr(value, "name", str(value)))  # fmt: skip
def test_padding_between_turns_that_the_model_reads_is_refused(
    tiny: Tiny, tail: int, refused: bool
) -> None:
    if tiny.name == "gemma3" and VERSION < (5, 23):
        pytest.skip("new images after a cache are refused")
    model = tiny.build()
    first = [[1, image(0), 10, 11], [1, image(0), 12, 13]]
    new = [30, image(2), *[31] * tail]
    with vispruner.apply(model, k=K):
        output = generate(model, tiny.inputs(first), return_dict_in_generate=True)
        answers = output.sequences[:, -STEPS:].tolist()
        rows = [
            [*first[0], *answers[0], *new],
            [*first[1], *answers[1], *text(len(tiny.ids(new)))],
        ]
        call = tiny.inputs(rows)
        if refused:
            with pytest.raises(ValueError, match="one row per call"):
                generate(model, call, past_key_values=output.past_key_values)
            return
        expected = torch.cat([generate(model, tiny.inputs([row]))[:, -STEPS:] for row in rows])
        found = generate(model, call, past_key_values=output.past_key_values)[:, -STEPS:]
        assert torch.equal(found, expected)


# ------------------------------------------------------------------------ caches of other prompts
@pytest.mark.parametrize("tiny", [*GRID, Qwen35()], ids=lambda tiny: tiny.name)
def test_an_image_after_a_cached_text_and_another_prompt(tiny: Tiny) -> None:
    """The model's RoPE delta is that of the other prompt."""
    model = tiny.build()
    inputs, other = tiny.inputs([[1, 5, 6, 7, image(1), 8, 9]]), tiny.inputs([[1, image(0), 9]])
    with vispruner.apply(model, k=K), torch.no_grad():
        expected = generate(model, inputs)
        cache = model(input_ids=inputs["input_ids"][:, :4], use_cache=True).past_key_values
        whole = model(**inputs).logits[:, -1]
        generate(model, other)
        found = generate(model, inputs, past_key_values=copy.deepcopy(cache))
        assert torch.equal(found, expected)
        new = inputs | {"input_ids": inputs["input_ids"][:, 4:]}
        new |= tiny.typed(new["input_ids"])
        close(model(**new, past_key_values=cache).logits[:, -1], whole)


@pytest.mark.parametrize("tiny", [*GRID, Qwen35()], ids=lambda tiny: tiny.name)
def test_an_image_after_a_turn_of_text_and_another_prompt(tiny: Tiny) -> None:
    model = tiny.build()
    with vispruner.apply(model, k=K):
        turn = generate(model, tiny.inputs([[1, 5, 6, 7]]), return_dict_in_generate=True)
        generate(model, tiny.inputs([[1, image(0), 9]]))
        call = tiny.inputs([[*turn.sequences[0].tolist(), 30, image(1), 31]])
        found = generate(model, call, past_key_values=turn.past_key_values)
        assert torch.equal(found, generate(model, call))


def test_a_new_image_after_a_cache_of_unknown_content_is_refused() -> None:
    """It was filled before `apply`; the model may hold the delta of another prompt."""
    tiny = Qwen25()
    model = tiny.build()
    first = tiny.inputs([[1, image(0), 9]])
    cache = generate(model, first, return_dict_in_generate=True).past_key_values
    with vispruner.apply(model, k=K), torch.no_grad():
        new = tiny.inputs([[30, image(1), 31]])
        mask = torch.ones(1, cache.get_seq_length() + new["input_ids"].shape[1]).long()
        with pytest.raises(ValueError, match=r"RoPE delta .* start a new conversation"):
            model(**new | {"attention_mask": mask}, past_key_values=cache)


@pytest.mark.parametrize("tiny", [*COUNTING, *GRID], ids=lambda tiny: tiny.name)
def test_generate_on_a_batch_padded_on_the_right(tiny: Tiny) -> None:
    """The row without padding, as without pruning."""
    model = tiny.build()
    inputs = tiny.inputs([PICTURE, text(len(tiny.ids(PICTURE)) - 3)], "right")
    with vispruner.apply(model, k=K):
        expected = generate(model, tiny.inputs([PICTURE]))[0, -STEPS:]
        assert torch.equal(generate(model, inputs)[0, -STEPS:], expected)


def test_a_step_over_padding_that_the_model_reads_is_refused() -> None:
    tiny = Qwen35()
    model = tiny.build()
    inputs = tiny.inputs([PICTURE, text(len(tiny.ids(PICTURE)) - 3)], "right")
    with vispruner.apply(model, k=K), torch.no_grad():
        output = model(**inputs, use_cache=True)
        call = {"past_key_values": output.past_key_values}
        call["attention_mask"] = extended(inputs["attention_mask"])
        with pytest.raises(ValueError, match="padded on the left"):
            model(input_ids=NEXT, **call)


def test_a_step_with_a_mask_of_the_cache_that_hides_more() -> None:
    tiny = Llava()
    model = tiny.build()
    inputs = tiny.inputs([PICTURE, text(len(tiny.ids(PICTURE)) + 9)])
    hidden = extended(inputs["attention_mask"])
    hidden[1, 3] = 0
    with vispruner.apply(model, k=K), torch.no_grad():
        own = extended(vispruner.prepare(model, inputs)["attention_mask"])
        own[1, 3] = 0  # the row drops no token, so the column is the same
        cache = model(**inputs, use_cache=True).past_key_values
        call = {"input_ids": NEXT, "past_key_values": copy.deepcopy(cache)}
        expected = model(**call, attention_mask=hidden).logits
        call["past_key_values"] = cache
        close(model(**call, attention_mask=own).logits, expected)


def test_pictures_after_a_cached_text_make_its_delta_unknown() -> None:
    """Those that are not pruned, as encoder outputs of the caller."""

    class Cache:
        columns = 0

        def get_seq_length(self) -> int:
            return self.columns

    def fill() -> None:
        cache.columns += 4

    cache, ids = Cache(), torch.ones(1, 8).long()
    family: Any = SimpleNamespace(
        has_grid_positions=True,
        encoders={"image": ""},
        pixels_name=lambda modality, call: None,
        rope_delta=lambda: torch.tensor([[-3]]),
    )
    text_call = {"input_ids": ids[:, :4], "cache": cache}
    for _ in range(2):
        rope_delta.noted(family, text_call, fill)
        assert rope_delta.of_cache(family, cache, ids, None, whole=False) is None
    rope_delta.noted(family, text_call | {"mm_encoder_outputs": {"image": ...}}, fill)
    with pytest.raises(ValueError, match="RoPE delta of this cache is unknown"):
        rope_delta.of_cache(family, cache, ids, None, whole=False)


# --------------------------------------------------------------------- arguments with the columns
@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "seq_idx"])
def test_lengths_of_packed_prompts_are_refused(name: str) -> None:
    """They are those of the prompts before pruning."""
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([[*PICTURE, *TWO]])
    bounds = torch.tensor([0, len(tiny.ids(PICTURE)), len(tiny.ids([*PICTURE, *TWO]))])
    refused = pytest.raises(ValueError, match=rf"^{name} describes[^\n]*$")
    with vispruner.apply(model, k=K), refused:
        model(**inputs, **{name: bounds})


@pytest.mark.parametrize("tiny", COUNTING, ids=lambda tiny: tiny.name)
def test_one_row_of_positions_and_mask_for_a_batch(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs([TWO, TWO])
    length = inputs["input_ids"].shape[1]
    positions, mask = torch.arange(length)[None], torch.ones(1, length).long()
    with vispruner.apply(model, k=K), torch.no_grad():
        want = model(**inputs, use_cache=True)
        call = inputs | {"position_ids": positions, "attention_mask": mask}
        found = model(**call, use_cache=True)
        close(found.logits, want.logits)
        want = model(input_ids=NEXT, past_key_values=want.past_key_values).logits
        cached = {
            "past_key_values": found.past_key_values,
            "position_ids": torch.tensor([[length]]),
        }
        close(model(input_ids=NEXT, **cached).logits, want)


def test_shapes_that_do_not_match_are_refused() -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([TWO, TWO])
    length = inputs["input_ids"].shape[1]
    with vispruner.apply(model, k=K):
        with pytest.raises(ValueError, match=r"position_ids must have shape \(2, \d+\)"):
            model(**inputs, position_ids=torch.arange(length + 1)[None])
        with pytest.raises(ValueError, match=r"position_ids must have shape \(2, \d+\), as"):
            model(**inputs, position_ids=torch.arange(length).expand(3, 2, -1))  # of Qwen
        with pytest.raises(ValueError, match="attention_mask has 3 rows, input_ids 2"):
            model(**inputs | {"attention_mask": torch.ones(3, length).long()})
        with pytest.raises(ValueError, match=r"input_ids must have shape \(B, L\)"):
            model(**inputs | {"input_ids": inputs["input_ids"][0]})

    tiny = Qwen25()
    model, inputs = tiny.build(), tiny.inputs([TWO])
    positions = torch.arange(inputs["input_ids"].shape[1])
    expected = r"\(1, (\d+)\) or \(3, 1, \1\), as input_ids, got \(2,"
    with vispruner.apply(model, k=K), pytest.raises(ValueError, match=expected):
        model(**inputs, position_ids=positions.expand(2, 1, -1))


def test_a_forward_whose_signature_has_no_names() -> None:
    class Wrapped(transformers.LlavaForConditionalGeneration):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    tiny = Llava()
    model, inputs = Wrapped(tiny.config()).double().eval(), tiny.inputs([TWO])
    ids = inputs.pop("input_ids")
    with vispruner.apply(model, k=K) as pruner, torch.no_grad():
        with pytest.raises(TypeError, match=r"1 positional arguments .* pass them by name"):
            model(ids, **inputs)
        model(input_ids=ids, **inputs)
        assert pruner.last is not None


def test_types_of_tokens_behind_a_cache() -> None:
    """The model needs those of the whole conversation, because it masks images by them."""
    if not releases.masks_images_behind_a_cache():
        pytest.skip("new images after a cache are refused")
    tiny = Gemma3()
    model, inputs = tiny.build(), tiny.inputs([[1, 5, 6, 7, 30, image(3), 31]])
    types = inputs.pop("token_type_ids")
    new = inputs | {"input_ids": inputs["input_ids"][:, 4:]}
    with vispruner.apply(model, k=K), torch.no_grad():
        want = model(**inputs, token_type_ids=types).logits[:, -1]
        cache = model(input_ids=inputs["input_ids"][:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="token_type_ids has 20 columns, expected 24"):
            model(**new, token_type_ids=types[:, 4:], past_key_values=cache)
        close(model(**new, token_type_ids=types, past_key_values=cache).logits[:, -1], want)


def test_labels_behind_a_hole() -> None:
    """A hole that comes to lie before a token, because the image between them was dropped."""
    mask = torch.tensor([[1, 0, 1, 1, 1, 1]]).bool()
    dropped = torch.tensor([[0, 0, 1, 1, 0, 0]]).bool()
    columns = Columns(shorten(mask, dropped, 4, left=True), mask, dropped)
    assert columns.layout.index.tolist() == [[0, 1, 4, 5]]
    labels = torch.tensor([[100, -100, 102, 103, 104, 105]])
    assert columns.labels(labels).tolist() == [[100, -100, -100, 105]]
    mask = torch.tensor([[1, 1, 1, 0, 1, 1]]).bool()  # it was there before
    columns = Columns(shorten(mask, dropped, 5, left=True), mask, dropped)
    assert columns.labels(labels)[0, -2:].tolist() == [104, 105]
