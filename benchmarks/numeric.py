"""Types of numeric arguments of the benchmarks: a value out of range is refused in one line.

The operators' benchmarks run without the package vispruner, which has such types of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

#: Far above every use, and far below the ints that libraries cannot take.
MOST = 2**31 - 1


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """The type of an argument that is an int within these bounds."""

    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, got {text}")
        return value

    parse.__name__ = "whole number"  # argparse uses it in its error for "3.5"
    return parse


def seconds(text: str) -> float:
    """The type of a duration: above 0 and at most a day."""
    value = float(text)
    if not 0 < value <= 86400:  # not a number compares as False
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 86400, got {text}")
    return value


positive = whole(1)
seed = whole(0)
threads = whole(1, 4096)
