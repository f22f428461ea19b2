"""`python -m vispruner_cuda --verify`: verifies the devices of this machine and writes a report."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from . import known_answers
from .cases import OPERATORS, cases, select
from .checking import Backend, Counts, Result, verify
from .comparison import Difference
from .expected import Expectations
from .machine import backends, reference_backend, wrong_instruction_set

# Of a case (`Case.cost`): a cheap case on a GPU can take long on a CPU.
_MOST_COST_OF_CPU = 8000.0
_MOST_COST_OF_REFERENCE = 500.0
_COLUMNS = 6  # devices per table
_SECONDS_BETWEEN_SAVES = 5.0


class Progress:
    """Shows the progress of a backend on a terminal; elsewhere only the last line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._name = ""
        self._shown = 0.0

    def begin(self, name: str) -> None:
        """Starts the line of a backend."""
        self._name = name
        self._shown = 0.0

    def update(self, done: int, total: int) -> None:
        """Shows the progress, at most ten times per second."""
        now = time.perf_counter()
        if self._live and now - self._shown > 0.1:
            self._shown = now
            self._stream.write(f"\r\033[K{self._name}: {done} of {total} cases")
            self._stream.flush()

    def end(self, result: Result) -> None:
        """Replaces the line by the result."""
        counted = [*result["operators"].values(), result["known_answers"]]
        cases_, runs = (sum(c[key] for c in counted) for key in ("cases", "runs"))
        state = "equal" if result["equal"] else "DIFFERS"
        clear = "\r\033[K" if self._live else ""
        self._stream.write(
            f"{clear}{result['backend']}: {cases_} cases, {runs} calls, {state}, "
            f"{result['seconds']:.1f} s\n"
        )
        self._stream.flush()


def unwritable(path: Path) -> str | None:
    """Why a file cannot be written there, or None. Creates no file."""
    existed = path.exists()
    try:
        with path.open("a"):
            pass
    except OSError as error:
        return error.strerror or str(error)
    if not existed:
        path.unlink()
    return None


def driver_version() -> str | None:
    """The version of the NVIDIA driver, if nvidia-smi gives it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def describe(report: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON file's content except for results: `report()`, date, platform and drivers."""
    driver = driver_version() if report["devices"] else None
    return {
        "format": 1,
        **report,
        "devices": [{**device, "driver": driver} for device in report["devices"]],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "platform": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
        },
    }


def _save(path: Path, data: Mapping[str, Any]) -> None:
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    if path.is_symlink() or (path.exists() and not path.is_file()):  # /dev/stdout
        path.write_text(text)
        return
    written = path.with_name(f"{path.name}.new")
    try:
        written.write_text(text)
        os.replace(written, path)  # so that an interrupted run leaves no partial file
    except OSError:  # only the file itself may be written
        path.write_text(text)


def run(
    report: Mapping[str, Any],
    devices: Sequence[str],
    quick: bool,
    output: Path,
    as_json: bool = False,
) -> int:
    """Verifies the devices, prints a table and the first differences, and writes the file.

    Args:
        report: of `python -m vispruner_cuda`.
        devices: names from `device_names(report)`.
        quick: a subset of the cases.
        output: the JSON file, which is rewritten after each backend and every few seconds.
        as_json: print its content instead of the table.

    Returns:
        The exit status: 1 if anything differs.
    """
    began = time.perf_counter()
    progress = Progress(sys.stderr)
    expectations = Expectations()
    data: dict[str, Any] = {**describe(report), "quick": quick, "complete": False}
    results: list[Result] = []
    data["results"] = results
    saved = began

    def save(*unfinished: Result) -> None:
        nonlocal saved
        saved = time.perf_counter()
        data["reference_seconds"] = expectations.seconds
        data["seconds"] = saved - began
        _save(output, {**data, "results": [*results, *unfinished]})

    def update(done: int, total: int, unfinished: Result) -> None:
        progress.update(done, total)
        if time.perf_counter() - saved > _SECONDS_BETWEEN_SAVES:
            save(unfinished)

    for backend in [reference_backend(), *backends(devices, report)]:
        progress.begin(backend.name)
        results.append(_verify(backend, quick, expectations, update))
        progress.end(results[-1])
        save()
    equal = all(result["equal"] for result in results)
    data.update(complete=True, equal=equal)
    _save(output, data)
    if as_json:
        print(json.dumps(data, indent=1))
    else:
        print(f"{_header(data)}\n\n{_table(results)}")
        for result in results:
            print(_differences(result), end="")
        print(f"\nReport: {output}")
        if not equal:
            print("Please open an issue and attach this file.")
    return 0 if equal else 1


def _verify(
    backend: Backend,
    quick: bool,
    expectations: Expectations,
    progress: Callable[[int, int, Result], None],
) -> Result:
    most = float("inf")
    if backend.name.startswith("cpu"):
        most = _MOST_COST_OF_CPU
    elif backend.name == "reference":
        most = _MOST_COST_OF_REFERENCE
    known = [a for a in known_answers.load() if a.case.cost <= (min(most, 100) if quick else most)]
    chosen = [] if backend.name == "reference" else select(cases(), most, quick)
    result = verify(
        backend,
        chosen,
        known,
        plans="each" if quick else "combined",
        expectations=expectations,
        progress=progress,
    )
    if problem := wrong_instruction_set(backend):
        result["problems"].append(problem)
        result["equal"] = False
    return result


# ------------------------------------------------------------------------------------------- text
def _header(data: Mapping[str, Any]) -> str:
    lines = [f"vispruner_cuda {data['version']}, torch {data['torch']}"]
    lines += [
        f"cuda:{device['index']}: {device['name']}, compute capability {device['capability']}, "
        f"driver {device['driver'] or 'unknown'}"
        for device in data["devices"]
    ]
    return "\n".join(lines)


def _cell(counts: Counts | None) -> str:
    if counts is None or not counts["cases"]:
        return "-"
    if counts["wrong_cases"]:
        return f"{counts['wrong_cases']} of {counts['cases']} DIFFER"
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    return f"{counts['cases']} equal{skipped}"


def _table(results: Sequence[Result]) -> str:
    """Operators by devices."""
    parts = []
    for first in range(0, len(results), _COLUMNS):
        shown = results[first : first + _COLUMNS]
        lines = [["", *(result["backend"] for result in shown)]]
        lines.append(["known answers", *(_cell(r["known_answers"]) for r in shown)])
        lines += [[name, *(_cell(r["operators"].get(name)) for r in shown)] for name in OPERATORS]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        for line in lines:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            parts.append("  ".join(cells).rstrip())
        parts.append("")
    return "\n".join(parts[:-1])


def _differences(result: Result) -> str:
    """Problems and the first difference of a backend."""
    lines = [f"\n{result['backend']}: {problem}" for problem in result["problems"]]
    counted = [result["known_answers"], *result["operators"].values()]
    for difference in (d for counts in counted for d in counts["differences"]):
        lines.append(f"\n{result['backend']} differs first in\n{_difference(difference)}")
        break
    return "".join(f"{line}\n" for line in lines)


def _difference(found: Difference) -> str:
    plans = ", ".join(f"{stage}={name}" for stage, name in found["plans"].items()) or "auto"
    lines = [f"  {found['text']}", f"  plans: {plans}"]
    if "error" in found:
        return "\n".join([*lines, f"  {found['error']}"])
    where = f"{found['output']}{found.get('position', '')}"
    lines.append(f"  {where}: got {found['got']}, want {found['want']}")
    if "wrong_elements" in found:
        lines.append(f"  elements that differ: {found['wrong_elements']}")
    if "error_norm" in found:
        lines.append(
            f"  norm of the errors: {found['error_norm']:.3g}, allowed: {found['allowed_norm']:.3g}"
        )
    return "\n".join(lines)
