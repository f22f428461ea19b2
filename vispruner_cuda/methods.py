"""The selection methods and their parameters, in one table for operators, models and commands.

A method chooses k of an image's tokens from their scores, their cosines, or both
(docs/numerics.md, "Methods"). Parameters are keyword arguments of `prune` and `prune_varlen`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import _checks


@dataclass(frozen=True)
class Parameter:
    """A numeric parameter of a method.

    Attributes:
        name: of the keyword argument.
        default: used if it is not given.
        low, high: bounds, both inclusive.
        step: values are multiples of it; 1: an int; None: any number.
        help: one line for users.
    """

    name: str
    default: float
    low: int
    high: int
    step: float | None
    help: str

    def check(self, value: object) -> float:
        """The value as Python's int or float.

        Raises:
            TypeError, ValueError: it has the wrong type, or is out of bounds.
        """
        if self.step == 1:
            return _checks.integer(self.name, value, self.low, self.high)
        return _checks.number(self.name, value, self.low, self.high, self.step)


@dataclass(frozen=True)
class Method:
    """A selection method.

    Attributes:
        name: the value of `method=`.
        help: one line for users.
        source: where it is published.
        parameters: in the order of the operator.
    """

    name: str
    help: str
    source: str
    parameters: tuple[Parameter, ...] = ()


IMPORTANT_RATIO = Parameter("important_ratio", 0.5, 0, 1, None, "share of k kept by score")
STEP = Parameter("step", 8, 1, _checks.MAX_INT, 1, "tokens dropped per round of the loop")
SEED = Parameter("seed", 0, 0, 2**32 - 1, 1, "seed of the random order")
SCOPE_ALPHA = Parameter("scope_alpha", 1.0, 0, 4, 0.25, "exponent of the importance")
MMR_LAMBDA = Parameter("mmr_lambda", 1.0, 0, 100, None, "weight of the redundancy")

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "vispruner",
            "the tokens with the highest scores, then those least similar to the others",
            "VisPruner, arXiv 2412.01818",
            (IMPORTANT_RATIO, STEP),
        ),
        Method("topk", "the tokens with the highest scores", "the important half of VisPruner"),
        Method(
            "random", "tokens in a random order, the same for the same image", "baseline", (SEED,)
        ),
        Method(
            "maxmin",
            "tokens farthest from each other, without the scores",
            "DivPrune, arXiv 2503.02175",
        ),
        Method(
            "scope",
            "tokens with the largest gain in coverage, weighted by importance",
            "SCOPE, arXiv 2510.24214",
            (SCOPE_ALPHA,),
        ),
        Method(
            "mmr",
            "importance minus the similarity to retained tokens",
            "maximal marginal relevance, SIGIR 1998",
            (MMR_LAMBDA,),
        ),
    )
}
DEFAULT = "vispruner"

#: Every parameter of every method, by name.
PARAMETERS: Mapping[str, Parameter] = {
    parameter.name: parameter for method in METHODS.values() for parameter in method.parameters
}


def resolve(method: object, **given: object) -> dict[str, float]:
    """The parameters of a method: the given ones (not None), after a check, and defaults for the
    others.

    Args:
        method: a name in METHODS.
        given: values by parameter name; None counts as not given.

    Raises:
        TypeError, ValueError: an unknown method, a parameter of another method, a bad value.
    """
    if not isinstance(method, str):
        raise TypeError(f"method must be a str, got {_checks.describe(method)}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    known = {parameter.name: parameter for parameter in METHODS[method].parameters}
    values = {name: parameter.default for name, parameter in known.items()}
    for name, value in given.items():
        if name not in PARAMETERS:
            raise TypeError(f"no parameter {name!r}: use one of {', '.join(PARAMETERS)}")
        if value is None:
            continue
        if name not in known:
            owners = [m.name for m in METHODS.values() if PARAMETERS[name] in m.parameters]
            raise ValueError(
                f"{name} is a parameter of method {' and '.join(owners)}, got {value!r} with "
                f"method {method!r}: leave it out"
            )
        values[name] = known[name].check(value)
    return values
