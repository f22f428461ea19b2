"""Verification of the operators on the devices of a machine: `python -m vispruner_cuda --verify`.

`verify` runs cases on a `Backend` and compares the results with the reference; the command does
this for each device of the machine. Any implementation of the functional API can be a backend:

    from vispruner_cuda.verification import Backend, cases, select, verify
    backend = Backend("mine", my_operators, my_plans)
    result = verify(backend, select(cases(), most_cost=5), plans="turns")  # if it is slow
    assert result["equal"], result

A reported difference can be reproduced from the file only:
`Case.from_data(difference["case"])` has the same inputs everywhere.
"""

from .cases import OPERATORS, Case, Operators, cases, select
from .checking import Backend, NoPlans, Plans, Result, settings, verify
from .comparison import Difference, compare
from .expected import Exact, Expectations, Near, expected
from .known_answers import KnownAnswer

__all__ = [
    "OPERATORS",
    "Backend",
    "Case",
    "Difference",
    "Exact",
    "Expectations",
    "KnownAnswer",
    "Near",
    "NoPlans",
    "Operators",
    "Plans",
    "Result",
    "cases",
    "compare",
    "expected",
    "select",
    "settings",
    "verify",
]
