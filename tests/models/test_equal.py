"""A pruned model equals the language model on the retained tokens."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from support.tiny_models import FAMILIES, Auto, Item, LlavaOnevision, Row, Tiny, image, video
from support.tiny_models.base import prune

import vispruner
from vispruner.models import family_of

K = 5
STEPS = 4
ALL = 10**6


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param


def rows_of(tiny: Tiny) -> list[Row]:
    """An image; two images; no image."""
    return [[1, image(0), 10, 11, 12], [1, 20, image(1), 22, image(2), 24, 25], [1, 30, 31, 32]]


def answer(model: Any, inputs: dict[str, Any], **changes: Any) -> Any:
    settings = {
        "max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": [198, 199],
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    with torch.no_grad():
        return model.generate(**inputs, **{**settings, **changes})


def logits_of(output: Any) -> torch.Tensor:
    """(B, steps, V)."""
    return torch.stack(output.logits, 1)


def assert_equals_separate_run(
    tiny: Tiny, rows: list[Row], inputs: dict[str, Any], output: Any
) -> None:
    plain = tiny.build()
    width = inputs["input_ids"].shape[1]
    torch.testing.assert_close(output.sequences[:, :width], inputs["input_ids"])
    for number, row in enumerate(rows):
        tokens = output.sequences[number, width:].tolist()
        with torch.no_grad():
            expected = tiny.logits(plain, row, K, tokens[:-1])[-STEPS:].float()
        found = logits_of(output)[number]
        torch.testing.assert_close(found, expected, atol=tiny.tolerance, rtol=0)


def test_generate_equals_the_language_model_on_the_retained_tokens(tiny: Tiny) -> None:
    rows = rows_of(tiny)
    model = tiny.build()
    inputs = tiny.inputs(rows)
    pruner = vispruner.apply(model, k=K, **tiny.options)
    output = answer(model, inputs)
    assert_equals_separate_run(tiny, rows, inputs, output)
    assert pruner.last is not None
    assert pruner.last.prompt_before == inputs["input_ids"].shape[1]
    dropped = pruner.last.tokens_before - pruner.last.tokens_after
    assert dropped > 0
    assert output.past_key_values.get_seq_length() == pruner.last.prompt_after + STEPS - 1


def test_videos_equal_the_language_model_on_the_retained_tokens(tiny: Tiny) -> None:
    if "video" not in tiny.kinds:
        pytest.skip("the family has no videos")
    rows: list[Row] = [[1, video(0), 10, 11], [1, image(0), 20, video(0), 21, 22]]
    model = tiny.build()
    inputs = tiny.inputs(rows)
    pruner = vispruner.apply(model, k=K, **tiny.options)
    assert_equals_separate_run(tiny, rows, inputs, answer(model, inputs))
    assert pruner.last is not None
    assert [item.modality for item in pruner.last.items] == ["image", "video", "video"]


def test_each_row_of_a_batch_equals_a_separate_call(tiny: Tiny) -> None:
    rows = rows_of(tiny)
    model = tiny.build()
    with vispruner.apply(model, k=K, **tiny.options):
        together = answer(model, tiny.inputs(rows))
        for number, row in enumerate(rows):
            inputs = tiny.inputs([row])
            alone = answer(model, inputs)
            torch.testing.assert_close(
                logits_of(alone)[0], logits_of(together)[number], atol=tiny.tolerance, rtol=0
            )


def test_retaining_all_tokens_changes_nothing(tiny: Tiny) -> None:
    if tiny.options:
        pytest.skip("this layout has no line ends, unlike the unpruned prompt")
    rows = rows_of(tiny)
    if "video" in tiny.kinds:
        rows[2] = [1, 30, video(0), 32]
    inputs = tiny.inputs(rows)
    model = tiny.build()
    expected, expected_forward = answer(model, inputs), forward(model, inputs)
    with vispruner.apply(model, ratio=1.0):
        found, found_forward = answer(model, inputs), forward(model, inputs)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(logits_of(found), logits_of(expected))
    assert torch.equal(found_forward.logits, expected_forward.logits)


def forward(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **more)


class _Thin(LlavaOnevision):
    """The model cuts off all patches of the tiles as padding; line ends remain of a high image."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size

    def size(self, item: Item) -> tuple[int, int]:
        return self._size

    def choose(self, item: Item, k: int | Auto) -> tuple[torch.Tensor, torch.Tensor]:
        _, _, scores = self.patches(self.media([item])["pixel_values"][0])
        packed = self.whole(item)
        stays = torch.ones(len(packed), dtype=torch.bool)
        stays[:36] = prune(packed[None, :36], scores[:1], k)[0]
        return stays, packed[stays]


@pytest.mark.parametrize(("size", "lines"), [((83, 1000), 0), ((1000, 83), 12)])
@pytest.mark.parametrize("k", [K, Auto(mass=0.25, max_k=10)], ids=["k", "auto"])
def test_an_image_whose_tiles_are_only_padding(
    size: tuple[int, int], lines: int, k: int | Auto
) -> None:
    tiny = _Thin(size)
    assert (tiny.tiles(image(0)), tiny.length(image(0))) == (3, 36 + lines)
    row: Row = [1, image(0), 10, 11]
    budget = {"k": k} if isinstance(k, int) else {"k": "auto", "mass": k.mass, "max_k": k.max_k}
    model, inputs = tiny.build(), tiny.inputs([row])
    with vispruner.apply(model, **budget) as pruner:
        found = forward(model, inputs).logits[0]
    with torch.no_grad():
        want = tiny.logits(tiny.build(), row, k, [])
    torch.testing.assert_close(found, want, atol=tiny.tolerance, rtol=0)
    assert pruner.last is not None
    (item,) = pruner.last.items
    assert lines < item.after < item.before == 36 + lines
    family = family_of(model)(model, vispruner.Budget(K))
    assert family.kept("image", inputs) == [K + lines]


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_logits_and_loss(tiny: Tiny, side: str) -> None:
    rows = rows_of(tiny)
    plain, model = tiny.build(), tiny.build()
    inputs = tiny.inputs(rows, side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    text = mask.bool() & (ids < 190) & (ids != 1)  # no token precedes the first
    labels = ids.masked_fill(~text, -100)
    with vispruner.apply(model, k=K, logits="kept", **tiny.options):
        output = forward(model, inputs, labels=labels)
    losses = []
    for number, row in enumerate(rows):
        with torch.no_grad():
            expected = tiny.logits(plain, row, K, [])
        length = len(expected)
        own = output.logits[number, -length:] if side == "left" else output.logits[number, :length]
        torch.testing.assert_close(own, expected, atol=tiny.tolerance, rtol=0)
        # Text after text or a retained token: the label of column t is that of token t + 1.
        tokens = torch.tensor([t for t in tiny.ids(row) if t < 190])
        places = label_columns(tiny, row, length)
        for place, token in zip(places, tokens.tolist(), strict=True):
            if token != 1:
                losses.append(-expected[place - 1].log_softmax(-1)[token])
    torch.testing.assert_close(output.loss.double(), torch.stack(losses).mean(), atol=1e-5, rtol=0)


def label_columns(tiny: Tiny, row: Row, length: int) -> list[int]:
    """Columns of the text tokens in the shortened prompt."""
    columns, column = [], 0
    for part in row:
        if isinstance(part, int):
            columns.append(column)
            column += 1
            continue
        keep, _ = tiny.chosen(part, K)
        stays = iter(keep.tolist())
        for token in tiny.tokens(part):
            if token >= 198:
                column += next(stays)
            else:
                if token < 190:
                    columns.append(column)
                column += 1
    assert column == length
    return columns


def test_prepare_feeds_the_language_model(tiny: Tiny) -> None:
    rows = rows_of(tiny)
    if "video" in tiny.kinds:
        rows[2] = [1, 30, video(0), 32]
    inputs = tiny.inputs(rows)
    model = tiny.build()
    with vispruner.apply(model, k=K, **tiny.options), torch.no_grad():
        if tiny.name == "gemma3":
            with pytest.raises(vispruner.UnsupportedModelError, match="masks for image tokens"):
                vispruner.prepare(model, inputs)
            return
        expected = model(**inputs).logits
        ready = vispruner.prepare(model, inputs)
        hidden = tiny.reader(model)(**ready).last_hidden_state
    # The positions of a row may differ by a constant, which RoPE rounds to float32.
    torch.testing.assert_close(model.lm_head(hidden), expected, atol=3 * tiny.tolerance, rtol=0)


def test_remove_restores_the_model(tiny: Tiny) -> None:
    inputs = tiny.inputs(rows_of(tiny))
    model = tiny.build()
    expected = answer(model, inputs)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    pruner = vispruner.apply(model, k=K, **tiny.options)
    answer(model, inputs)
    pruner.remove()
    pruner.remove()
    found = answer(model, inputs)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(logits_of(found), logits_of(expected))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not any("vispruner" in repr(hook) for hook in module._forward_hooks.values())


def test_the_encoder_keeps_its_attention_and_no_hooks(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny.inputs(rows_of(tiny))
    model = tiny.build()
    used = set()
    scaled = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        used.add("sdpa")
        return scaled(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with vispruner.apply(model, k=K, **tiny.options):
        before = {name: len(m._forward_hooks) for name, m in model.named_modules()}
        forward(model, inputs)
        after = {name: len(m._forward_hooks) for name, m in model.named_modules()}
        assert {
            part._attn_implementation for part in (model.config, model.config.vision_config)
        } == {"sdpa"}
    assert used == {"sdpa"}
    # transformers itself adds hooks when hidden states are first requested
    assert all(
        after[name] == before[name] for name in after if name.endswith(("q_proj", "k_proj", "qkv"))
    )
    towers = ("vision_tower", "image_tower", "video_tower", "visual")
    for name, module in model.named_modules():
        if any(tower in name for tower in towers) or name.endswith("projector"):
            assert not module._forward_pre_hooks


def test_bfloat16(tiny: Tiny) -> None:
    inputs = tiny.inputs(rows_of(tiny))
    inputs = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    model = tiny.build(torch.bfloat16)
    with vispruner.apply(model, k=K, **tiny.options):
        output = answer(model, inputs)
    assert logits_of(output).isfinite().all()


def test_ratio(tiny: Tiny) -> None:
    inputs = tiny.inputs(rows_of(tiny))
    model = tiny.build()
    with vispruner.apply(model, ratio=0.25, **tiny.options) as pruner:
        forward(model, inputs)
    assert pruner.last is not None
    assert pruner.last.tokens_after < 0.5 * pruner.last.tokens_before
    for item in pruner.last.items:
        assert item.indices.diff().gt(0).all()
