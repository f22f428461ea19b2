"""Draw the retained visual tokens of an image.

The drawing has three panels: the encoder's input, a heat map of the scores, and the retained
patches, with important and diverse patches in two colours.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    METHODS,
    CommandError,
    add_budget,
    add_device,
    add_model,
    apply_budget,
    budget_of,
    check_picture_path,
    device_of,
    dtype_of,
    load_model,
    model_inputs,
    one_line,
    quiet,
    read_image,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from ..selection import Budget

PANEL = 480  # approximate length of a panel's longer side, in pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "images",
        nargs="*",
        type=Path,
        metavar="IMAGE",
        help="image files (default: the bundled scene)",
    )
    add(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        default=Path("vispruner.png"),
        help="output image; the suffix sets the format",
    )
    add(
        "--tower",
        metavar="NAME_OR_PATH",
        help="a CLIP tower instead of a whole model, such as openai/clip-vit-large-patch14-336; "
        "'random' is LLaVA-1.5's shape with random weights, whose attention has no meaning",
    )
    add_model(parser)
    add_budget(parser)
    add_device(parser)


@dataclass(frozen=True)
class Picture:
    """A picture as the encoder's input, and its retained tokens.

    Attributes:
        seen: the pixels; the grid of patches covers them.
        grid: rows and columns of tokens.
        scores: (cells,); important, diverse: retained cells.
    """

    seen: Image.Image
    grid: tuple[int, int]
    scores: Tensor
    important: list[int]
    diverse: list[int]


def _pixels_as_image(pixels: Tensor, processor: Any) -> Image.Image:
    """(3, H, W) of a processor's output as an image, without the normalization."""
    import torch
    from PIL import Image

    mean, std = (
        torch.tensor(getattr(processor, name)).view(3, 1, 1) for name in ("image_mean", "image_std")
    )
    values = (pixels.float().cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
    raw = bytes(values.permute(1, 2, 0).flatten().tolist())
    return Image.frombytes("RGB", (values.shape[2], values.shape[1]), raw)


def pictures_of(item: Any, image: Image.Image, inputs: Any, processor: Any) -> list[Picture]:
    """The pictures that an image was encoded as: one, or its tiles.

    Args:
        item: the `Kept` of the report; image: from the file.
        inputs: of the model; processor: the image processor.
    """
    import torch

    pixels = inputs["pixel_values"].flatten(0, -4) if inputs["pixel_values"].dim() > 2 else None
    grids = [item.grid[-2:]] * (item.grid[0] if len(item.grid) == 3 else 1)
    if len(item.grid) == 1:  # packed tokens; the first picture is the overview, a square
        side = round(item.lengths[0] ** 0.5)
        grids = [(side, side)]
    kept = torch.zeros((2, len(item.scores)), dtype=torch.bool)
    important = item.important.cpu()
    indices = item.indices.cpu()
    kept[0, indices[important]] = True
    kept[1, indices[~important]] = True
    found, start = [], 0
    for i, grid in enumerate(grids):
        cells = slice(start, start + grid[0] * grid[1])
        start = cells.stop
        found.append(
            Picture(
                image if pixels is None else _pixels_as_image(pixels[i], processor),
                grid,
                item.scores[cells].cpu(),
                *(part[cells].nonzero()[:, 0].tolist() for part in kept),
            )
        )
    return found


def retained_by(
    model: Any, processor: Any, budget: Budget, device: torch.device, images: list[Image.Image]
) -> list[Picture]:
    """The pictures of all images with their retained tokens; CommandError if pruning fails."""
    import torch

    from .. import prepare

    found = []
    try:
        with torch.no_grad(), apply_budget(model, budget) as pruner:
            for image in images:
                inputs = model_inputs(processor, image, "", device)
                prepare(model, inputs)
                assert pruner.last is not None
                item = pruner.last.items[0]
                found += pictures_of(item, image, inputs, processor.image_processor)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CommandError(one_line(error)) from error
    return found


def _by_model(
    options: argparse.Namespace, budget: Budget, device: torch.device, images: list[Image.Image]
) -> list[Picture]:
    return retained_by(*load_model(options, device), budget, device, images)


def _by_tower(
    options: argparse.Namespace, budget: Budget, device: torch.device, images: list[Image.Image]
) -> list[Picture]:
    import torch

    from ..clip import ClipTower, TowerError
    from ..report import Kept

    quiet()
    dtype = dtype_of(options, device)
    dtype = torch.float32 if dtype == "auto" else dtype
    try:
        if options.tower == "random":
            tower = ClipTower.random(device=device, dtype=dtype)
        else:
            tower = ClipTower.load(options.tower, device=device, dtype=dtype)
    except TowerError as error:
        raise CommandError(f"argument --tower: {error}") from error
    found = []
    for image in images:
        pixels = tower.preprocess([image])
        cues = tower.encode(pixels)
        cells = cues.scores.shape[1]
        kept, indices, _ = budget.select(cues.feats, cues.scores)
        item = Kept(
            "image",
            indices[0],
            tower.grid,
            before=cells,
            after=kept.shape[1],
            scores=cues.scores[0],
            lengths=(cells,),
            ranked=(budget.ranked(kept.shape[1]),),
        )
        found += pictures_of(item, image, {"pixel_values": pixels}, tower.image_processor)
    return found


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from .. import embedded

    budget = budget_of(options)
    device = device_of(options)
    check_picture_path(options.output)
    if options.tower is not None and options.model is not None:
        raise CommandError("argument --tower: not allowed with --model")
    for name in ("attention", "trust_remote_code"):  # of --model
        if options.tower is not None and getattr(options, name) not in (False, "sdpa"):
            option = name.replace("_", "-")
            raise CommandError(f"argument --{option}: not allowed with --tower, which ignores it")
    images = [read_image(path) for path in options.images or [Path(embedded.example().image)]]
    console = Console()
    with console.status("selecting tokens"):
        choose = _by_model if options.tower is None else _by_tower
        found = choose(options, budget, device, images)
        drawn = montage(found, budget.method, random_weights=options.tower == "random")
        drawn.save(options.output)
    for picture in found:
        before = picture.grid[0] * picture.grid[1]
        important, diverse = len(picture.important), len(picture.diverse)
        parts = f"{important} important, {diverse} diverse"
        console.print(
            f"{picture.grid[0]} x {picture.grid[1]} tokens: {before} -> {important + diverse} "
            f"({parts if budget.method == METHODS[0] else budget.method})",
            highlight=False,
        )
    console.print(f"picture: {options.output}", highlight=False, markup=False)
    return 0


def montage(
    found: list[Picture], method: str = METHODS[0], *, random_weights: bool = False
) -> Image.Image:
    """One row per picture: the encoder's input, the scores, and the retained tokens."""
    from . import pictures

    rows = []
    for picture in found:
        cell = max(4, PANEL // max(picture.grid))
        grid = picture.grid
        rows.append(
            [
                pictures.fit(picture.seen, grid, cell),
                pictures.draw_scores(picture.seen, grid, picture.scores.tolist(), cell=cell),
                pictures.draw_retained(
                    picture.seen, grid, picture.important, picture.diverse, cell=cell
                ),
            ]
        )
    before = sum(picture.grid[0] * picture.grid[1] for picture in found)
    important = sum(len(picture.important) for picture in found)
    diverse = sum(len(picture.diverse) for picture in found)
    headings = (
        "Encoder input",
        "Attention, by rank",
        f"{important + diverse} of {before} tokens retained",
    )
    legend: list[tuple[pictures.Color | None, str]] = []
    if method in ("vispruner", "topk"):
        legend.append((pictures.IMPORTANT, f"{important} important: highest attention"))
    if method == "vispruner":
        legend.append((pictures.DIVERSE, f"{diverse} diverse: left by deduplication"))
    elif method != "topk":
        legend.append((pictures.DIVERSE, f"{diverse} selected by {method}"))
    if random_weights:
        legend.append((None, "Random weights: the attention has no meaning."))
    return pictures.montage(rows, headings, legend)
