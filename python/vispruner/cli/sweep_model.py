"""The model of `vispruner sweep`, here or on a server, and the settings to try."""

from __future__ import annotations

import argparse
import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .common import METHODS, CommandError, batch_inputs, load_model, read_image

if TYPE_CHECKING:
    import torch

    from ..selection import Budget
    from ..sweep import Item, Served, Swept

SHARES = (0.05, 0.1, 0.2, 0.33, 0.5)  # of the tokens, if neither --k nor --ratio is given


@dataclass(frozen=True)
class Model:
    """The model to sweep.

    Attributes:
        subject: answers questions; about: it, for the report.
        draw: the retained tokens of a picture under a setting, or the picture.
    """

    subject: Swept
    about: dict[str, str]
    draw: Callable[[Item, Budget], Any]


def local(options: argparse.Namespace, device: torch.device) -> Model:
    from .. import embedded
    from ..sweep import Subject
    from .show import montage, retained_by

    model, processor = load_model(options, device)

    def inputs_of(batch: Sequence[Item]) -> Any:
        questions = [item.question for item in batch]
        return batch_inputs(processor, [_image(item) for item in batch], questions, device)

    def draw(item: Item, budget: Budget) -> Any:
        pictures = retained_by(model, processor, budget, model.device, [_image(item)])
        return montage(pictures, budget.method)

    name = options.model or embedded.path()
    about = {
        "model": options.model or "the bundled model",
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return Model(Subject(model, processor, inputs_of, name, options.max_new_tokens), about, draw)


def served_model(options: argparse.Namespace) -> Model:
    """The model on the server, which chooses its device, dtype, attention and method."""
    from ..sweep import Served, ServerError

    for name in ("device", "dtype", "attention", "method", "trust_remote_code"):
        if getattr(options, name) not in (None, False, "sdpa"):
            option = name.replace("_", "-")
            raise CommandError(f"argument --{option}: not allowed with --server, which chooses it")
    try:
        subject = Served(
            options.server,
            options.model,
            _image,
            options.max_new_tokens,
            options.timeout,
            options.batch_size,
        )
    except ServerError as error:
        raise CommandError(f"argument --server: {error}") from error
    about = {
        "model": subject.name,
        "server": subject.url,
        "version": subject.version,
        "method": " ".join(str(value) for value in subject.method.values()),
        "requests at once": str(options.batch_size),
    }
    return Model(subject, about, lambda item, _: _image(item))


def settings_of(options: argparse.Namespace, served: Served | None) -> list[Budget]:
    """The settings of the options.

    Args:
        served: the server that they are for, if any: it takes k or ratio, and has a method.
    """
    from ..selection import Budget

    ks, ratios = options.k, options.ratio
    ways = [{"method": method} for method in options.method or METHODS[:1]]
    if served is not None:
        ways = [served.method]
        if (ks, ratios) == (None, None) and served.unit == "k":
            ks = sorted({max(1, round(share * served.tokens)) for share in SHARES})
        unit, given = ("k", ks) if ks is not None else ("ratio", ratios or SHARES)
        if unit != served.unit:
            raise CommandError(f"argument --{unit}: this server takes --{served.unit}")
        if max(given) > served.most:
            raise CommandError(
                f"argument --{unit}: {max(given)} is more than this server's {served.most:g} "
                f"(max_{unit})"
            )
    amounts: list[tuple[int | None, float | None]]
    if ks is not None:
        amounts = [(k, None) for k in ks]
    else:
        amounts = [(None, ratio) for ratio in ratios or SHARES]
    try:
        found = [Budget(k, r, **way) for (k, r), way in itertools.product(amounts, ways)]
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise CommandError(f"argument --{name}: {rest}") from error
    if len(set(found)) < len(found):
        raise CommandError("argument --k, --ratio or --method: a setting occurs twice")
    return found


def _image(item: Item) -> Any:
    from ..sweep import DataError

    source = io.BytesIO(item.source) if isinstance(item.source, bytes) else item.source
    try:
        return read_image(source, item.name)
    except CommandError as error:
        raise DataError(str(error)) from error
