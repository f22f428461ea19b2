"""Results that were computed once and are part of the package (known_answers.json).

They need no reference at run time. So they detect a torch whose reference is wrong on a machine,
for example by an inexact matrix product, and they cover cases for which the reference would take
many seconds. `generate()` made the file:

    python -c 'from vispruner_cuda.verification import known_answers; known_answers.write()'
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cases import Arguments, Case
from .expected import Exact, Expected, Near, expected

PATH = Path(__file__).parents[1] / "known_answers.json"

CASES = (
    # An odd number of residual tokens.
    Case("dedup", (183,), 20, None, 20, step=16, features="clustered"),
    Case("prune", (196,), 64, 2, 26, dtype="float16", attention="ties"),
    Case("prune", (256,), 32, None, 146, dtype="bfloat16", features="smooth"),
    Case("topk", (40, 40), 1, 3, 9, attention_dtype="float16", attention="ties"),
    Case("topk", (30,), 1, 2, 30, attention="non_finite"),
    Case("pairwise_cosine", (5,), 11, features="normal"),
    Case("pairwise_cosine", (4,), 64, features="outliers", dtype="float16"),
    Case("dedup", (90,), 12, None, 12, features="few_values", dtype="bfloat16"),
    Case("dedup", (60,), 8192, None, 9, step=3, features="clustered"),
    Case("prune", (120,), 33, 5, 20, features="few_values", attention="ties"),
    Case("prune_varlen", (50, 0, 1, 70), 24, 2, (9, 3, 1, 11), features="smooth"),
    Case("cls_attention", (12,), 16, 3),
    Case("cls_attention", (9,), 40, 2, dtype="bfloat16", sharp=3),
    Case("received_attention", (7, 0, 5), 24, 2, dtype="float16"),
    Case("received_attention", (70,), 40, 2, dtype="float32"),
    Case("prune", (600,), 48, 4, 40, features="normal", dtype="float16"),
    Case("prune", (1100,), 16, None, 40, 0.5, 64, features="clustered"),
    Case("prune", (150,), 20, 2, 15, method="topk", attention="ties"),
    Case("prune", (150, 150), 4, 2, 15, method="random", parameter=5),
    Case("prune", (150,), 20, None, 30, method="maxmin", features="duplicates"),
    Case("prune", (150,), 20, 2, 30, method="scope", features="smooth"),
    Case("prune", (90,), 33, 2, 30, method="scope", parameter=1.75, dtype="bfloat16"),
    Case("prune", (150,), 20, 2, 30, method="mmr", features="clustered", dtype="float16"),
    Case("prune_varlen", (50, 0, 1, 70), 24, 2, (9, 3, 1, 11), method="mmr", parameter=0.3),
    # Several waves of images: their workspaces exceed 512 MiB.
    Case("dedup", (4200,) * 9, 8, None, 8, step=1000, features="clustered", dtype="float16"),
    # Shared memory of the loop near the maximum per block of compute capability 9.0.
    Case("dedup", (14109,), 4, None, 24, step=4096, features="clustered"),
    # The longest rows of the neighbour lists.
    Case("prune", (16400,), 4, None, 24, 0.0, 4096, features="normal", dtype="float16"),
)
# Scores are those of float64. The relative error of float32 arithmetic is about 2**-21.
_SCORE_ERROR = 2**-18


@dataclass(frozen=True)
class KnownAnswer:
    """A case and its expected result.

    Attributes:
        stored: `indices` as integers; `bits` of float32 cosines; or `scores`.
    """

    case: Case
    stored: dict[str, Any]

    def expected(self, arguments: Arguments) -> Expected:
        """The expected result. The retained features follow from the indices."""
        if "scores" in self.stored:
            scores = torch.tensor(self.stored["scores"], dtype=torch.float64)
            return Near(scores, _SCORE_ERROR * scores.norm().item())
        if "bits" in self.stored:
            bits = torch.tensor(self.stored["bits"], dtype=torch.int32)
            return Exact({"cosines": bits.view(torch.float32)})
        indices = torch.tensor(self.stored["indices"], dtype=torch.int64)
        outputs: dict[str, Any] = {"indices": indices}
        if self.case.operator == "prune":
            rows = indices.unsqueeze(-1).expand(-1, -1, self.case.channels)
            outputs["feats"] = arguments[0][0].gather(1, rows)
        elif self.case.operator == "prune_varlen":
            outputs["feats"] = arguments[0][0][indices]
            outputs["cu_seqlens"] = tuple(self.stored["cu_seqlens"])
        return Exact(outputs)


def load() -> list[KnownAnswer]:
    """The known answers of the package."""
    stored = json.loads(PATH.read_text())["answers"]
    return [KnownAnswer(Case.from_data(entry.pop("case")), entry) for entry in stored]


def generate(of: tuple[Case, ...] = CASES) -> Iterator[dict[str, Any]]:
    """Entries of known_answers.json, from the reference."""
    for case in of:
        want = expected(case, case.arguments())
        entry: dict[str, Any] = {"case": case.data()}
        if isinstance(want, Near):
            entry["scores"] = _nine_digits(want.scores.tolist())
        elif case.operator == "pairwise_cosine":
            entry["bits"] = want.outputs["cosines"].view(torch.int32).tolist()
        else:
            entry["indices"] = want.outputs["indices"].tolist()
            if case.operator == "prune_varlen":
                entry["cu_seqlens"] = list(want.outputs["cu_seqlens"])
        yield entry


def _nine_digits(scores: Any) -> Any:
    """Nested lists of floats, shortened to the precision of a float32."""
    if isinstance(scores, list):
        return [_nine_digits(part) for part in scores]
    return float(f"{scores:.9g}")


def write() -> None:
    """Writes known_answers.json, one line per case."""
    lines = ",\n".join(json.dumps(entry) for entry in generate())
    PATH.write_text(f'{{"answers": [\n{lines}\n]}}\n')
