"""Scenes as tensors, for training the tower and the language model.

A training set maps the number of a step to a batch, so a resumed run uses exactly the same scenes
as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vispruner.embedded import scenes
from vispruner.embedded.scenes import Question, Scene

from .model import EOS, MEAN, PAD, STD, word_tokenizer
from .recipe import Recipe

IGNORED = -100  # label that cross_entropy ignores
_OWNED = 10 / 64  # minimum share of a patch's pixels for it to belong to an object


@dataclass(frozen=True)
class Packed:
    """Questions with their answers, one after another: (B, T) each.

    Attributes:
        ids: tokens of question, answer, question, answer ... and padding.
        labels: the token that follows, where it belongs to an answer or ends it, else IGNORED.
        block: index of a token's question, -1 for padding.
        position: position of a token in its question.
    """

    ids: Tensor
    labels: Tensor
    block: Tensor
    position: Tensor


@dataclass(frozen=True)
class Patches:
    """Labels of N patches.

    Attributes:
        owner: (B, N) 1 + index of the patch's object, 0 for background.
        color, shape: (B, N) 1 + index of the object's colour and shape, 0 for background.
        box: (B, N, 5) offset from the patch to the object's centre, the centre, and the object's
            size, scaled.
        present: (B, colours * shapes + colours + shapes) 0 or 1, for the whole image.
    """

    owner: Tensor
    color: Tensor
    shape: Tensor
    box: Tensor
    present: Tensor


@dataclass(frozen=True)
class Batch:
    pixels: Tensor  # (B, 3, side, side) uint8
    patches: Patches
    packed: Packed

    def to(self, device: torch.device) -> Batch:
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by the data loader, so that `to` need not wait."""
        return self._moved(torch.Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        def parts(of: Patches | Packed) -> dict[str, Tensor]:
            return {field.name: move(getattr(of, field.name)) for field in dataclasses.fields(of)}

        return Batch(
            move(self.pixels), Patches(**parts(self.patches)), Packed(**parts(self.packed))
        )


def normalize(pixels: Tensor) -> Tensor:
    """uint8 pixels, normalized as by the processor."""
    return (pixels.float() / 255 - MEAN) / STD


def stack_pixels(drawn: Sequence[Scene]) -> Tensor:
    """(B, 3, side, side) uint8."""
    return torch.from_numpy(np.stack([scene.pixels for scene in drawn])).permute(0, 3, 1, 2)


def owners(drawn: Sequence[Scene], patch_size: int) -> Tensor:
    """(B, N) 1 + index of the object that covers most of a patch, 0 if none covers enough."""
    owner = np.stack([scene.owner for scene in drawn])
    batch, side, _ = owner.shape
    grid = side // patch_size
    cells = owner.reshape(batch, grid, patch_size, grid, patch_size).swapaxes(2, 3)
    cells = cells.reshape(batch, grid * grid, patch_size**2)
    most = max(len(scene.objects) for scene in drawn)
    covered = np.stack([(cells == 1 + i).mean(-1) for i in range(most)], -1)
    return torch.from_numpy(np.where(covered.max(-1) >= _OWNED, covered.argmax(-1) + 1, 0))


def label_patches(drawn: Sequence[Scene], recipe: Recipe) -> Patches:
    """The tower's targets."""
    colors, shapes = list(scenes.COLORS), list(recipe.style.shapes)
    owner = owners(drawn, recipe.vision.patch_size)
    rows = 1 + max(len(scene.objects) for scene in drawn)
    color, shape = torch.zeros(2, len(drawn), rows, dtype=torch.long)
    place = torch.zeros(len(drawn), rows, 3)  # centre and size in pixels
    pairs = torch.zeros(len(drawn), len(colors), len(shapes))
    for i, scene in enumerate(drawn):
        for j, thing in enumerate(scene.objects, 1):
            color[i, j] = 1 + colors.index(thing.color)
            shape[i, j] = 1 + shapes.index(thing.shape)
            place[i, j] = torch.tensor([*thing.center, thing.size])
            pairs[i, color[i, j] - 1, shape[i, j] - 1] = 1

    step = recipe.vision.patch_size
    centers = step * torch.arange(recipe.grid) + step / 2
    x, y = centers.repeat(recipe.grid), centers.repeat_interleave(recipe.grid)
    own = place.gather(1, owner.unsqueeze(-1).expand(-1, -1, 3))
    half = recipe.style.image_size / 2
    box = [
        (own[..., 0] - x) / step,
        (own[..., 1] - y) / step,
        own[..., 0] / half - 1,
        own[..., 1] / half - 1,
        own[..., 2] / (2 * step) - 1,
    ]
    return Patches(
        owner,
        color.gather(1, owner),
        shape.gather(1, owner),
        torch.stack(box, -1),
        torch.cat([pairs.flatten(1), pairs.amax(2), pairs.amax(1)], 1),
    )


def pack(questions: Iterable[Sequence[Question]], tokenizer: Tokenizer) -> Packed:
    """Packs the questions of each image into one row."""
    rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
    for asked in questions:
        ids: list[int] = []
        labels: list[int] = []
        block: list[int] = []
        position: list[int] = []
        texts = [text for question in asked for text in (question.text, question.answer)]
        encoded = [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        for number, (words, answer) in enumerate(zip(encoded[::2], encoded[1::2], strict=True)):
            ids += words + answer
            labels += [IGNORED] * (len(words) - 1) + [*answer, EOS]
            block += [number] * (len(words) + len(answer))
            position += range(len(words) + len(answer))
        rows.append((ids, labels, block, position))
    width = max(len(row[0]) for row in rows)

    def padded(column: int, filler: int) -> Tensor:
        return torch.tensor([row[column] + [filler] * (width - len(row[0])) for row in rows])

    return Packed(padded(0, PAD), padded(1, IGNORED), padded(2, -1), padded(3, 0))


class Training(Dataset[Batch]):
    """The batches of a stage, by step. Stages and seeds share no scenes."""

    def __init__(self, recipe: Recipe, stage: str, seed: int) -> None:
        self._recipe = recipe
        self._split = f"train/{seed}/{stage}"
        self._batch = recipe.stages[stage].batch
        self._tokenizer = word_tokenizer(recipe.style)

    def __getitem__(self, step: int) -> Batch:
        recipe = self._recipe
        first = step * self._batch
        drawn = [
            scenes.draw(i, recipe.style, split=self._split, questions=recipe.questions)
            for i in range(first, first + self._batch)
        ]
        return Batch(
            stack_pixels(drawn),
            label_patches(drawn, recipe),
            pack((scene.asked for scene in drawn), self._tokenizer),
        )


def batches(recipe: Recipe, stage: str, seed: int, start: int) -> Iterator[Batch]:
    """The batches of a stage, starting at step `start`."""
    return iter(
        DataLoader(
            Training(recipe, stage, seed),
            batch_size=None,
            sampler=range(start, recipe.stages[stage].steps),
            num_workers=recipe.workers,
            pin_memory=torch.cuda.is_available(),
        )
    )
