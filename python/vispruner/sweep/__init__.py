"""Measures how many tokens can be dropped on the user's pictures: `vispruner sweep`.

`data` reads pictures and questions, `measuring` asks the unpruned model once and then each setting,
`server` does so on a server, `records` stores every measurement at once so that an interrupted
sweep resumes, `scoring` scores the stored answers, `summary` compares the settings, and `report`
writes the table, the page and the plots.
"""

from .client import ServerError
from .data import DataError, Item, read
from .measuring import Failed, Measurement, Subject, Swept
from .records import Records
from .scoring import ScorerError, load_scorer
from .server import Served
from .summary import Summary, recommended, summarize

__all__ = [
    "DataError",
    "Failed",
    "Item",
    "Measurement",
    "Records",
    "ScorerError",
    "Served",
    "ServerError",
    "Subject",
    "Summary",
    "Swept",
    "load_scorer",
    "read",
    "recommended",
    "summarize",
]
