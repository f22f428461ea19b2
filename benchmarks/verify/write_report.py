"""Writes gpu_verified.json from the logs of gpu_check.sh, after each of its steps.

Uses only the standard library, to be fast and to work when the build failed. Exits with 1 unless
the run is clean.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Steps that decide whether a run is clean. Benchmarks do not.
DECISIVE = ("build", "probe", "verify", "tests", "stress")
#: Also decisive, where compute-sanitizer can run.
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
UNAVAILABLE = "unavailable"

# pytest's letters for test results.
_LETTERS = {"passed": ".", "failed": "F", "error": "E", "skipped": "s"}


def counts(log: str) -> dict[str, int]:
    """passed, failed, errors and skipped in pytest's last line; without one, those so far."""
    closing = [line for line in log.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    if closing:
        numbers = re.findall(r"(\d+) (passed|failed|error|skipped)", closing[-1])
        return dict.fromkeys(_LETTERS, 0) | {what: int(number) for number, what in numbers}
    progress = "".join(re.findall(r"^([.FEsxX]+)(?:\s+\[ *\d+%\])?$", log, re.MULTILINE))
    return {what: progress.count(letter) for what, letter in _LETTERS.items()}


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _json(path: Path) -> Any:
    """The content of a file, None if it is missing or incomplete."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def status(logs: Path, step: str) -> int | str | None:
    """The exit status of a step, "unavailable", "stopped" or "not run"; None if unfinished."""
    text = _text(logs / f"{step}.status").strip()
    return int(text) if text.isdigit() else text or None


def sanitizer(logs: Path, tool: str) -> dict[str, Any]:
    """Status of a tool of compute-sanitizer, and its summary or the reason for having none."""
    log = _text(logs / f"{tool}.log")
    found = {"status": status(logs, tool), "summary": ""}
    if found["status"] == UNAVAILABLE:
        return {**found, "summary": log.strip()}
    return {**found, "summary": (re.findall(r"(?:ERROR|RACECHECK) SUMMARY.*", log) or [""])[-1]}


def verified(path: Path) -> dict[str, Any] | None:
    """Totals of vispruner_verify.json."""
    data = _json(path)
    if data is None:
        return None
    of = [c for r in data["results"] for c in (*r["operators"].values(), r["known_answers"])]
    return {
        "complete": data["complete"],
        "equal": data.get("equal", False),
        "backends": [result["backend"] for result in data["results"]],
        **{key: sum(c[key] for c in of) for key in ("cases", "wrong_cases", "runs", "skipped")},
    }


def report(logs: Path, out: Path) -> dict[str, Any]:
    """The content of gpu_verified.json, for the run so far."""
    described = _json(logs / "provenance.json") or {"device": {}, "versions": {}}
    gpu = described["device"].get("gpu") or {}
    stress = [line for line in _text(logs / "stress.log").splitlines() if line.startswith("{")]
    tools = {tool: sanitizer(logs, tool) for tool in TOOLS}
    steps = {step: status(logs, step) for step in (*DECISIVE, "benchmarks")}
    return {
        "csrc_tree": described.get("csrc_tree"),
        "device": gpu.get("name"),
        "driver": gpu.get("driver"),
        "torch": described["versions"].get("torch"),
        "date": described.get("date"),
        "steps": {
            step: {"status": value, "seconds": _json(logs / f"{step}.seconds")}
            for step, value in steps.items()
        },
        "tests": counts(_text(logs / "tests.log")),
        "verify": verified(out / "vispruner_verify.json"),
        "stress": json.loads(stress[-1]) if stress else None,
        "sanitizers": tools,
        "clean": all(steps[step] == 0 for step in DECISIVE)
        and all(tool["status"] in (0, UNAVAILABLE) for tool in tools.values()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="write gpu_dry_run.json instead")
    parser.add_argument("--quiet", action="store_true", help="print nothing, exit with 0")
    arguments = parser.parse_args(argv)
    result = report(arguments.logs, arguments.out)
    path = arguments.out / ("gpu_dry_run.json" if arguments.dry_run else "gpu_verified.json")
    written = path.with_suffix(".json.new")
    written.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(written, path)  # so that an interrupted run leaves no partial file
    if arguments.quiet:
        return 0
    print(path)
    print(json.dumps(result["tests"]), "clean" if result["clean"] else "NOT CLEAN")
    return 0 if result["clean"] else 1


if __name__ == "__main__":
    sys.exit(main())
