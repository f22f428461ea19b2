"""Equal seeds give equal scenes, and answers are correct for the pixels."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from vispruner.embedded import scenes
from vispruner.embedded.scenes import Object, Question, Scene, Style

SEEDS = range(120)
OBJECTS_2026 = ["orange triangle", "cyan triangle", "black star", "cyan square", "blue ring"]
QUESTIONS_2026 = [
    ("where is the orange triangle?", "top-right"),
    ("where is the blue ring?", "bottom-left"),
    ("what color is the ring?", "blue"),
    ("how many circles are there?", "0"),
    ("is there a orange star?", "no"),
    ("how many objects are there?", "5"),
]


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return [scenes.draw(seed, split="tests") for seed in SEEDS]


def seen_color(scene: Scene, owner: int) -> str:
    """The colour nearest to the mean of an object's pixels."""
    mean = scene.pixels[scene.owner == owner].mean(0)
    return min(scenes.COLORS, key=lambda name: float(np.abs(scenes.COLORS[name] - mean).sum()))


def box(scene: Scene, owner: int) -> NDArray[np.int64]:
    """First row, first column, last row, last column of an object's pixels."""
    places = np.argwhere(scene.owner == owner)
    return np.concatenate([places.min(0), places.max(0)])


def owner_of(scene: Scene, name: str) -> int:
    """1 + the index of the only object of a name: a colour, a shape, or both."""
    (found,) = (
        i for i, thing in enumerate(scene.objects, 1)
        if name in (thing.name, thing.color, thing.shape)
    )  # fmt: skip
    return found


def answer_from_pixels(scene: Scene, question: Question) -> str:
    """The answer from the colours and the extent of the pixels of each object."""
    owners = range(1, len(scene.objects) + 1)
    colors = [seen_color(scene, owner) for owner in owners]
    names = [f"{c} {o.shape}" for c, o in zip(colors, scene.objects, strict=True)]
    text = question.text
    if match := re.fullmatch(r"what color is the (\w+)\?", text):
        return colors[owner_of(scene, match[1]) - 1]
    if match := re.fullmatch(r"what shape is the (\w+) object\?", text):
        return scene.objects[colors.index(match[1])].shape
    if match := re.fullmatch(r"is there a (\w+ \w+)\?", text):
        return "yes" if match[1] in names else "no"
    if text == "how many objects are there?":
        return str(len(names))
    if match := re.fullmatch(r"how many (\w+) objects are there\?", text):
        return str(colors.count(match[1]))
    if match := re.fullmatch(r"how many (\w+) are there\?", text):
        return str(sum(scenes.plural(thing.shape) == match[1] for thing in scene.objects))
    if match := re.fullmatch(r"where is the (\w+ \w+)\?", text):
        top, left, bottom, right = box(scene, owner_of(scene, match[1]))
        middle = len(scene.pixels) / 2
        vertical = "top" if (top + bottom + 1) / 2 < middle else "bottom"
        return f"{vertical}-{'left' if (left + right + 1) / 2 < middle else 'right'}"
    match = re.fullmatch(r"what is the (largest|smallest) object\?", text)
    assert match, text
    extents = [box(scene, owner) for owner in owners]
    sizes = [max(bottom - top, right - left) for top, left, bottom, right in extents]
    return names[int(np.argmax(sizes) if match[1] == "largest" else np.argmin(sizes))]


def test_the_same_seed_draws_the_same_scene(drawn: list[Scene]) -> None:
    for seed in (0, 7):
        again = scenes.draw(seed, split="tests")
        assert np.array_equal(again.pixels, drawn[seed].pixels)
        assert np.array_equal(again.owner, drawn[seed].owner)
        assert again.asked == drawn[seed].asked


def test_seeds_splits_and_backgrounds_differ(drawn: list[Scene]) -> None:
    pictures = {scene.pixels.tobytes() for scene in drawn}
    assert len(pictures) == len(drawn)
    assert scenes.draw(0).pixels.tobytes() not in pictures
    assert scenes.draw(0, background="noise").background == "noise"
    assert {scene.background for scene in drawn} == set(Style().backgrounds)


def test_the_number_of_questions_does_not_change_the_image() -> None:
    few, many = (scenes.draw(3, questions=count) for count in (1, 12))
    assert np.array_equal(few.pixels, many.pixels)
    assert few.asked == many.asked[:1]


def test_scenes_do_not_depend_on_the_machine() -> None:
    """Objects and questions come from Python's generator, which is deterministic for a seed."""
    scene = scenes.draw(2026)
    assert [thing.name for thing in scene.objects] == OBJECTS_2026
    assert scene.questions == QUESTIONS_2026


def test_answers_are_correct_for_the_pixels(drawn: list[Scene]) -> None:
    kinds: Counter[str] = Counter()
    for scene in drawn:
        for question in scene.asked:
            assert answer_from_pixels(scene, question) == question.answer, question
            kinds[question.kind] += 1
    assert set(kinds) == set(scenes.KINDS)
    assert min(kinds.values()) > 20


def test_questions_are_different_and_in_the_vocabulary(drawn: list[Scene]) -> None:
    known = set(scenes.vocabulary())
    for scene in drawn:
        texts = [question for question, _ in scene.questions]
        assert len(set(texts)) == len(texts)
        for words in scene.questions:
            assert set(" ".join(words).replace("?", " ?").split()) <= known


def test_answers_cannot_be_guessed(drawn: list[Scene]) -> None:
    """No answer dominates its kind of question."""
    for kind in scenes.KINDS:
        answers = Counter(q.answer for scene in drawn for q in scene.asked if q.kind == kind)
        assert max(answers.values()) < 0.7 * answers.total()


def test_objects_do_not_overlap_and_are_inside(drawn: list[Scene]) -> None:
    def apart(one: Object, other: Object) -> bool:
        return (
            one.x + one.width < other.x
            or other.x + other.width < one.x
            or one.y + one.height < other.y
            or other.y + other.height < one.y
        )

    for scene in drawn:
        assert 1 <= len(scene.objects) <= Style().max_objects
        assert set(np.unique(scene.owner)) <= set(range(len(scene.objects) + 1))
        for i, thing in enumerate(scene.objects, 1):
            top, left, bottom, right = box(scene, i)
            assert thing.x <= left
            assert thing.y <= top
            assert right < thing.x + thing.width <= Style().image_size
            assert bottom < thing.y + thing.height <= Style().image_size
            assert all(apart(thing, other) for other in scene.objects[i:])


def test_targets_occur_in_the_question(drawn: list[Scene]) -> None:
    for scene in drawn:
        for question in scene.asked:
            if question.target is None:
                assert question.kind in ("count", "exists")
            else:
                thing = scene.objects[question.target]
                words = f"{question.text} {question.answer}"
                assert thing.shape in words or thing.color in words


def test_digits_and_words_are_drawn() -> None:
    style = Style(image_size=192, shapes=("circle", "7", "taxi"), object_sizes=(12, 30))
    found = [scenes.draw(seed, style) for seed in range(20)]
    shapes = {thing.shape for scene in found for thing in scene.objects}
    assert shapes == {"circle", "7", "taxi"}
    for scene in found:
        for i, thing in enumerate(scene.objects, 1):
            if thing.shape == "taxi":
                assert thing.width > 1.5 * thing.height
            assert (scene.owner == i).sum() > 0.1 * thing.width * thing.height


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"backgrounds": ("plain", "sea")}, "'sea'"), ({"shapes": ("circle", "cube")}, "'cube'")],
)
def test_unknown_names(changes: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Style(**changes)  # type: ignore[arg-type]
