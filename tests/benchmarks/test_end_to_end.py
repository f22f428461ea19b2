"""benchmarks/models/end_to_end.py with models of a few thousand parameters."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}


@pytest.fixture
def end_to_end(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("models", "models.end_to_end"):  # tests/models may have been imported
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("models.end_to_end")
    clip = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 2}  # fmt: skip
    qwen = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2,
            "fullatt_block_indexes": [1], "out_hidden_size": 128}  # fmt: skip
    monkeypatch.setattr(module, "_SMALL_TEXT", TEXT)
    monkeypatch.setattr(module, "_SMALL_CLIP", clip)
    monkeypatch.setattr(module, "_SMALL_QWEN", qwen)
    return module


def test_no_batch_is_small_enough(
    end_to_end: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "end_to_end_cpu.json"
    arguments = ["--small", "--models", "llava-1.5-7b", "--batch", "1", "--most-tokens", "10"]
    with pytest.raises(SystemExit) as ended:
        end_to_end.main([*arguments, "-o", str(output)])
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "argument --most-tokens: no batch has so few visual tokens, got 10" in line
    assert not output.exists()


def test_rows_and_table(end_to_end: Any, tmp_path: Path) -> None:
    output = tmp_path / "end_to_end_cpu.json"
    models = ["llava-1.5-7b", "qwen2.5-vl-7b"]
    arguments = ["--small", "--models", *models, "--k", "64", "8", "--baseline-k", "8"]
    arguments += ["--batch", "1", "2", "--runs", "1", "--new-tokens", "2", "--text-tokens", "9"]
    assert end_to_end.main([*arguments, "--image-size", "280x280", "-o", str(output)]) == 0
    data = json.loads(output.read_text())
    assert data["setup"]["k"] == [64, 8]
    ways = {(row["model"], row["batch"]): [] for row in data["rows"]}
    for row in data["rows"]:
        ways[row["model"], row["batch"]].append(row["way"])
        assert row["visual_tokens"] == (576 if "llava" in row["model"] else 100)
        assert all(value >= 0 for value in row["milliseconds"].values())
        phases = dict(row["milliseconds"])
        assert ("first_token_ms" in row) == ("prefill" in phases) == ("plain" not in row["way"])
        if "free" in row["way"]:  # the same phases as the unpruned model
            assert phases.keys() == {"vision", "prefill", "decode"}
        if "first_token_ms" in row:
            phases.pop("decode")
            assert row["first_token_ms"] == pytest.approx(sum(phases.values()), abs=0.01)
    common = ["unpruned", "k=64", "k=8", "free k=8"]
    assert ways == {
        (model, batch): common + (["plain k=8"] if "llava" in model else [])
        for model in models
        for batch in (1, 2)
    }
    by_way = {(row["model"], row["batch"], row["way"]): row for row in data["rows"]}
    for model in models:
        for batch in (1, 2):
            flops = [by_way[model, batch, way]["flops"] for way in common[:3]]
            assert flops[0] > flops[1] > flops[2] > 0

    tables = importlib.import_module("tables")
    table = tables.end_to_end_cpu(lambda name: data)
    assert table.count("\n| ") == 1 + 4 * 3  # a head, and three ways of each model and batch
    assert "| llava-1.5-7b, batch 2 | k = 8 |" in table
    assert "Random weights at a small size" in table
