"""Command line of the accuracy experiment. Run it in benchmarks/.

All results of a seed from scratch: `python -m accuracy all --seed S`. Interrupted training resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numeric
import torch
from documents import ResultsError

from . import recipe as recipes
from .training import CheckpointError

PACKAGED = "cpu"  # recipe of the model in the package
COMMANDS = {
    "train": "train a model, or resume an interrupted run",
    "evaluate": "answer the test questions with every rule",
    "methods": "answer the test questions with every method of prune",
    "analyze": "attention, dispersion, ablations",
    "export": "copy the model into the package",
    "report": "tables and plots of the documentation, from all result files",
    "all": "train, evaluate, methods, analyze and report",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--recipe", default="cpu", help="name in recipes/, or path to a file")
        if name == "report":
            continue
        command.add_argument("--seed", type=numeric.seed, default=0)
        command.add_argument(
            "--runs", type=Path, help="directory for all checkpoints (default: runs)"
        )
        command.add_argument("--threads", type=numeric.threads, help="CPU threads")
        if name in ("evaluate", "methods", "analyze", "all"):
            command.add_argument(
                "--scenes", type=numeric.positive, default=130, help="per background"
            )
        if name == "export":
            command.add_argument(
                "-o", "--output", type=Path, help="directory to use instead of the package"
            )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        recipe = recipes.load(options.recipe)
    except (OSError, ValueError) as error:
        parser.error(f"argument --recipe: {error}: name a file in recipes/, or a .yaml file")
    try:
        return _run(options, recipe, Path(options.recipe).stem)
    except (CheckpointError, ResultsError) as error:
        parser.error(str(error))


def _run(options: argparse.Namespace, recipe: recipes.Recipe, name: str) -> int:
    if options.command == "report":
        from .report import report

        report(recipe, name)
        return 0

    if options.threads:
        torch.set_num_threads(options.threads)
    directory = (options.runs or Path("runs")) / f"{name}-{options.seed}"
    everything = options.command == "all"
    if everything or options.command == "train":
        from .train import train

        train(recipe, options.seed, directory)
    if everything or options.command == "evaluate":
        from .evaluation import evaluate

        print(evaluate(recipe, name, options.seed, directory, options.scenes))
    if everything or options.command == "methods":
        from .evaluation import evaluate_methods

        # Whoever names a directory or another recipe wants no other model instead.
        packaged = options.runs is None and options.recipe == PACKAGED
        print(
            evaluate_methods(
                recipe, name, options.seed, directory, options.scenes, packaged=packaged
            )
        )
    if everything or options.command == "analyze":
        from .analyses import analyze

        print(analyze(recipe, name, options.seed, directory, options.scenes))
    if options.command == "export":
        from .export import export

        print(export(recipe, options.seed, directory, options.output))
    if everything:
        from .report import report

        report(recipe, name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
