"""The embedded model's accuracy with pruned `generate` is within the recorded band."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("yaml")

from accuracy import evaluation, regression

from vispruner.embedded.scenes import Scene


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return regression.draw_scenes()


@pytest.mark.parametrize("k", regression.BUDGETS)
def test_accuracy_is_as_recorded(k: int, model: Any, processor: Any, drawn: list[Scene]) -> None:
    recorded = json.loads(regression.RECORD.read_text())
    right = sum(evaluation.generated(model, processor, drawn, k))
    expected = recorded["right"][str(k)]
    assert abs(right - expected) <= recorded["band"], f"{right} of {len(drawn)}, not {expected}"
