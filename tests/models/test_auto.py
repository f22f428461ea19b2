"""k="auto": the number of retained tokens of a picture follows from its scores."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from support.tiny_models import (
    FAMILIES,
    Auto,
    Gemma3,
    Llava,
    LlavaNext,
    LlavaNextTiles,
    LlavaNextVideo,
    LlavaOnevision,
    Qwen25,
    Row,
    Tiny,
    VideoLlava,
    image,
    video,
)

import vispruner
from vispruner import releases
from vispruner.selection import Budget

AUTO = Auto(mass=0.25, max_k=10)
SETTINGS = {"k": "auto", "mass": AUTO.mass, "max_k": AUTO.max_k}
EQUAL_PICTURES = ("gemma3", "internvl", "internvl-qk-norm", "video-llava")
ROWS: list[Row] = [
    [1, image(0), 10, 11, 12],
    [1, 20, image(1), 22, image(2), 24, 25],
    [1, image(3), 30],
    [1, 31, 32],
]


RAGGED = [tiny for tiny in FAMILIES if tiny.name not in EQUAL_PICTURES]


def answer(model: Any, inputs: dict[str, Any], **changes: Any) -> Any:
    with torch.no_grad():
        return model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
            output_logits=True, suppress_tokens=[198, 199], **changes,
        )  # fmt: skip


# --------------------------------------------------------------------------------------- the counts
@pytest.mark.parametrize("mass", [1e-9, 0.1, 0.5, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["normal", "skewed", "ties", "tiny"])
def test_counts_equal_exact_integers(kind: str, mass: float) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 2, 36, 577, 1024]
    scores = torch.rand(sum(lengths), generator=generator)
    if kind == "skewed":
        scores = scores**20
    elif kind == "ties":
        scores = (scores * 4).round() / 4 + 0.25
    elif kind == "tiny":
        scores = scores * 1e-38 + 1e-40
    budget = Budget("auto", mass=mass, max_k=600)
    want = [Auto(mass, 600).count(row) for row in scores.split(lengths)]
    assert budget.counts(scores, lengths) == want
    assert budget.counts(scores.double(), lengths) == want
    assert [budget.counts(row, [len(row)])[0] for row in scores.split(lengths)] == want


@pytest.mark.parametrize(
    ("scores", "want"),
    [
        ([0.0, 0.0, 0.0], 1),
        ([-1.0, -2.0, -3.0], 1),
        ([math.nan, 1.0, math.nan], 1),
        ([math.nan] * 3, 1),
        ([math.inf, 1.0, 1.0], 1),
        ([math.inf, math.inf, 1.0], 2),
        ([-math.inf, 1.0, 1.0], 2),
        ([1.0, 2**-26, 2**-26], 1),  # weights below one half of 2^-24 are 0
    ],
)
def test_counts_of_special_values(scores: list[float], want: int) -> None:
    assert Budget("auto", mass=1.0).counts(torch.tensor(scores), [3]) == [want]


def test_counts_of_several_pictures_in_one_part() -> None:
    scores = torch.rand(72, generator=torch.Generator().manual_seed(2)) + 1
    budget = Budget("auto", mass=0.9, max_k=8)
    assert budget.counts(scores, [72], [2]) == [16]
    assert budget.counts(scores, [72]) == [8]
    assert budget.count(72, 2) == 16


# ----------------------------------------------------------------------------------------- models
@pytest.mark.parametrize("tiny", RAGGED, ids=lambda tiny: tiny.name)
def test_generate_equals_the_language_model_on_the_retained_tokens(tiny: Tiny) -> None:
    if tiny.name in ("idefics3", "smolvlm") and not releases.separates_pictures_of_idefics3():
        with pytest.raises(vispruner.UnsupportedModelError, match="needs transformers 5"):
            vispruner.apply(tiny.build(), "auto")
        return
    plain, model = tiny.build(), tiny.build()
    inputs = tiny.inputs(ROWS)
    width = inputs["input_ids"].shape[1]
    # transformers mixes up several images of a row, and pruning refuses it (test_generate.py)
    mixed = releases.takes_encoder_outputs(model) and releases.mixes_repeated_images(model)
    count = 1 if mixed else 2
    with vispruner.apply(model, **SETTINGS, **tiny.options) as pruner:
        output = answer(model, inputs)
        beams = answer(model, inputs, num_beams=count).sequences[:, width:]
        for number, row in enumerate(ROWS):
            tokens = output.sequences[number, width:].tolist()
            with torch.no_grad():
                want = tiny.logits(plain, row, AUTO, tokens[:-1])[-4:].float()
            found = torch.stack(output.logits, 1)[number]
            torch.testing.assert_close(found, want, atol=tiny.tolerance, rtol=0)
            own = tiny.inputs([row])
            alone = answer(model, own, num_beams=count).sequences[:, own["input_ids"].shape[1] :]
            assert torch.equal(alone[0], beams[number])
    assert pruner.last is not None
    for item in pruner.last.items:
        if len(item.lengths) == 1:
            assert int(item.important.sum()) == item.ranked[0] == len(item.indices) // 2


@pytest.mark.parametrize("tiny", [Llava(), LlavaNext(), Qwen25()], ids=lambda tiny: tiny.name)
def test_pictures_retain_different_numbers(tiny: Tiny) -> None:
    model = tiny.build()
    with vispruner.apply(model, "auto", mass=0.25) as pruner:
        answer(model, tiny.inputs([[1, *(image(n) for n in range(6)), 2]]))
    assert pruner.last is not None
    assert len({len(item.indices) for item in pruner.last.items}) > 1


def test_all_tiles_are_refused_by_the_number_that_is_retained() -> None:
    """Without max_k, an image could retain more tokens than it has placeholders."""
    tiny = LlavaNextTiles()
    row: Row = [1, image(0), 10, 11]
    model, inputs = tiny.build(), tiny.inputs([row])
    assert 36 * tiny.tiles(image(0)) == 108 > 102 == tiny.length(image(0))
    auto = Auto(mass=0.1, max_k=36)
    with torch.no_grad():
        want = tiny.logits(tiny.build(), row, auto, [])
        with vispruner.apply(model, "auto", mass=auto.mass, tiles="all"):
            found = model(**inputs).logits[0]
            torch.testing.assert_close(found, want, atol=tiny.tolerance, rtol=0)
        complaint = "an image 108 tokens, more than the 102 of the unpruned model: lower mass or"
        with (
            vispruner.apply(model, "auto", mass=1.0, tiles="all"),
            pytest.raises(ValueError, match=complaint),
        ):
            model(**inputs)


@pytest.mark.parametrize("tiny", [Llava(), LlavaNext(), Qwen25()], ids=lambda tiny: tiny.name)
def test_gradients_of_a_batch_are_the_sum_of_its_rows(tiny: Tiny) -> None:
    rows = ROWS[:3]

    def gradients(model: Any, rows: list[Row]) -> dict[str, torch.Tensor]:
        inputs = tiny.inputs(rows, "right")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        labels = ids.masked_fill((mask == 0) | (ids > 190) | (ids == 1), -100)
        # Divided by 1, not by the number of labels: then the losses of rows add up.
        model(**inputs, labels=labels, num_items_in_batch=torch.tensor(1)).loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    model = tiny.build().train()
    with vispruner.apply(model, **SETTINGS, **tiny.options):
        together = gradients(model, rows)
        alone = [gradients(model, [row]) for row in rows]
    assert any("visual" in name or "projector" in name for name in together)
    for name, found in together.items():
        want = sum(one[name] for one in alone if name in one)
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": "automatic"}, TypeError, "k must be an int or 'auto', got 'automatic'"),
        ({"k": "auto", "ratio": 0.5}, ValueError, "exactly one of k and ratio"),
        ({"k": "auto", "mass": 0.0}, ValueError, r"mass must be in \(0, 1\], got 0.0"),
        ({"k": "auto", "mass": 1.5}, ValueError, r"mass must be in \(0, 1\], got 1.5"),
        ({"k": "auto", "mass": math.nan}, ValueError, r"mass must be in \(0, 1\], got nan"),
        ({"k": "auto", "mass": "half"}, TypeError, "mass must be a float, got 'half'"),
        ({"k": "auto", "max_k": 0}, ValueError, "max_k must be at least 1, got 0"),
        ({"k": "auto", "max_k": 2.5}, TypeError, "max_k must be an int, got 2.5"),
        ({"k": 5, "mass": 0.5}, ValueError, "mass is a setting of k='auto', got mass=0.5 with k=5"),
        ({"ratio": 0.5, "max_k": 9}, ValueError, "max_k is a setting of k='auto'"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Llava().build()
    with pytest.raises(error, match=message):
        vispruner.apply(model, **arguments)
    vispruner.apply(model, k=5).remove()


@pytest.mark.parametrize("tiny", [Gemma3(), VideoLlava()], ids=lambda tiny: tiny.name)
def test_models_with_equal_pictures_refuse(tiny: Tiny) -> None:
    with pytest.raises(vispruner.UnsupportedModelError, match="k='auto' cannot be used with"):
        vispruner.apply(tiny.build(), k="auto")


@pytest.mark.parametrize("tiny", [LlavaOnevision(), LlavaNextVideo()], ids=lambda tiny: tiny.name)
def test_videos_with_equal_frames_refuse(tiny: Tiny) -> None:
    model = tiny.build()
    with (
        vispruner.apply(model, k="auto"),
        pytest.raises(ValueError, match="k='auto' cannot be used with videos in"),
    ):
        answer(model, tiny.inputs([[1, video(0), 10]]))


def test_arguments_of_a_budget_make_an_equal_budget() -> None:
    for budget in (
        Budget("auto", mass=0.5, max_k=9),
        Budget("auto"),
        Budget(7, method="mmr", mmr_lambda=2),
        Budget(ratio=0.25, step=4),
    ):
        assert Budget(**budget.arguments) == budget
