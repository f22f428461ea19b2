"""Types of numeric arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of an argument that is an int within these bounds."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {value}")
        return value

    parse.__name__ = "whole number"  # argparse uses it in its error for "3.5"
    return parse


#: Far above every use, and far below the ints that libraries cannot take.
MOST = 2**31 - 1
positive = whole(1, MOST)
