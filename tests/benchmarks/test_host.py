"""The benchmark of calls with almost no work."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_every_call_runs_and_topk_is_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    host = importlib.import_module("operators.host")
    calls = {name: call() for name, call in host.calls().items()}
    assert calls["vispruner_cuda.prune"].indices.equal(calls["torch.ops.vispruner.prune"][1])
    rows = {row["call"]: row for row in host.measure(rounds=2, repeats=3)}
    assert rows.keys() == calls.keys()
    assert rows[host.BASELINE]["ratio"] == 1
    for row in rows.values():
        assert row["ratio"] == pytest.approx(
            row["us"] / rows[host.BASELINE]["us"], rel=0.02, abs=0.02
        )
