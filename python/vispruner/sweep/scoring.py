"""Scores of answers: exact match, or a function of the user."""

from __future__ import annotations

import importlib
import numbers
import re
import sys
from collections.abc import Callable
from pathlib import Path

#: (answer, right answer) -> a score in [0, 1].
Scorer = Callable[[str, str], float]


class ScorerError(ValueError):
    """A scorer cannot be used; the message is one line."""


def exact_match(answer: str, right: str) -> float:
    """1 if the answers are equal, ignoring case, punctuation, articles and spaces.

    The sign and the point of a number are not ignored. If nothing else is left of an answer, its
    articles and punctuation are not ignored either: "A" equals "(a)", and "?" equals "?" only.
    """
    return float(_normal(answer) == _normal(right))


def _normal(text: str) -> str:
    lower = text.lower().replace("\N{MINUS SIGN}", "-")
    words = re.sub(r"(?!(?<!\w)-[.\d]|(?<![^\W\d])\.\d)[^\w\s]", " ", lower).split()
    content = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(content or words) or " ".join(lower.split())


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def load_scorer(name: str) -> Scorer:
    """The scorer of a name.

    Args:
        name: "module:function". Modules in the current directory are found as well.

    Raises:
        ScorerError: there is none of this name, or it is not callable.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ScorerError(f"expected module:function, got {name!r}")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: object = importlib.import_module(module)
    except Exception as error:  # also those that the module itself raises
        raise ScorerError(f"cannot import {module}: {_reason(error)}") from error
    finally:
        sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ScorerError(f"{module} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise ScorerError(f"{name} is not callable, it is of type {type(found).__name__}")
    return found


def score(scorer: Scorer, answer: str, right: str) -> float:
    """The score of an answer.

    Raises:
        ScorerError: the scorer raised an exception, or returned no number in [0, 1].
    """
    call = f"scorer({answer!r}, {right!r})"
    try:
        value = scorer(answer, right)
    except Exception as error:
        raise ScorerError(f"{call} raised {_reason(error)}") from error
    if not isinstance(value, numbers.Real) or not 0 <= value <= 1:  # false for NaN as well
        raise ScorerError(f"{call} must return a number from 0 to 1, got {value!r}")
    return float(value)
