"""A change of one place of the sources, which is found by its tokens, however it is formatted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

#: The results differ from the reference, or an operator raises; no checker need see why.
RESULTS = "results"

_TOKEN = re.compile(r"\w+|\S")
_BETWEEN = r"(?:\s|//[^\n]*\n)*"


@dataclass(frozen=True)
class Mutation:
    """One fault to put into a copy of csrc.

    Attributes:
        name: what is wrong then.
        file: below csrc.
        old: code that stands in exactly one place, whatever white space and comments lie between
            its tokens.
        new: what takes its place.
        noticed_by: the checker that must report it ("racecheck", ...), or RESULTS. Where the
            results stay equal, only the checker can notice.
    """

    name: str
    file: str
    old: str
    new: str
    noticed_by: str

    def apply(self, csrc: Path) -> Path:
        """Changes the file in this copy of csrc and returns its path.

        Raises:
            ValueError: `old` is not in exactly one place.
        """
        path = csrc / self.file
        text = path.read_text()
        tokens = [re.escape(token) for token in _TOKEN.findall(self.old)]
        places = list(re.finditer(_BETWEEN.join(tokens), text))
        if len(places) != 1:
            raise ValueError(f"{self.name}: {len(places)} places in {self.file} are {self.old!r}")
        begin, end = places[0].span()
        path.write_text(text[:begin] + self.new + text[end:])
        return path
