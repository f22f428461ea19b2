"""Choose k on your own pictures: measure what each setting loses and saves.

Asks the unpruned model every question once, then each setting, and reports which is the smallest
setting that loses less than the tolerance. Interrupt it at any time: the next run with the same
directory continues where this one stopped.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .common import (
    METHODS,
    CommandError,
    add_device,
    add_model,
    device_of,
    one_line,
    utf8,
)
from .numeric import positive, whole
from .sweep_model import SHARES, Model, local, served_model, settings_of

if TYPE_CHECKING:
    from ..selection import Budget
    from ..sweep import Item, Measurement, Served, Summary, Swept
    from ..sweep.scoring import Scorer

MOST_CHANGED = 8  # answers that the page shows
TIMEOUT = 300  # seconds


def _numbers(kind: type) -> Any:
    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = "list of numbers"  # argparse uses it in its error
    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        metavar="FILE_OR_DIRECTORY",
        help="JSON lines with image, question and optionally answer; a directory of pictures; or a "
        "Hugging Face dataset, NAME[[:CONFIGURATION]:SPLIT] (default: drawn scenes)",
    )
    add("--question", type=utf8, help="question for pictures without one")
    add("--limit", type=positive, help="questions to ask (scenes: pictures, default 8)")
    settings = parser.add_argument_group("settings").add_mutually_exclusive_group()
    settings.add_argument("--k", type=_numbers(int), help="such as 32,64,128")
    settings.add_argument(
        "--ratio",
        type=_numbers(float),
        help=f"or shares of the tokens (default: {','.join(map(str, SHARES))})",
    )
    add(
        "--method",
        type=lambda text: text.split(","),
        help=f"one or several of {', '.join(METHODS)} (default: {METHODS[0]})",
    )
    add(
        "--scorer",
        metavar="MODULE:FUNCTION",
        help="function (answer, correct answer) -> score from 0 to 1 (default: exact match, "
        "ignoring case, punctuation and articles)",
    )
    add("--tolerance", type=float, default=1.0, metavar="POINTS", help="acceptable loss")
    add(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="questions to answer at once; times are for a single question, except that a server "
        "is measured under this load",
    )
    add("--max-new-tokens", type=positive, default=64, help="longest answer, in tokens")
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("sweep"),
        metavar="DIRECTORY",
        help="for the report, and for the measurements of an interrupted run",
    )
    add_model(parser)
    add_device(parser)
    server = parser.add_argument_group("server")
    server.add_argument(
        "--server",
        metavar="URL",
        help="sweep the model of a vLLM server with this package (docs/serving.md); --model is its "
        "name there, --batch-size the requests at once, OPENAI_API_KEY the key",
    )
    server.add_argument(
        "--timeout",
        type=whole(1, 10**6),  # a socket takes less than 2**31 milliseconds
        metavar="SECONDS",
        help=f"how long to wait for the server (default: {TIMEOUT})",
    )


def _scorer(options: argparse.Namespace, items: Sequence[Item]) -> Scorer:
    """The scorer, after a first trial: most faults show before anything is measured."""
    from ..sweep import scoring

    if options.scorer is None:
        return scoring.exact_match
    right = next((item.answer for item in items if item.answer is not None), None)
    if right is None:
        raise CommandError("argument --scorer: no question has a right answer")
    try:
        scorer = scoring.load_scorer(options.scorer)
        scoring.score(scorer, right, right)
    except scoring.ScorerError as error:
        raise CommandError(f"argument --scorer: {error}") from error
    return scorer


def run(options: argparse.Namespace) -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from .. import sweep
    from ..sweep import report

    if not 0 <= options.tolerance < math.inf:  # false for NaN as well
        raise CommandError(
            f"argument --tolerance: must be a finite number of at least 0, got {options.tolerance}"
        )
    if options.timeout is not None and options.server is None:
        raise CommandError("argument --timeout: not allowed without --server")
    options.timeout = options.timeout or TIMEOUT
    if options.question is not None and options.data is None:
        raise CommandError(
            "argument --question: not allowed without --data: the drawn scenes have their own"
        )
    console = Console()
    if options.server is None:
        settings, device = settings_of(options, None), device_of(options)
    else:
        with console.status("asking the server"):
            model = served_model(options)
        settings = settings_of(options, cast("Served", model.subject))
    try:
        items = list(sweep.read(options.data, options.question, options.limit))
    except sweep.DataError as error:
        raise CommandError(f"argument --data: {error}") from error
    scorer = _scorer(options, items)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        records = sweep.Records(options.output / "measurements.jsonl")
    except (OSError, ValueError) as error:
        raise CommandError(f"argument -o: {one_line(error)}") from error
    with records:
        if options.server is None:
            with console.status("loading the model"):
                model = local(options, device)
        asked, skipped = _measure(
            console, model.subject, items, [None, *settings], records, options.batch_size
        )
    for line in skipped:
        console.print(f"skipped: {line}", highlight=False, markup=False)
    if not asked:
        raise CommandError("argument --data: no question could be answered")

    kept = [item for item, _ in asked]
    measured = [
        (budget, [found[number] for _, found in asked])
        for number, budget in enumerate([None, *settings])
    ]
    try:
        summaries = sweep.summarize(kept, measured, scorer)
    except sweep.ScorerError as error:
        raise CommandError(f"argument --scorer: {error}") from error
    best = sweep.recommended(summaries, options.tolerance)
    table = Table(box=box.SIMPLE, padding=0)
    for number, heading in enumerate(report.HEADINGS):
        table.add_column(heading, justify="right" if number else "left", no_wrap=number > 0)
    for summary in summaries:
        table.add_row(*report.row(summary), style="bold" if summary is best else None)
    console.print(table)
    console.print(report.legend(summaries), style="dim", highlight=False)
    console.print(report.advice(best, summaries, options.tolerance), highlight=False)
    about = {
        **model.about,
        "data": options.data or "drawn scenes",
        "scorer": options.scorer or "exact match",
    }
    with console.status("writing the report"):
        try:
            changed = _changed(model, kept, summaries, measured)
            report.write(
                options.output, summaries, best, options.tolerance, about, changed, skipped
            )
        except OSError as error:
            raise CommandError(f"argument -o: {one_line(error)}") from error
    console.print(f"report: {options.output / 'report.html'}", highlight=False, markup=False)
    return 1 if skipped else 0


def _measure(
    console: Any,
    subject: Swept,
    items: Sequence[Item],
    settings: Sequence[Budget | None],
    records: Any,
    batch_size: int,
) -> tuple[list[tuple[Item, list[Measurement]]], list[str]]:
    """Every item under every setting, and a line for each picture that was skipped."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from ..sweep import Failed, ServerError

    asked: list[tuple[Item, list[Measurement]]] = []
    skipped: dict[str, str] = {}
    columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("asking", total=len(items) * len(settings))
        for start in range(0, len(items), batch_size):
            batch: list[tuple[Item, list[Measurement]]] = [
                (item, []) for item in items[start : start + batch_size]
            ]
            for number, budget in enumerate(settings):
                keys = [subject.key(item, budget) for item, _ in batch]
                results = [records.get(key) for key in keys]
                if None in results:  # the whole batch again, so that its numbers stay the same
                    references = [found[0] for _, found in batch] if number else None
                    try:
                        new = subject.measure([item for item, _ in batch], budget, references)
                    except ServerError as error:
                        raise CommandError(f"argument --server: {error}") from error
                    results = [old or one for old, one in zip(results, new, strict=True)]
                remaining = []
                for (item, found), key, result in zip(batch, keys, results, strict=True):
                    if isinstance(result, Failed):
                        skipped[item.name] = f"{item.name}: {result.reason}"
                        bar.advance(task, len(settings) - number)
                        continue
                    if records.get(key) is None:
                        try:
                            records.add(key, result)
                        except OSError as error:
                            raise CommandError(f"argument -o: {one_line(error)}") from error
                    found.append(result)
                    remaining.append((item, found))
                    bar.advance(task)
                batch = remaining
                if not batch:
                    break
            asked += batch
    return asked, list(skipped.values())


def _changed(
    model: Model,
    items: Sequence[Item],
    summaries: Sequence[Summary],
    measured: Sequence[tuple[Budget | None, Sequence[Measurement]]],
) -> list[Any]:
    """The answers that lost most of their probability, each under the largest setting that changed
    it, one per picture."""
    from ..sweep.report import Changed
    from ..sweep.summary import name_of

    order = sorted(range(1, len(measured)), key=lambda n: -summaries[n].visual_tokens)
    reference = measured[0][1]
    candidates = []
    for i in range(len(items)):
        for number in order:
            after = measured[number][1][i]
            if after.answer != reference[i].answer:
                lost = (reference[i].log_probability or 0) - (after.log_probability or 0)
                candidates.append((lost, i, number))
                break
    found, pictures = [], set()
    for _, i, number in sorted(candidates, reverse=True):
        item, budget = items[i], measured[number][0]
        assert budget is not None
        if item.picture in pictures:
            continue
        pictures.add(item.picture)
        after = measured[number][1][i]
        found.append(Changed(item, name_of(budget), reference[i], after, model.draw(item, budget)))
        if len(found) == MOST_CHANGED:
            break
    return found
