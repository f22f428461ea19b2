"""Labels, losses and trainers: exactly the labels of dropped tokens are removed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from support.tiny_models import FAMILIES as ALL
from support.tiny_models import Llava, LlavaNext, Qwen3, Qwen25, Tiny, image
from torch import Tensor
from torch.nn import functional as F
from transformers.trainer_pt_utils import LabelSmoother

import vispruner

K = 5
FAMILIES: tuple[Tiny, ...] = (Llava(), LlavaNext(), Qwen25(), Qwen3())
ONE, TWO = [1, image(0), 10, 11, 12], [1, 20, image(1), 22, image(2), 24, 25]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param


def loss_sum(model: Any, inputs: dict[str, Any], labels: Tensor) -> tuple[float, int]:
    """The sum of the losses of one row, and their number."""
    left = model(**inputs, labels=labels)
    count = int((model._vispruner_pruner.labels(labels)[:, 1:] != -100).sum())
    return float(left.loss) * count, count


def test_rows_of_one_length_with_different_numbers_of_images(tiny: Tiny) -> None:
    """Pruning adds padding to the batch; nothing is predicted from it."""
    model = tiny.build()
    short = [1, image(1), 12, image(2), 13]
    fill = len(tiny.ids(short)) - len(tiny.ids([1, image(1), 12]))
    long = [1, image(1), 12, *[30 + n % 9 for n in range(fill)]]
    with vispruner.apply(model, k=K, logits="kept"), torch.no_grad():
        batch = tiny.inputs([short, long])
        assert bool(batch["attention_mask"].all())
        labels = batch["input_ids"].masked_fill(batch["input_ids"] > 190, -100)
        together = float(model(**batch, labels=labels).loss)
        alone = [
            loss_sum(model, tiny.inputs([row]), labels[n : n + 1])
            for n, row in enumerate((short, long))
        ]
    expected = sum(total for total, _ in alone) / sum(count for _, count in alone)
    assert together == pytest.approx(expected, abs=1e-5)


def test_padding_by_the_caller_does_not_change_the_loss(tiny: Tiny) -> None:
    """With all tokens retained, the loss is the unpruned one, even for tokens after padding."""
    model, inputs = tiny.build(), tiny.inputs([ONE, TWO])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] > 190, -100)
    with torch.no_grad():
        want = model(**inputs, labels=labels).loss
        with vispruner.apply(model, ratio=1.0):
            assert torch.equal(model(**inputs, labels=labels).loss, want)


def test_a_count_of_the_whole_batch(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs([ONE])
    labels = inputs["input_ids"].clone()
    count = (labels[:, 1:] != -100).sum()
    with vispruner.apply(model, k=K), torch.no_grad():
        mean = model(**inputs, labels=labels).loss
        with pytest.warns(UserWarning, match="num_items_in_batch"):
            counted = model(**inputs, labels=labels, num_items_in_batch=count).loss
        torch.testing.assert_close(counted, mean)
        # two such batches, as in gradient accumulation
        half = model(**inputs, labels=labels, num_items_in_batch=2 * int(count)).loss
        torch.testing.assert_close(half, mean / 2)
        text = labels.masked_fill(labels > 190, -100)
        count = (text[:, 1:] != -100).sum()
        exact = model(**inputs, labels=text, num_items_in_batch=count).loss
        torch.testing.assert_close(exact, model(**inputs, labels=text).loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_shifted_labels(tiny: Tiny, side: str) -> None:
    model, rows = tiny.build(), [ONE, TWO, [1, 5, image(0)]]
    inputs = tiny.inputs(rows, side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
    with vispruner.apply(model, k=K, logits="kept"), torch.no_grad():
        want = model(**inputs, labels=labels).loss
        found = model(**inputs, labels=labels, shift_labels=shifted).loss
        torch.testing.assert_close(found, want)
        # labels after the end of the rows
        beyond = shifted.clone()
        ends = inputs["attention_mask"].cumsum(1).argmax(1)
        beyond[torch.arange(3), ends] = 42
        output = model(**inputs, labels=labels, shift_labels=beyond)
        logits = output.logits
    ends, nats = last_columns(tiny, rows, logits.shape[1], side), []
    for n, column in ends.items():
        nats.append(-float(logits[n, column].float().log_softmax(-1)[42]))
    count = int((vispruner_labels(tiny, labels, inputs)[:, 1:] != -100).sum())
    assert float(output.loss) == pytest.approx(
        (float(want) * count + sum(nats)) / (count + len(nats)), abs=1e-4
    )


def last_columns(tiny: Tiny, rows: list[Any], width: int, side: str) -> dict[int, int]:
    """Row to the column of its last token, for rows whose last token is retained."""
    ends = {}
    for n, row in enumerate(rows):
        retained = []
        for part in row:
            if isinstance(part, int):
                retained.append(True)
                continue
            stays = iter(tiny.chosen(part, K)[0].tolist())
            retained += [next(stays) if token > 197 else True for token in tiny.tokens(part)]
        if retained[-1]:
            ends[n] = width - 1 if side == "left" else sum(retained) - 1
    return ends


def vispruner_labels(tiny: Tiny, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
    model = tiny.build()
    with vispruner.apply(model, k=K) as pruner, torch.no_grad():
        model(**inputs)
        return pruner.labels(labels)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_the_logits(tiny: Tiny, side: str) -> None:
    """A loss computed outside the model equals the model's."""
    model, inputs = tiny.build(), tiny.inputs([ONE, TWO], side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with vispruner.apply(model, k=K, logits="kept") as pruner, torch.no_grad():
        output = model(**inputs, labels=labels)
        own = pruner.labels(labels)
        assert own.shape == output.logits.shape[:2]
        loss = F.cross_entropy(
            output.logits[:, :-1].flatten(0, 1).float(), own[:, 1:].flatten(), ignore_index=-100
        )
        torch.testing.assert_close(loss, output.loss.float())
        with pytest.raises(ValueError, match="labels have shape"):
            pruner.labels(labels[:, 1:])
        text = {n: v[:, :3] for n, v in inputs.items() if n in ("input_ids", "attention_mask")}
        text["input_ids"] = torch.tensor([[5, 6, 7], [8, 9, 10]])
        model(**text)
        assert torch.equal(pruner.labels(labels), labels)  # nothing was pruned


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_in_the_columns_of_the_prompt(tiny: Tiny, side: str) -> None:
    model, inputs = tiny.build(), tiny.inputs([ONE, TWO], side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = ids.masked_fill(~mask | (ids > 190) | (ids == 1), -100)
    with torch.no_grad():
        with vispruner.apply(model, k=K):
            short = model(**inputs, labels=labels)
        with vispruner.apply(model, k=K, logits="prompt") as pruner:
            output = model(**inputs, labels=labels)
            last = model(**inputs, logits_to_keep=2).logits
            as_tuple = model(**inputs, return_dict=False)[0]
            assert pruner.labels(labels) is labels
    assert output.logits.shape[:2] == ids.shape
    assert torch.equal(output.loss, short.loss)
    assert torch.equal(last, output.logits[:, -2:])
    assert torch.equal(as_tuple, output.logits)
    loss = F.cross_entropy(
        output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(loss, output.loss.float())


def test_training_without_labels_in_the_call() -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([TWO])
    with vispruner.apply(model, k=K):
        model.train()
        with pytest.raises(ValueError, match="training without labels in the call"):
            model(**inputs)
        model(**inputs, logits_to_keep=3)  # the text at the end
        model(input_ids=torch.tensor([[5, 6]]))
    with vispruner.apply(model, k=K, logits="kept"):
        model(**inputs)
    with pytest.raises(ValueError, match="logits must be one of kept, prompt"):
        vispruner.apply(model, k=K, logits="all")


def trainer(model: Any, inputs: dict[str, Any], path: Path, **settings: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(path), report_to=[], max_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no",
        remove_unused_columns=False, **settings,
    )  # fmt: skip
    return transformers.Trainer(
        model, arguments, train_dataset=[0],
        data_collator=lambda _: {name: value.clone() for name, value in inputs.items()},
    )  # fmt: skip


def test_trainers_that_hold_the_labels(tmp_path: Path) -> None:
    tiny = Llava()
    inputs = {n: v.float() if v.is_floating_point() else v for n, v in tiny.inputs([ONE]).items()}
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] > 190, -100)
    inputs["labels"][:, 0] = -100  # which the trainer does not count
    model = tiny.build(torch.float32)
    with vispruner.apply(model, k=K), pytest.raises(ValueError, match="logits='prompt'"):
        trainer(model, inputs, tmp_path, label_smoothing_factor=0.1).train()
    # The trainer compares logits and labels of the same column, as for all models but text models.
    with vispruner.apply(model, k=K, logits="kept") as pruner, torch.no_grad():
        output = model(**{n: v for n, v in inputs.items() if n != "labels"})
        expected = LabelSmoother(0.1)(output, pruner.labels(inputs["labels"]))
    with vispruner.apply(model, k=K, logits="prompt"):
        result = trainer(model, inputs, tmp_path, label_smoothing_factor=0.1).train()
        assert result.training_loss == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("logits", [None, "prompt", "kept"])
def test_metrics_of_a_trainer(tmp_path: Path, logits: str | None) -> None:
    """compute_metrics gets logits in the columns of its labels, except with logits='kept'."""
    tiny = Llava()
    inputs = {n: v.float() if v.is_floating_point() else v for n, v in tiny.inputs([TWO]).items()}
    ids = inputs["input_ids"]
    inputs["labels"] = ids.masked_fill((ids > 190) | (ids == 1), -100)
    seen: dict[str, Any] = {}

    def nats(found: transformers.EvalPrediction) -> dict[str, float]:
        seen["shapes"] = found.predictions.shape[:2], found.label_ids.shape
        if logits == "kept":
            return {}
        of, labels = torch.tensor(found.predictions), torch.tensor(found.label_ids)
        return {"nats": float(F.cross_entropy(of[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))}

    model = tiny.build(torch.float32)
    with vispruner.apply(model, k=K, logits=logits) as pruner, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with torch.no_grad():
            output = model(**inputs)
        ignored = [name for name in output if name not in ("loss", "logits")]
        run = trainer(model, inputs, tmp_path)
        run.compute_metrics = nats
        metrics = run.predict([0], ignore_keys=ignored).metrics
        matching = pruner.labels(inputs["labels"])
        assert model.training is False
        assert matching.shape == seen["shapes"][0]
        if logits != "kept":
            assert matching is inputs["labels"]
            assert seen["shapes"][0] == seen["shapes"][1]
            assert metrics["test_nats"] == pytest.approx(metrics["test_loss"], abs=1e-4)


def test_evaluation_without_labels_and_prepare_are_in_the_shortened_prompt() -> None:
    tiny = Llava()
    model, inputs = tiny.build(), tiny.inputs([TWO])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] > 190, -100)
    with vispruner.apply(model, k=K) as pruner, torch.no_grad():
        short = model(**inputs).logits
        assert pruner.labels(labels).shape == short.shape[:2] != labels.shape
        assert model(**inputs, labels=labels).logits.shape[:2] == labels.shape
        assert pruner.labels(labels) is labels
    with vispruner.apply(model, k=K, logits="prompt") as pruner, torch.no_grad():
        ready = pruner.prepare(inputs)
        assert pruner.labels(labels).shape == ready["inputs_embeds"].shape[:2]


def test_every_family_trains_in_every_mode() -> None:
    for tiny in ALL:
        model, inputs = tiny.build(), tiny.inputs([TWO])
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] > 190, -100)
        with vispruner.apply(model, k=K, logits="prompt", **tiny.options):
            model.train()
            output = model(**inputs, labels=labels)
            assert output.logits.shape[:2] == labels.shape
            output.loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_mode_equals_reverse_mode(tiny: Tiny, dtype: torch.dtype) -> None:
    model, inputs = tiny.build(dtype, attention="eager"), tiny.inputs([TWO])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    pixels = inputs.pop("pixel_values").to(dtype)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def loss(pixels: Tensor) -> Tensor:
        return model(**inputs, pixel_values=pixels, use_cache=False).logits.sum()

    with vispruner.apply(model, k=K):
        forward = torch.func.jvp(loss, (pixels,), (direction,))[1]
        pixels.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(pixels), pixels)
    reverse = (gradient * direction).sum()
    assert reverse != 0
    torch.testing.assert_close(forward, reverse, rtol=1e-3, atol=0)
