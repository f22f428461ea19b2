"""A change of one place of the sources, which is found by its tokens, independent of formatting."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

#: The results differ from the reference, or an operator raises; no checker has to report the cause.
RESULTS = "results"

_TOKEN = re.compile(r"\w+|\S")
_BETWEEN = r"(?:\s|//[^\n]*\n)*"


@dataclass(frozen=True)
class Mutation:
    """One fault to put into a copy of csrc.

    Attributes:
        name: description of the fault.
        file: below csrc.
        old: code that occurs exactly once, with any white space and comments between its tokens.
        new: its replacement.
        noticed_by: the checker that must report it ("racecheck", ...), or RESULTS. If the results
            stay equal, only the checker can detect it.
        kernels: of a header: names of the sources that are compiled with the change, as many as it
            takes to detect it. The others are compiled without it.
    """

    name: str
    file: str
    old: str
    new: str
    noticed_by: str
    kernels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.file.endswith(".cu") == bool(self.kernels):
            raise ValueError(f"{self.name}: kernels is for headers")

    @property
    def compiled(self) -> tuple[str, ...]:
        """Names of the sources that are compiled with the change."""
        return self.kernels or (Path(self.file).stem,)

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
