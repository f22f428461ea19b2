"""The `vispruner` command: one module per subcommand."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

from .common import CommandError

COMMANDS = ("ask", "show", "sweep", "web", "flops", "draw", "info")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


class _Version(argparse.Action):
    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        print(f"vispruner {metadata.version('vispruner-cuda')}")
        parser.exit()


def _remedy(error: ImportError) -> str:
    """The command that installs what is missing: the requirements of an extra of this package."""
    missing = str(error.name).partition(".")[0].replace("_", "-")
    extras: dict[str, list[str]] = {}
    chosen = "transformers"
    for requirement in metadata.requires("vispruner-cuda") or ():
        wanted, _, marker = requirement.partition(";")
        extra = re.search(r"extra == .([\w-]+).", marker)
        if extra and extra[1] in ("transformers", "sweep", "web"):
            extras.setdefault(extra[1], []).append(wanted.strip())
            if re.split(r"[^\w-]", wanted)[0] == missing:
                chosen = extra[1]
    return f"pip install {shlex.join(extras.get(chosen, ()))}"


def parser() -> argparse.ArgumentParser:
    """The parser of the command; it puts the subcommand's `run` into the namespace."""
    from rich_argparse import ArgumentDefaultsRichHelpFormatter

    class Formatter(ArgumentDefaultsRichHelpFormatter):
        def _get_help_string(self, action: argparse.Action) -> str | None:
            """Hides uninformative defaults."""
            if action.default in (None, False, argparse.SUPPRESS):
                return action.help
            return super()._get_help_string(action)

    top = _Parser(
        prog="vispruner",
        description="Visual token pruning for vision-language models: ask a pruned model, draw "
        "the retained tokens, and count what pruning saves.",
        formatter_class=Formatter,
    )
    top.add_argument("--version", action=_Version, help="print the version and exit")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        summary = str(module.__doc__).strip()
        command = commands.add_parser(
            name,
            help=summary.splitlines()[0].removesuffix("."),
            description=summary,
            formatter_class=Formatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=name)
    return top


def _discard_output() -> None:
    """Sends standard output nowhere if it cannot be written: Python would fail at its exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status, 2 for invalid input."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack characters of an answer
        sys.stdout.reconfigure(errors="replace")
    name = "vispruner"
    try:
        options = parser().parse_args(arguments)
        name = f"vispruner {options.command}"
        status: int = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except CommandError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except ImportError as error:  # of rich, transformers, ...
        print(f"{name}: {error}: {_remedy(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads standard output any more
        _discard_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        _discard_output()
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return status
