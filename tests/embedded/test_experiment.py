"""The accuracy experiment: statistics, rules, and equality of fast evaluation and `generate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("yaml")

from accuracy import __main__ as accuracy_command
from accuracy import evaluation, fastv, language, recipe, rules, training
from accuracy.data import owners, pack
from accuracy.evaluation import Subject
from accuracy.results import Results
from accuracy.statistics import clustered_mean

import vispruner
import vispruner_cuda
from vispruner.embedded import scenes
from vispruner.embedded.scenes import Scene

RECIPE = recipe.load("cpu")


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return [scenes.draw(seed, split="tests", questions=4) for seed in range(24)]


@pytest.fixture(scope="module")
def subject(model: Any) -> Subject:
    return Subject(model, RECIPE)


def test_packed_questions_equal_generate(
    subject: Subject, processor: Any, drawn: list[Scene]
) -> None:
    """Questions packed after selected features, compared with processor and `vispruner.apply`."""
    cues = subject.cues(drawn, 0)
    asked = evaluation.describe(drawn)
    first = [asked.index(next(a for a in asked if a.image == i)) for i in range(len(drawn))]
    for k in (32, 8):
        kept = rules.RULES["vispruner"](cues, k)
        quick = evaluation.flat(subject.answers(cues.features, kept, subject.packed(drawn)), drawn)
        assert [quick[i] for i in first] == evaluation.generated(subject.model, processor, drawn, k)


def test_the_rule_equals_apply(subject: Subject, processor: Any, drawn: list[Scene]) -> None:
    inputs = processor(
        images=[scene.image for scene in drawn],
        text=["<image>\nwhere is it?"] * len(drawn),
        return_tensors="pt",
    )
    with vispruner.apply(subject.model, k=16) as pruner, torch.no_grad():
        subject.model(**inputs)
    assert pruner.last is not None
    kept = rules.RULES["vispruner"](subject.cues(drawn, 0), 16)
    assert torch.equal(torch.stack([item.indices for item in pruner.last.items]), kept)


@pytest.mark.parametrize(
    "rule",
    [*rules.RULES.values(), *rules.METHODS.values()],
    ids=[*rules.RULES, *(f"method {name}" for name in rules.METHODS)],
)
@pytest.mark.parametrize("k", [96, 5, 1])
def test_rules_retain_k_different_tokens_in_order(
    rule: rules.Rule, k: int, subject: Subject, drawn: list[Scene]
) -> None:
    kept = rule(subject.cues(drawn, 0), k)
    assert kept.shape == (len(drawn), k)
    assert (kept.diff(dim=1) > 0).all()
    assert ((kept >= 0) & (kept < RECIPE.patches)).all()


def test_methods_are_those_of_the_operator(subject: Subject, drawn: list[Scene]) -> None:
    assert {name.split(",")[0].split("/")[0] for name in rules.METHODS} == {
        *vispruner_cuda.methods.METHODS,
        "diverse",
    }
    cues = subject.cues(drawn, 0)
    for old, new in (("vispruner", "vispruner"), ("important", "topk")):
        assert torch.equal(rules.RULES[old](cues, 16), rules.METHODS[new](cues, 16))


def test_without_a_training_run_seed_0_is_the_model_of_the_package(
    model: Any, tmp_path: Path
) -> None:
    found = evaluation.trained(RECIPE, 0, tmp_path, packaged=True)
    weights = dict(model.named_parameters())
    assert all(torch.equal(w, weights[name]) for name, w in found.named_parameters())
    with pytest.raises(training.CheckpointError, match=r"subset\.pt"):
        evaluation.trained(RECIPE, 1, tmp_path, packaged=True)
    with pytest.raises(training.CheckpointError, match=r"subset\.pt"):
        evaluation.trained(RECIPE, 0, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("methods --recipe smoke", "smoke-0/subset.pt: train first"),
        ("methods --runs nowhere", "nowhere/cpu-0/subset.pt: train first"),
        ("evaluate --runs nowhere", "nowhere/cpu-0/language.pt: train first"),
        ("analyze --runs nowhere", "nowhere/cpu-0/subset.pt: train first"),
        ("export --runs nowhere", "nowhere/cpu-0/subset.pt: train first"),
        ("methods --recipe nosuch", "argument --recipe: "),
        ("report --recipe nosuch", "argument --recipe: "),
        ("methods --scenes 0", "argument --scenes: must be from 1 to"),
        ("methods --threads -1", "argument --threads: must be from 1 to"),
        ("train --seed -1", "argument --seed: must be from 0 to"),
    ],
)
def test_a_command_without_its_model_is_refused(
    arguments: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It neither takes another model nor writes a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation.provenance, "RESULTS", tmp_path)
    for asking in ("ask_all", "ask_methods"):
        monkeypatch.setattr(evaluation, asking, lambda *_: pytest.fail("a model was asked"))
    with pytest.raises(SystemExit) as ended:
        accuracy_command.main(arguments.split())
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_the_oracle_takes_a_patch_of_every_object_first(
    subject: Subject, drawn: list[Scene]
) -> None:
    owner = owners(drawn, RECIPE.vision.patch_size)
    kept = rules.oracle(subject.cues(drawn, 0), 6)
    for row, truth in zip(kept, owner, strict=True):
        assert set(truth[row].tolist()) >= set(truth.tolist()) - {0}


def test_fastv_that_drops_nothing_changes_nothing(subject: Subject, drawn: list[Scene]) -> None:
    cues, packed = subject.cues(drawn, 0), subject.single(drawn)
    rows = torch.tensor([i for i, scene in enumerate(drawn) for _ in scene.asked])
    features = cues.features[rows]
    with torch.no_grad():
        found = fastv.right_answers(subject.model, features, packed, (1, 2), (RECIPE.patches,))
        whole = language.right_answers(subject.model, features, packed)
    for right in found.values():
        assert torch.equal(right, whole[:, 0])


def test_matched_budgets_cost_the_same() -> None:
    layers, patches = RECIPE.language.layers, RECIPE.patches
    for k in (96, 64):
        kept = RECIPE.matched_budget(k, 1)
        assert kept is not None
        assert patches + (layers - 1) * kept <= layers * k < patches + (layers - 1) * (kept + 1)
    assert RECIPE.matched_budget(16, 1) is None


def test_packed_questions_are_independent(subject: Subject, drawn: list[Scene]) -> None:
    """An answer's logits are equal with and without other questions before it."""
    some = [replace(drawn[0], asked=drawn[0].asked[1:2])]
    features = subject.cues(drawn[:1], 0).features
    with torch.no_grad():
        alone = language.text_logits(subject.model, features, subject.packed(some))
        packed = subject.packed(drawn[:1])
        among = language.text_logits(subject.model, features, packed)
    labeled = packed.block[packed.labels >= 0] == 1
    torch.testing.assert_close(among[labeled], alone, atol=1e-4, rtol=1e-4)


def test_packing_labels_answers_and_their_end() -> None:
    from accuracy.model import EOS, word_tokenizer

    tokenizer = word_tokenizer(RECIPE.style)
    scene = scenes.draw(1)
    packed = pack([scene.asked[:2], scene.asked[:1]], tokenizer)
    words = [
        tokenizer.encode(question.answer, add_special_tokens=False).ids
        for question in scene.asked[:2]
    ]
    assert packed.labels[0][packed.labels[0] >= 0].tolist() == [*words[0], EOS, *words[1], EOS]
    assert packed.labels[1][packed.labels[1] >= 0].tolist() == [*words[0], EOS]
    assert packed.block[1].min() == -1


def test_clusters_make_the_error() -> None:
    values = np.array([1.0, 1.0, 0.0, 0.0])
    together = clustered_mean(values, np.array([0, 0, 1, 1]))
    apart = clustered_mean(values, np.arange(4))
    assert together.value == apart.value == 0.5
    assert together.error == pytest.approx(apart.error * 2**0.5)
    assert np.isnan(clustered_mean(values[:0], np.arange(0)).value)


def test_seeds_make_the_error() -> None:
    images = np.arange(400) // 4
    right = np.random.default_rng(0).random((3, 400)) < 0.8
    alike = clustered_mean(np.repeat(right[:1], 3, 0).astype(float), images)
    assert alike.error == pytest.approx(clustered_mean(right[0].astype(float), images).error)
    # The models differ far more than the scenes, so the error is that of three models.
    levels = np.array([0.2, 0.5, 0.8])
    apart = clustered_mean(np.broadcast_to(levels[:, None], (3, 400)), images)
    assert apart.error == pytest.approx(levels.std(ddof=1) / 3**0.5, rel=0.05)
    assert (alike.count, apart.count) == (400, 400)


def test_answers_and_questions_survive_the_file(drawn: list[Scene]) -> None:
    asked = evaluation.describe(drawn)
    assert evaluation.from_lines(evaluation.to_lines(asked)) == asked
    answers = [bool(i % 3) for i in range(len(asked))]
    assert evaluation.from_bits(evaluation.to_bits(answers), len(asked)).tolist() == answers


def test_rules_and_methods_have_equal_results() -> None:
    """As docs/accuracy.md says of the committed results."""
    main, methods = Results.load("cpu"), Results.load("cpu", "methods")
    assert main.seeds == methods.seeds
    same = {"vispruner": "vispruner", "diverse": "diverse", "important": "topk"}
    names = {f"{rule}@{k}": f"{method}@{k}" for rule, method in same.items() for k in (64, 16, 4)}
    for rule, method in {"full": "full", **names}.items():
        assert (main.answers("subset", rule) == methods.answers("subset", method)).all(), rule


def test_training_scenes_are_not_tested() -> None:
    from accuracy.data import Training

    stages = [Training(RECIPE, stage, seed=0)[0].pixels for stage in recipe.STAGES]
    tested = {scene.pixels.tobytes() for scene in evaluation.test_scenes(RECIPE, 4)}
    seen = [picture.permute(1, 2, 0).numpy().tobytes() for stage in stages for picture in stage]
    assert len(set(seen)) == len(seen)
    assert not tested & set(seen)
