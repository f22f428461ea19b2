"""Draw a scene that the embedded model understands, with questions and their answers."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import check_picture_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--seed", type=int, default=0, help="seed of the scene; equal seeds give equal scenes")
    add(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        default=Path("scene.png"),
        help="output image; the suffix sets the format",
    )


def run(options: argparse.Namespace) -> int:
    from ..embedded import scenes

    check_picture_path(options.output)
    scene = scenes.draw(options.seed)
    scene.image.save(options.output)
    print(options.output)
    for question, answer in scene.questions:
        print(f"  {question}  {answer}")
    return 0
