"""Ask a model about an image, with its visual tokens pruned.

Prints the answer, the number of retained tokens and the milliseconds per phase. With --compare, the
unpruned model answers as well.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .common import (
    CommandError,
    add_budget,
    add_device,
    add_model,
    answer,
    apply_budget,
    budget_of,
    device_of,
    load_model,
    model_inputs,
    one_line,
    read_image,
    utf8,
)
from .numeric import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "image",
        nargs="?",
        type=Path,
        metavar="IMAGE",
        help="an image file (default: the bundled scene)",
    )
    add(
        "question",
        nargs="?",
        type=utf8,
        metavar="QUESTION",
        help="a question about the image (default: one about the bundled scene)",
    )
    add("--compare", action="store_true", help="also answer without pruning")
    add("--max-new-tokens", type=positive, default=64, help="longest answer, in tokens")
    add(
        "--runs",
        type=positive,
        default=1,
        help="timed runs after one warm-up run; the table shows medians",
    )
    add(
        "--no-warmup",
        action="store_true",
        help="no warm-up run (for models that take minutes)",
    )
    add_model(parser)
    add_budget(parser)
    add_device(parser)


def run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    from .. import embedded
    from ..phases import phases_of, unpruned

    budget = budget_of(options)
    device = device_of(options)
    if options.image is not None and options.question is None:
        raise CommandError("argument QUESTION: IMAGE needs a question")
    path, question = options.image, options.question
    if path is None:
        example = embedded.example()
        path, question = Path(example.image), example.questions[0][0]
    image = read_image(path)
    console = Console()
    with console.status("loading the model"):
        model, processor = load_model(options, device)
        try:
            inputs = model_inputs(processor, image, question, device)
        except (ValueError, TypeError, RuntimeError) as error:
            raise CommandError(one_line(error)) from error
    call = (model, processor, inputs, options.max_new_tokens)

    def pruned() -> tuple[str, dict[str, float], Any]:
        with apply_budget(model, budget) as pruner:
            text = answer(*call)
            assert pruner.last is not None
            return text, phases_of(pruner.last.milliseconds), pruner.last

    def whole() -> tuple[str, dict[str, float], Any]:
        with unpruned(model) as clock:
            text = answer(*call)
            return text, phases_of(clock.milliseconds()), None

    # Alternating, so that a busy machine slows both equally.
    ways = {"pruned": pruned} | ({"unpruned": whole} if options.compare else {})
    times: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    answers: dict[str, str] = {}
    report = None
    warmups = 0 if options.no_warmup else 1
    with Progress(console=console, transient=True) as bar:
        for number in bar.track(range(warmups + options.runs), description="answering"):
            for way, ask in ways.items():
                try:
                    answers[way], spent, seen = ask()
                except (ValueError, TypeError, RuntimeError) as error:
                    raise CommandError(one_line(error)) from error
                report = seen or report
                if number >= warmups:
                    times[way].append(spent)
    assert report is not None

    medians = {
        way: {phase: statistics.median(run[phase] for run in runs) for phase in runs[0]}
        for way, runs in times.items()
    }
    console.print(f"[bold]{escape(path.name)}[/bold]  {escape(question)}", highlight=False)
    for way, text in answers.items():
        shown = f"  {way + ':' if options.compare else '->'} {text}"
        console.print(shown, highlight=False, markup=False)
    tokens = {"pruned": report.tokens_after, "unpruned": report.tokens_before}
    prompt = {"pruned": report.prompt_after, "unpruned": report.prompt_before}
    console.print(_table(medians, tokens, prompt, options.runs))
    return 0


def _table(
    medians: Mapping[str, Mapping[str, float]],
    tokens: Mapping[str, int],
    prompt: Mapping[str, int],
    runs: int,
) -> Any:
    from rich.table import Table

    compare = "unpruned" in medians
    table = Table("", title="one run" if runs == 1 else f"medians of {runs} runs")
    for way in ("unpruned", "pruned") if compare else ("pruned",):
        table.add_column(way, justify="right")
    if compare:
        table.add_column("saved", justify="right")

    def add(name: str, before: float, after: float, unit: str = "", digits: int = 0) -> None:
        cells = [f"{after:.{digits}f}{unit}"]
        if compare:
            less = f"{100 * (1 - after / before):.0f} %" if before else ""
            cells = [f"{before:.{digits}f}{unit}" if before else "", *cells, less]
        table.add_row(name, *cells)

    if compare:
        add("visual tokens", tokens["unpruned"], tokens["pruned"])
        add("prompt tokens", prompt["unpruned"], prompt["pruned"])
    else:
        table.add_row("visual tokens", f"{tokens['unpruned']} -> {tokens['pruned']}")
        table.add_row("prompt tokens", f"{prompt['unpruned']} -> {prompt['pruned']}")
    for phase, after in medians["pruned"].items():
        add(phase, medians["unpruned"][phase] if compare else 0.0, after, " ms", 2)
    return table
