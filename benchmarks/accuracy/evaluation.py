"""Answers the test questions with every rule and number of tokens, and records which are correct.

A results file has one bit per question, rule, k and checkpoint, so all tables, slices and paired
differences are computed from files, without another run. The weights are rounded to float16 first,
as in the package, and run in float32.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import provenance
import torch
from numpy.typing import NDArray
from rich.progress import track

import vispruner
from vispruner import embedded
from vispruner.embedded import scenes
from vispruner.embedded.scenes import Scene

from . import fastv, training
from .data import Packed, owners, pack, stack_pixels
from .language import right_answers
from .model import processor, word_tokenizer
from .recipe import Recipe
from .rules import METHODS, RULES, Cues, read_cues
from .train import load_model

CHECKPOINTS = ("language", "subset")
SPLIT = "test"
UNSEEN = "photo"  # a background that the CPU recipe is not trained on
QUESTIONS = 4  # per image
EMBEDDED = 0  # seed of the model in the package
FASTV_AFTER = (1, 2)
_BATCH = 65
_LONGEST_ANSWER = 4  # tokens
_SAMPLED_SCENES = 150
_SAMPLED_BUDGET = 2  # index into the recipe's budgets


@dataclass(frozen=True)
class Asked:
    """Metadata of a question, for slices."""

    image: int
    kind: str
    background: str
    objects: int
    distractors: int
    size: int | None  # of the object that the question is about


def test_scenes(recipe: Recipe, count: int) -> list[Scene]:
    """`count` scenes of each background, unseen ones last."""
    seen = recipe.style.backgrounds
    backgrounds = [seen[i % len(seen)] for i in range(count * len(seen))]
    if UNSEEN not in seen:
        backgrounds += [UNSEEN] * count
    return [
        scenes.draw(i, recipe.style, split=SPLIT, background=name, questions=QUESTIONS)
        for i, name in enumerate(backgrounds)
    ]


def describe(drawn: Sequence[Scene]) -> list[Asked]:
    """All questions of the scenes, in order."""
    return [
        Asked(
            image,
            question.kind,
            scene.background,
            len(scene.objects),
            scene.distractors,
            None if question.target is None else scene.objects[question.target].size,
        )
        for image, scene in enumerate(drawn)
        for question in scene.asked
    ]


def shipped(model: Any) -> Any:
    """The model with its weights rounded as in the package."""
    return model.half().float()


class Subject:
    """A trained model with its tokenizer."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self._tokenizer = word_tokenizer(recipe.style)
        self._at = training.device()

    def cues(self, drawn: Sequence[Scene], seed: int) -> Cues:
        owner = owners(drawn, self.recipe.vision.patch_size).to(self._at)
        return read_cues(self.model, stack_pixels(drawn).to(self._at), owner, seed)

    def packed(self, drawn: Sequence[Scene]) -> Packed:
        """All questions of a scene in one row."""
        return self._move(pack([scene.asked for scene in drawn], self._tokenizer))

    def single(self, drawn: Sequence[Scene]) -> Packed:
        """One question per row."""
        rows = [[question] for scene in drawn for question in scene.asked]
        return self._move(pack(rows, self._tokenizer))

    def _move(self, packed: Packed) -> Packed:
        return Packed(*(part.to(self._at) for part in vars(packed).values()))

    @torch.no_grad()
    def answers(self, features: torch.Tensor, tokens: torch.Tensor, packed: Packed) -> Any:
        """(B, Q) bool, with only the retained tokens (B, k)."""
        retained = features.gather(1, tokens[..., None].expand(-1, -1, features.shape[-1]))
        return right_answers(self.model, retained, packed)


def in_batches(drawn: Sequence[Scene], size: int = _BATCH) -> Iterator[tuple[int, Sequence[Scene]]]:
    for first in range(0, len(drawn), size):
        yield first, drawn[first : first + size]


def flat(right: torch.Tensor, drawn: Sequence[Scene]) -> list[bool]:
    """(B, Q) answers as a list, without the padding of scenes with fewer questions."""
    return [
        bool(answer)
        for row, scene in zip(right.tolist(), drawn, strict=True)
        for answer in row[: len(scene.asked)]
    ]


@torch.no_grad()
def ask_all(subject: Subject, drawn: Sequence[Scene], note: str) -> dict[str, list[bool]]:
    """Whether each answer is correct, for every RULE@K, and for "full" with all tokens."""
    results: dict[str, list[bool]] = {}

    def add(name: str, answers: list[bool]) -> None:
        results.setdefault(name, []).extend(answers)

    budgets = subject.recipe.budgets
    for first, some in track(list(in_batches(drawn)), description=note):
        cues, packed = subject.cues(some, first), subject.packed(some)
        add("full", flat(right_answers(subject.model, cues.features, packed), some))
        for name, rule in RULES.items():
            for k in budgets:
                tokens = rule(cues, k)
                add(f"{name}@{k}", flat(subject.answers(cues.features, tokens, packed), some))

        rows = torch.tensor([i for i, scene in enumerate(some) for _ in scene.asked])
        features = cues.features[rows.to(cues.features.device)]
        matched = (subject.recipe.matched_budget(k, K) for k in budgets for K in FASTV_AFTER)
        wanted = sorted({*budgets, *(k for k in matched if k)})
        for (layer, k), right in fastv.right_answers(
            subject.model, features, subject.single(some), FASTV_AFTER, wanted
        ).items():
            add(f"fastv/{layer}@{k}", right.tolist())
    return results


@torch.no_grad()
def ask_methods(subject: Subject, drawn: Sequence[Scene]) -> dict[str, list[bool]]:
    """Whether each answer is correct, for every METHOD@K, and for "full" with all tokens."""
    results: dict[str, list[bool]] = {}
    for first, some in track(list(in_batches(drawn)), description="methods"):
        cues, packed = subject.cues(some, first), subject.packed(some)
        asked = {"full": right_answers(subject.model, cues.features, packed)}
        for name, rule in METHODS.items():
            for k in subject.recipe.budgets:
                answers = subject.answers(cues.features, rule(cues, k), packed)
                asked[f"{name}@{k}"] = answers
        for name, right in asked.items():
            results.setdefault(name, []).extend(flat(right, some))
    return results


def generated(model: Any, reader: Any, drawn: Sequence[Scene], k: int) -> list[bool]:
    """Whether the first question of each scene is answered correctly.

    Uses the path of users: the processor `reader`, `vispruner.apply` and `generate`.
    """
    right: list[bool] = []
    with vispruner.apply(model, k=k):
        for _, some in in_batches(drawn):
            inputs = reader(
                images=[scene.image for scene in some],
                text=[f"<image>\n{scene.asked[0].text}" for scene in some],
                return_tensors="pt",
                padding=True,
            ).to(model.device)
            tokens = model.generate(**inputs, max_new_tokens=_LONGEST_ANSWER)
            new = tokens[:, inputs["input_ids"].shape[1] :]
            texts = reader.batch_decode(new, skip_special_tokens=True)
            right += [
                text.strip() == scene.asked[0].answer
                for text, scene in zip(texts, some, strict=True)
            ]
    return right


def agreement(
    subject: Subject, drawn: Sequence[Scene], answers: dict[str, list[bool]]
) -> dict[str, Any]:
    """How often `generate` agrees with the fast evaluation, on a sample of scenes."""
    k = subject.recipe.budgets[_SAMPLED_BUDGET]
    first = [0, *itertools.accumulate(len(scene.asked) for scene in drawn)]  # question of a scene
    sample = random.Random(0).sample(range(len(drawn)), min(_SAMPLED_SCENES, len(drawn)))
    some = [drawn[i] for i in sample]
    real = generated(subject.model, processor(subject.recipe), some, k)
    quick = [answers[f"vispruner@{k}"][first[i]] for i in sample]
    share = sum(a == b for a, b in zip(real, quick, strict=True)) / len(sample)
    return {"k": k, "questions": len(sample), "share": share}


def to_bits(answers: Sequence[bool]) -> str:
    return np.packbits(np.asarray(answers, bool)).tobytes().hex()


def from_bits(bits: str, count: int) -> NDArray[np.float64]:
    """(count,) 0.0 or 1.0."""
    packed = np.frombuffer(bytes.fromhex(bits), np.uint8)
    return np.unpackbits(packed, count=count).astype(np.float64)


def to_lines(asked: Sequence[Asked]) -> list[str]:
    """One line per image: background, objects, distractors, kind and size of each question."""
    lines = []
    for _, group in itertools.groupby(asked, key=lambda question: question.image):
        questions = list(group)
        first = questions[0]
        about = " ".join(f"{q.kind}:{q.size or ''}" for q in questions)
        lines.append(f"{first.background} {first.objects} {first.distractors} {about}")
    return lines


def from_lines(lines: Sequence[str]) -> list[Asked]:
    asked = []
    for image, line in enumerate(lines):
        background, objects, distractors, *questions = line.split()
        for question in questions:
            kind, size = question.split(":")
            asked.append(
                Asked(
                    image,
                    kind,
                    background,
                    int(objects),
                    int(distractors),
                    int(size) if size else None,
                )
            )
    return asked


def _log(directory: Path) -> list[dict[str, Any]]:
    """The training log. For a step logged twice after an interruption, only the later line."""
    lines = (
        json.loads(line)
        for line in (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()
    )
    return list({(line["stage"], line["step"]): line for line in lines}.values())


def evaluate(recipe: Recipe, name: str, seed: int, directory: Path, count: int) -> Path:
    """Writes results/accuracy_NAME_seedS.json.

    Args:
        directory: of the training run; count: scenes per background.
    """
    drawn = test_scenes(recipe, count)
    asked = describe(drawn)
    checkpoints: dict[str, Any] = {}
    for stage in CHECKPOINTS:
        subject = Subject(shipped(load_model(recipe, directory, stage)), recipe)
        answers = ask_all(subject, drawn, f"{stage}, seed {seed}")
        checkpoints[stage] = {
            "answers": {rule: to_bits(right) for rule, right in answers.items()},
            "agrees_with_generate": agreement(subject, drawn, answers),
        }
    return provenance.write(
        f"accuracy_{name}_seed{seed}",
        {
            "recipe": name,
            "seed": seed,
            "scenes_per_background": count,
            "questions": len(asked),
            "asked": to_lines(asked),
            "checkpoints": checkpoints,
            "training": _log(directory),
        },
    )


def trained(recipe: Recipe, seed: int, directory: Path, *, packaged: bool = False) -> Any:
    """The model after the subset stage, from a training run.

    With `packaged`, seed 0 may instead come from the package, whose model is of the recipe `cpu`.
    """
    if packaged and seed == EMBEDDED and not training.checkpoint(directory, "subset").exists():
        from transformers import AutoModelForImageTextToText

        model: Any = AutoModelForImageTextToText.from_pretrained(
            embedded.path(), dtype=torch.float32
        )
        return model.to(training.device()).eval()
    return shipped(load_model(recipe, directory, "subset"))


def evaluate_methods(
    recipe: Recipe, name: str, seed: int, directory: Path, count: int, *, packaged: bool = False
) -> Path:
    """Writes results/accuracy_methods_NAME_seedS.json: arguments as of `evaluate` and `trained`."""
    drawn = test_scenes(recipe, count)
    model = trained(recipe, seed, directory, packaged=packaged)
    answers = ask_methods(Subject(model, recipe), drawn)
    asked = describe(drawn)
    return provenance.write(
        f"accuracy_methods_{name}_seed{seed}",
        {
            "recipe": name,
            "seed": seed,
            "scenes_per_background": count,
            "questions": len(asked),
            "asked": to_lines(asked),
            "checkpoints": {
                "subset": {"answers": {rule: to_bits(right) for rule, right in answers.items()}}
            },
        },
    )
