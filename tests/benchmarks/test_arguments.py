"""Arguments out of range are refused in one line, before anything is measured or written."""

from __future__ import annotations

import importlib
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

for needed in ("rich", "transformers"):
    pytest.importorskip(needed)

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COUNT = "must be from 1 to 2147483647, got "
DURATION = "must be above 0 and at most 86400, got "


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the benchmarks, by name; its result must not be written."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", [*sys.path])  # models/__init__.py extends it

    def load(name: str) -> Any:
        for module in ("models", name):  # tests/models may have been imported
            if name.startswith("models."):
                monkeypatch.delitem(sys.modules, module, raising=False)
        return importlib.import_module(name)

    provenance = importlib.import_module("provenance")
    monkeypatch.setattr(provenance, "write", lambda *_: pytest.fail("a file was written"))
    return load


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("operators.host", "--rounds 0", f"--rounds: {COUNT}0"),
        ("operators.host", "--repeats 0", f"--repeats: {COUNT}0"),
        ("operators.host", "--repeats 1.5", "--repeats: invalid whole number value: '1.5'"),
        ("operators.cpu", "--threads 0", "--threads: must be from 1 to 4096, got 0"),
        ("operators.loop_counts", "--images 0", f"--images: {COUNT}0"),
        ("operators.rounding_sensitivity", "--images 0", f"--images: {COUNT}0"),
        ("operators.gpu", "--device cpu --seconds -1", f"--seconds: {DURATION}-1"),
        ("operators.gpu", "--device cpu --seconds nan", f"--seconds: {DURATION}nan"),
        ("operators.gpu", "--device cpu --compile-limit 0", f"--compile-limit: {DURATION}0"),
        ("operators.gpu", f"--device cpu -o {__file__}", "-o: must be a directory, got the file "),
        ("models.end_to_end", "--runs 0", f"--runs: {COUNT}0"),
        ("models.end_to_end", "--k 64 0", f"--k: {COUNT}0"),
        ("models.end_to_end", "--batch 0", f"--batch: {COUNT}0"),
        ("models.end_to_end", "--image-size 0x9", f"--image-size: {COUNT}0"),
        ("models.end_to_end", "--image-size 9", "--image-size: invalid WxH value: '9'"),
        ("models.end_to_end", "--device banana", "--device: cannot use 'banana': "),
        ("models.end_to_end", "-o results/mine.txt", "must end in .json, got results/mine.txt"),
        ("models.end_to_end", "-o results/end_to_end_cpu.mine", "must end in .json, got "),
        ("models.end_to_end", "-o /nowhere/x.json", "/nowhere/x.json is a directory, or in none"),
    ],
)
def test_refused(
    module: str, arguments: str, said: str, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        script(module).main(arguments.split())
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "error: argument " in line
    assert said in line


@pytest.mark.parametrize("module", ["models.serving", "models.load"])
def test_servers_without_the_engine(
    module: str,
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--help needs no engine; a run without it is refused in one line."""
    monkeypatch.setitem(sys.modules, "openai", None)

    def ends(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(SystemExit) as ended:
            script(module).main()
        return int(ended.value.code or 0)

    assert ends("--help") == 0
    assert "--requests" in capsys.readouterr().out
    assert ends() == 2
    assert "error: openai is not installed: " in capsys.readouterr().err.splitlines()[-1]
    for arguments in ("--k 0", "--concurrency -1", "--output-tokens 0", "--requests 0"):
        assert ends(*arguments.split()) == 2
        assert f"argument {arguments.split()[0]}: must be from " in capsys.readouterr().err


def test_the_shortest_mix_and_a_single_time(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one request no answer is complete; of one answer there is a 90 % quantile."""
    monkeypatch.setattr(sys, "argv", ["load", "--requests", "1"])
    with pytest.raises(SystemExit):
        script("models.load").main()
    assert "argument --requests: must be from 3 to " in capsys.readouterr().err
    percentile = script("models.serving").percentile_90
    assert percentile([0.5]) == 0.5
    times = [float(n) for n in range(11)]
    assert percentile(times) == statistics.quantiles(times, n=100)[89]
