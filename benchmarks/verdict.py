"""Writes gpu_verified.json from the logs of gpu_check.sh; exits with 1 unless all is clean."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import environment

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def counts(log: str) -> dict[str, int]:
    """passed, failed, errors and skipped of pytest's closing line."""
    closing = [line for line in log.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    found = {"passed": 0, "failed": 0, "error": 0, "skipped": 0}
    if closing:
        for number, what in re.findall(r"(\d+) (passed|failed|error|skipped)", closing[-1]):
            found[what] = int(number)
    return found


def verdict(logs: Path) -> dict[str, Any]:
    """What gpu_verified.json says of a run."""

    def status(step: str) -> int | None:
        file = logs / f"{step}.status"
        return int(file.read_text()) if file.exists() else None

    def log(step: str) -> str:
        file = logs / f"{step}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    described = environment.describe()
    gpu = described["device"]["gpu"] or {}
    stress = [line for line in log("stress").splitlines() if line.startswith("{")]
    steps = ("build", "tests", "stress", "benchmarks", *TOOLS)
    return {
        "csrc_tree": described["csrc_tree"],
        "device": gpu.get("name"),
        "driver": gpu.get("driver"),
        "torch": described["versions"]["torch"],
        "date": described["date"],
        "tests": counts(log("tests")),
        "stress": json.loads(stress[-1]) if stress else None,
        "sanitizers": {
            tool: {
                "status": status(tool),
                "summary": (re.findall(r"ERROR SUMMARY.*|RACECHECK SUMMARY.*", log(tool)) or [""])[
                    -1
                ],
            }
            for tool in TOOLS
        },
        "clean": all(status(step) == 0 for step in steps),
    }


def main() -> int:
    logs, out = (Path(argument) for argument in sys.argv[1:3])
    result = verdict(logs)
    path = out / "gpu_verified.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    print(json.dumps(result["tests"]), "clean" if result["clean"] else "NOT CLEAN")
    return 0 if result["clean"] else 1


if __name__ == "__main__":
    sys.exit(main())
