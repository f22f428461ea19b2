"""Drawn scenes with questions and answers: the data of the embedded model.

    from vispruner.embedded import scenes
    scene = scenes.draw(seed=7)
    scene.image                               # a PIL image
    scene.questions                           # [("what color is the star?", "red"), ...]

A scene has a background, unlabelled distractors, and one to six objects that do not overlap, each
with a shape and a colour. Answers follow from the list of objects. Equal arguments give equal
scenes. Training uses separate splits ("train/0", ...).

Needs Pillow and NumPy, which the extra `transformers` installs.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 150, 40),
    "blue": (30, 60, 220),
    "yellow": (235, 215, 20),
    "purple": (135, 30, 160),
    "orange": (245, 130, 15),
    "cyan": (30, 200, 215),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIGITS = tuple(str(digit) for digit in range(10))
WORDS = ("stop", "exit", "open", "taxi", "cafe", "park", "bus", "zoo", "sale", "milk")
KINDS = ("color", "shape", "exists", "count", "where", "size")
_KIND_WEIGHTS = (0.17, 0.16, 0.14, 0.24, 0.15, 0.14)

# fmt: off
_WORDS_OF_QUESTIONS = (
    "what", "color", "is", "the", "shape", "object", "objects", "there", "a", "how", "many", "are",
    "where", "?", "yes", "no", "top-left", "top-right", "bottom-left", "bottom-right", "largest",
    "smallest",
)
# fmt: on

_GAP = 3  # pixels between the boxes of two objects
_PLACEMENTS = 25  # attempts to place an object before it is omitted
_SUPERSAMPLING = 4


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


# ------------------------------------------------------------------------------------------ types
@dataclass(frozen=True)
class Style:
    """Possible content of scenes.

    Attributes:
        image_size: side in pixels.
        shapes: names of SHAPES, DIGITS and WORDS; digits and words are drawn as text.
        backgrounds: names of BACKGROUNDS.
        max_objects: a scene has between 1 and this many.
        object_sizes: smallest and largest height of an object in pixels.
        max_distractors: half of the scenes have between 1 and this many unlabelled blobs below the
            objects.
    """

    image_size: int = 112
    shapes: tuple[str, ...] = SHAPES
    backgrounds: tuple[str, ...] = ("plain", "gradient", "noise", "strokes", "clouds", "leaves")
    max_objects: int = 6
    object_sizes: tuple[int, int] = (9, 32)
    max_distractors: int = 5

    def __post_init__(self) -> None:
        for name in self.backgrounds:
            if name not in BACKGROUNDS:
                raise ValueError(f"backgrounds must be of {', '.join(BACKGROUNDS)}, got {name!r}")
        for name in self.shapes:
            if name not in (*SHAPES, *DIGITS, *WORDS):
                raise ValueError(f"shapes must be of SHAPES, DIGITS and WORDS, got {name!r}")


@dataclass(frozen=True)
class Object:
    """A shape with a colour; x and y are the top left pixel of its box."""

    color: str
    shape: str
    x: int
    y: int
    width: int
    height: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def size(self) -> int:
        return max(self.width, self.height)

    @property
    def center(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True)
class Question:
    """A question of one of KINDS.

    Attributes:
        target: index of the object that it is about, None if it is not about one object.
    """

    text: str
    answer: str
    kind: str
    target: int | None


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Attributes:
        pixels: (side, side, 3) uint8.
        owner: (side, side) uint8, 1 + the index of the object that covers the pixel, 0 for none.
        objects: the drawn objects, largest first.
        background: its name.
        distractors: number of unlabelled blobs.
        asked: questions with their metadata.
    """

    pixels: NDArray[np.uint8]
    owner: NDArray[np.uint8]
    objects: tuple[Object, ...]
    background: str
    distractors: int
    asked: tuple[Question, ...]

    @property
    def image(self) -> Image.Image:
        from PIL import Image

        return Image.fromarray(self.pixels)

    @property
    def questions(self) -> list[tuple[str, str]]:
        """Questions and their answers."""
        return [(question.text, question.answer) for question in self.asked]


# ------------------------------------------------------------------------------------ backgrounds
class _Brush:
    """Random numbers for one scene: Python's for single values, NumPy's for arrays."""

    def __init__(self, key: str) -> None:
        self.one = random.Random(key)
        self.many = np.random.default_rng(self.one.getrandbits(64))

    def normal(self, *shape: int) -> NDArray[np.float32]:
        return self.many.standard_normal(shape, dtype=np.float32)

    def pale(self, low: int = 150, high: int = 245, tint: int = 12) -> tuple[int, int, int]:
        """A light colour of low saturation, unlike that of any object."""
        light = self.one.uniform(low, high)
        r, g, b = (round(min(255, light + self.one.uniform(-tint, tint))) for _ in range(3))
        return r, g, b


def _canvas(side: int, color: Sequence[int]) -> NDArray[np.float32]:
    return np.full((side, side, 3), color, np.float32)


def _plain(brush: _Brush, side: int) -> NDArray[np.float32]:
    return _canvas(side, brush.pale())


def _gradient(brush: _Brush, side: int) -> NDArray[np.float32]:
    angle = brush.one.uniform(0, 2 * math.pi)
    ramp = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    share = 0.5 + ramp * math.cos(angle) + ramp[:, None] * math.sin(angle)
    share = share.clip(0, 1)[..., None]
    return _canvas(side, brush.pale()) * (1 - share) + _canvas(side, brush.pale()) * share


def _noise(brush: _Brush, side: int) -> NDArray[np.float32]:
    grain = brush.one.uniform(8, 28) * brush.normal(side, side, 1)
    return _canvas(side, brush.pale()) + grain + 8 * brush.normal(side, side, 3)


def _strokes(brush: _Brush, side: int) -> NDArray[np.float32]:
    """Pale rectangles and thin lines of any colour."""
    from PIL import Image, ImageDraw

    one = brush.one
    base = brush.pale()
    image = Image.new("RGB", (side, side), base)
    pen = ImageDraw.Draw(image)
    for _ in range(one.randint(3, 6)):
        x, y = one.randrange(side - 20), one.randrange(side - 20)
        color = tuple(round(0.75 * c + 0.25 * one.uniform(0, 255)) for c in base)
        pen.rectangle((x, y, x + one.randint(10, 50), y + one.randint(10, 50)), fill=color)
    for _ in range(one.randint(4, 8)):
        u, v, angle = one.uniform(0, side), one.uniform(0, side), one.uniform(0, math.pi)
        du, dv = (one.uniform(15, 60) * f(angle) for f in (math.cos, math.sin))
        color = tuple(round(60 + 0.6 * one.uniform(0, 255)) for _ in range(3))
        pen.line((u - du, v - dv, u + du, v + dv), fill=color, width=2)
    return np.asarray(image, np.float32) + 5 * brush.normal(side, side, 1)


def _clouds(brush: _Brush, side: int) -> NDArray[np.float32]:
    """Noise at all scales, similar to blurred photographs."""
    from PIL import Image

    light = np.zeros((side, side), np.float32)
    for cells in (3, 6, 12, 24):
        coarse = Image.fromarray(brush.normal(cells, cells))
        light += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) * (3 / cells)
    tint = Image.fromarray((12 * brush.normal(4, 4, 3) + 128).clip(0, 255).astype(np.uint8))
    hue = np.asarray(tint.resize((side, side), Image.Resampling.BICUBIC), np.float32) - 128
    contrast = brush.one.uniform(15, 35)
    return (_canvas(side, brush.pale(160, 225)) + contrast * light[..., None] + hue).clip(70, 255)


def _leaves(brush: _Brush, side: int) -> NDArray[np.float32]:
    """Pale overlapping shapes of all sizes, with edges like photographs ("dead leaves")."""
    from PIL import Image, ImageDraw

    one = brush.one
    image = Image.new("RGB", (side, side), brush.pale())
    pen = ImageDraw.Draw(image)
    for _ in range(50):
        radius = min(6 * one.random() ** -0.5, 45.0)  # few large ones, many small ones
        x, y = one.uniform(0, side), one.uniform(0, side)
        box = (x - radius, y - radius, x + radius, y + radius * one.uniform(-0.2, 1))
        box = (box[0], min(box[1], box[3]), box[2], max(box[1], box[3]))
        paint = pen.ellipse if one.random() < 0.5 else pen.rectangle
        paint(box, fill=brush.pale(110, 245, 22))
    return np.asarray(image, np.float32) + 4 * brush.normal(side, side, 1)


@functools.cache
def _photographs() -> tuple[Any, ...]:
    from PIL import Image
    from skimage import data

    names = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "gravel", "rocket")
    return tuple(Image.fromarray(getattr(data, name)()).convert("RGB") for name in names)


def _photo(brush: _Brush, side: int) -> NDArray[np.float32]:
    """A crop of a photograph from scikit-image, faded so that the objects stand out."""
    from PIL import Image

    photo = brush.one.choice(_photographs())
    edge = brush.one.randint(min(side, *photo.size), min(photo.size))
    x, y = brush.one.randint(0, photo.width - edge), brush.one.randint(0, photo.height - edge)
    piece = photo.resize((side, side), Image.Resampling.BILINEAR, (x, y, x + edge, y + edge))
    fade = brush.one.uniform(0.4, 0.7)
    return np.asarray(piece, np.float32) * (1 - fade) + 235 * fade


BACKGROUNDS: dict[str, Callable[[_Brush, int], NDArray[np.float32]]] = {
    "plain": _plain,
    "gradient": _gradient,
    "noise": _noise,
    "strokes": _strokes,
    "clouds": _clouds,
    "leaves": _leaves,
    "photo": _photo,
}


def _blob(brush: _Brush, pixels: NDArray[np.float32]) -> None:
    """Draws a distractor: an irregular polygon of low saturation."""
    from PIL import Image, ImageDraw

    one = brush.one
    radius, corners = one.uniform(4, 11), one.randint(5, 8)
    side = 2 * round(radius) + 1
    points = []
    for corner in range(corners):
        angle, reach = 2 * math.pi * corner / corners, radius * one.uniform(0.4, 1)
        points.append((radius + reach * math.cos(angle), radius + reach * math.sin(angle)))
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    x, y = one.randrange(pixels.shape[1] - side), one.randrange(pixels.shape[0] - side)
    pixels[y : y + side, x : x + side][np.asarray(mask) > 0] = brush.pale(80, 250, 20)


# ---------------------------------------------------------------------------------------- objects
def _polygon(shape: str) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(0, -1), (1, 0.9), (-1, 0.9)]
    angles = (-math.pi / 2 + corner * math.pi / 5 for corner in range(10))
    reach = (1.0, 0.42)
    return [
        (reach[corner % 2] * math.cos(angle), reach[corner % 2] * math.sin(angle))
        for corner, angle in enumerate(angles)
    ]


@functools.lru_cache(maxsize=4096)
def _mask(shape: str, height: int) -> NDArray[np.float32]:
    """Coverage of each pixel by a shape, (height, width) in [0, 1]."""
    if shape not in SHAPES:
        return _text_mask(shape, height)
    from PIL import Image, ImageDraw

    side = height * _SUPERSAMPLING
    centers = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = np.abs(centers)[None], np.abs(centers)[:, None]
    radius = np.hypot(x, y)
    if shape == "circle":
        inside = radius <= 1
    elif shape == "ring":
        inside = (radius <= 1) & (radius >= 0.55)
    elif shape == "square":
        inside = np.maximum(x, y) <= 0.9
    elif shape == "cross":
        inside = np.minimum(x, y) <= 0.33
    else:
        image = Image.new("1", (side, side))
        corners = [((1 + a) * side / 2, (1 + b) * side / 2) for a, b in _polygon(shape)]
        ImageDraw.Draw(image).polygon(corners, fill=1)
        inside = np.asarray(image)
    cells = inside.reshape(height, _SUPERSAMPLING, height, _SUPERSAMPLING)
    return np.asarray(cells.mean((1, 3)), np.float32)


def _text_mask(text: str, height: int) -> NDArray[np.float32]:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=1.3 * height)  # so that a capital letter fills the height
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text.upper()))
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), text.upper(), fill=255, font=font)
    return np.asarray(image, np.float32) / np.float32(255)


def _place(
    brush: _Brush, style: Style, shape: str, color: str, height: int, placed: Sequence[Object]
) -> Object | None:
    """An object that does not overlap the others, or None if there is no room."""
    rows, columns = _mask(shape, height).shape
    if columns > style.image_size or rows > style.image_size:
        return None
    for _ in range(_PLACEMENTS):
        x = brush.one.randint(0, style.image_size - columns)
        y = brush.one.randint(0, style.image_size - rows)
        if all(
            x + columns + _GAP <= other.x
            or other.x + other.width + _GAP <= x
            or y + rows + _GAP <= other.y
            or other.y + other.height + _GAP <= y
            for other in placed
        ):
            return Object(color, shape, x, y, columns, rows)
    return None


def _paint(brush: _Brush, style: Style, background: str) -> tuple[Any, Any, list[Object], int]:
    one, side = brush.one, style.image_size
    pixels = BACKGROUNDS[background](brush, side)
    distractors = one.randint(1, style.max_distractors) if one.random() < 0.5 else 0
    for _ in range(distractors):
        _blob(brush, pixels)

    smallest, largest = style.object_sizes
    heights = sorted(
        (
            round(smallest * (largest / smallest) ** one.random())
            for _ in range(one.randint(1, style.max_objects))
        ),
        reverse=True,
    )
    owner = np.zeros((side, side), np.uint8)
    objects: list[Object] = []
    for height in heights:
        shape, color = one.choice(style.shapes), one.choice(tuple(COLORS))
        placed = _place(brush, style, shape, color, height, objects)
        if placed is None:
            continue
        objects.append(placed)
        mask = _mask(shape, height)
        rows = slice(placed.y, placed.y + placed.height)
        columns = slice(placed.x, placed.x + placed.width)
        shade = np.array([channel + one.gauss(0, 10) for channel in COLORS[color]], np.float32)
        pixels[rows, columns] += mask[..., None] * (shade - pixels[rows, columns])
        owner[rows, columns][mask > 0.5] = len(objects)
    return np.rint(pixels.clip(0, 255)).astype(np.uint8), owner, objects, distractors


# -------------------------------------------------------------------------------------- questions
def _single(names: Sequence[str]) -> list[int]:
    """Indices of the names that occur once."""
    return [i for i, name in enumerate(names) if names.count(name) == 1]


def _ask(one: random.Random, kind: str, style: Style, objects: Sequence[Object]) -> Question | None:
    """A question of a kind, or None if this scene (or this attempt) has no unambiguous one."""
    shapes = [thing.shape for thing in objects]
    colors = [thing.color for thing in objects]
    names = [thing.name for thing in objects]

    if kind == "color" and (targets := _single(shapes)):
        target = one.choice(targets)
        return Question(f"what color is the {shapes[target]}?", colors[target], kind, target)
    if kind == "shape" and (targets := _single(colors)):
        target = one.choice(targets)
        return Question(f"what shape is the {colors[target]} object?", shapes[target], kind, target)
    if kind == "exists":
        if one.random() < 0.5:
            target = one.randrange(len(objects))
            return Question(f"is there a {names[target]}?", "yes", kind, target)
        # Mostly a colour and a shape that both occur, but not together.
        color = one.choice(colors if one.random() < 0.6 else tuple(COLORS))
        shape = one.choice(shapes if one.random() < 0.6 else style.shapes)
        if f"{color} {shape}" not in names:
            return Question(f"is there a {color} {shape}?", "no", kind, None)
    if kind == "count":
        what = one.randrange(3)
        if what == 0:
            return Question("how many objects are there?", str(len(objects)), kind, None)
        if what == 1:
            shape = one.choice(shapes if one.random() < 0.75 else style.shapes)
            if shape in SHAPES:
                text = f"how many {plural(shape)} are there?"
                return Question(text, str(shapes.count(shape)), kind, None)
        color = one.choice(colors if one.random() < 0.75 else tuple(COLORS))
        return Question(
            f"how many {color} objects are there?", str(colors.count(color)), kind, None
        )
    if kind == "where" and (targets := _single(names)):
        target = one.choice(targets)
        x, y = (value - style.image_size / 2 for value in objects[target].center)
        if min(abs(x), abs(y)) > style.image_size / 20:
            answer = f"{'top' if y < 0 else 'bottom'}-{'left' if x < 0 else 'right'}"
            return Question(f"where is the {names[target]}?", answer, kind, target)
    if kind == "size" and len(objects) > 1:
        which = one.choice(("largest", "smallest"))
        # Objects are sorted by height, which is defined for shapes and for texts.
        order = range(len(objects)) if which == "largest" else range(len(objects) - 1, -1, -1)
        first, second = (objects[i].height for i in order[:2])
        if max(first, second) >= 1.3 * min(first, second):
            return Question(f"what is the {which} object?", names[order[0]], kind, order[0])
    return None


def _questions(
    one: random.Random, style: Style, objects: Sequence[Object], count: int
) -> tuple[Question, ...]:
    """Up to `count` different questions."""
    asked: dict[str, Question] = {}
    for kind in one.choices(KINDS, _KIND_WEIGHTS, k=8 * count):
        if len(asked) == count:
            break
        question = _ask(one, kind, style, objects)
        if question is not None:
            asked.setdefault(question.text, question)
    return tuple(asked.values())


def draw(
    seed: int,
    style: Style = Style(),
    *,
    split: str = "open",
    background: str | None = None,
    questions: int = 6,
) -> Scene:
    """Draws a scene; equal arguments give equal scenes.

    Args:
        seed: any int.
        style: possible content.
        split: a name; scenes of different splits are unrelated.
        background: one of BACKGROUNDS; the default is a random one of the style.
        questions: maximum number; scenes with few objects have fewer.
    """
    brush = _Brush(f"{split}:{seed}")
    chosen = brush.one.choice(style.backgrounds)
    name = chosen if background is None else background
    pixels, owner, objects, distractors = _paint(brush, style, name)
    asked = _questions(brush.one, style, objects, questions)
    return Scene(pixels, owner, tuple(objects), name, distractors, asked)


def vocabulary(style: Style = Style()) -> tuple[str, ...]:
    """Every word that can occur in questions and answers."""
    numbers = (str(count) for count in range(style.max_objects + 1))
    plurals = (plural(shape) for shape in style.shapes if shape in SHAPES)
    return tuple(dict.fromkeys((*_WORDS_OF_QUESTIONS, *style.shapes, *plurals, *COLORS, *numbers)))
