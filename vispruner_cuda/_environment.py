"""Names of the environment variables. The build loads this file without the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

PREFIX = "VISPRUNER_"
BUILD = ("CUDA", "CUDA_ARCHS", "NVCC", "PTXAS_REPORT", "TORCH_DIR")
RUN = (
    "RANK_PLAN",
    "GRAM_PLAN",
    "NEIGHBOURS_PLAN",
    "DEDUP_PLAN",
    "SORT_PLAN",
    "CLS_ATTENTION_PLAN",
    "RECEIVED_ATTENTION_PLAN",
    "LAUNCH",
    "CPU_ISA",
)


def misspelt(environment: Iterable[str], known: tuple[str, ...]) -> str | None:
    """An error message if a variable has nearly one of the known names, or one without its _PLAN.

    Other unknown names are left alone: they may be of another program. Kubernetes sets
    VISPRUNER_PORT, VISPRUNER_SERVICE_HOST and so on for a service of that name.
    """

    def plain(name: str) -> str:
        return name.removesuffix("_PLAN").replace("_", "")

    for variable in sorted(environment):
        name = variable.removeprefix(PREFIX)
        if name == variable or name in BUILD + RUN:
            continue
        same = [own for own in known if plain(own) == plain(name)]
        if near := same or difflib.get_close_matches(name, known, cutoff=0.8):
            names = ", ".join(PREFIX + name for name in near)
            return f"there is no variable {variable}, but {names}: correct it or unset it"
    return None
