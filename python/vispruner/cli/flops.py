"""Count what pruning saves: floating-point operations and KV cache.

Needs only the sizes of a model, no weights: a published model by its short name, or a checkpoint's
configuration. The last column is the count in papers on token pruning: visual tokens in the
language model only, 4nd^2 + 2n^2d + 2ndm per layer.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from .common import METHODS, PARAMETERS, CommandError, budget_of, one_line
from .numeric import MOST, positive

if TYPE_CHECKING:
    from ..selection import Budget


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or not (int(match[1]) and int(match[2])):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, got {text!r}")
    width, height = int(match[1]), int(match[2])
    if max(width, height) > MOST:
        raise argparse.ArgumentTypeError(f"must be at most {MOST} pixels a side, got {text!r}")
    return width, height


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .. import shapes

    add = parser.add_argument
    add(
        "--model",
        default="llava-1.5-7b",
        metavar="NAME_OR_PATH",
        help=f"{', '.join(shapes.MODELS)}, a directory, or a name on the Hugging Face hub",
    )
    add(
        "--k",
        type=int,
        nargs="+",
        default=None,
        help="visual tokens to retain per picture (default: 192 128 64 32)",
    )
    add("--ratio", type=float, nargs="+", default=None, help="or the shares of them to retain")
    add("--image-size", type=_size, default="672x672", metavar="WxH", help="pixels of an image")
    add("--images", type=positive, default=1, help="images in the prompt")
    add("--text-tokens", type=positive, default=64, help="other tokens in the prompt")
    add("--new-tokens", type=positive, default=64, help="tokens in the answer")
    add(
        "--cache-bytes",
        type=positive,
        default=2,
        choices=(1, 2, 4),
        metavar="BYTES",
        help="bytes per element of the KV cache",
    )


def _config(name: str) -> Any:
    from transformers import AutoConfig

    from .. import shapes

    if name in shapes.MODELS:
        return shapes.config_of(name)
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # hub, file and JSON errors have no common base
        raise CommandError(
            f"argument --model: {name!r} is none of {', '.join(shapes.MODELS)}, and its "
            f"configuration cannot be loaded: {one_line(error)}"
        ) from error


def _budgets(options: argparse.Namespace) -> list[Budget]:
    if options.k is not None and options.ratio is not None:
        raise CommandError("argument --ratio: not allowed with --k")
    ks = options.k if options.k or options.ratio else [192, 128, 64, 32]
    pairs = [(k, None) for k in ks] if ks else [(None, ratio) for ratio in options.ratio]
    # Which tokens are retained does not change the cost.
    same = {"method": METHODS[0], "default_k": None, **dict.fromkeys(PARAMETERS)}
    return [budget_of(argparse.Namespace(k=k, ratio=ratio, **same)) for k, ratio in pairs]


def run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from .. import flops, shapes
    from ..models import family_of

    budgets = _budgets(options)
    config = _config(options.model)
    width, height = options.image_size
    try:
        inputs = shapes.picture(config, height, width)
        model = shapes.empty_model(config)
        family = family_of(model)
        pruned = [family(model, budget) for budget in budgets]
        kept = [one.kept("image", inputs)[0] for one in pruned]
        projected = [one.projected("image", inputs) for one in pruned]
        before = pruned[0].placeholders("image", inputs)[0]
    except ValueError as error:
        raise CommandError(one_line(error)) from error

    def cost(visual: int, projected: int | None = None) -> flops.Cost:
        return flops.cost(
            config,
            inputs,
            [visual * options.images],  # only the sum counts, and they may be many
            text=options.text_tokens,
            new=options.new_tokens,
            element=options.cache_bytes,
            projected=projected,
        )

    whole = cost(before)
    table = Table(
        title=f"{options.model}: {options.images} image(s) of {width} x {height}, "
        f"{options.text_tokens} other tokens, {options.new_tokens} new",
        caption="vision: encoder and projector. prefill, decode: language model. "
        "visual only: 4nd² + 2n²d + 2ndm per layer.",
    )
    headings = ("", "visual tokens", "vision", "prefill", "decode", "KV cache", "visual only")
    for heading in headings:
        table.add_column(heading, justify="right")

    def row(name: str, one: flops.Cost) -> None:
        pairs = (
            (options.images * one.vision, options.images * whole.vision),
            (one.prefill, whole.prefill),
            (one.decode, whole.decode),
        )
        cells = [_with_share(f"{x / 1e12:.2f} T", x, y) for x, y in pairs]
        cache = f"{one.cache_bytes / 2**20:.0f} MiB"
        cells.append(_with_share(cache, one.cache_bytes, whole.cache_bytes))
        alone = f"{one.visual_only / 1e12:.2f} T"
        cells.append(_with_share(alone, one.visual_only, whole.visual_only))
        table.add_row(name, str(one.visual), *cells)

    row("unpruned", whole)
    for budget, visual, patches in zip(budgets, kept, projected, strict=True):
        name = f"k = {budget.k}" if budget.k is not None else f"ratio {budget.ratio}"
        row(name, cost(visual, patches))
    Console().print(table)
    return 0


def _with_share(text: str, value: float, whole: float) -> str:
    """The value, and its difference from the whole in percent."""
    if value == whole:
        return text
    return f"{text}\n{100 * (value / whole - 1):+.1f} %"
