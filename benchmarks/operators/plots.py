"""Draws the scaling curves of results/kernels.json, each as docs/performance_NAME.svg.

Time of the operators against tokens, images and so on, with the floor and the baselines measured in
the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import provenance

matplotlib.use("svg")
import matplotlib.pyplot as plt

NUMERIC = ("tokens", "images", "k", "channels")


def draw(name: str, rows: Sequence[dict[str, Any]], where: str, path: Path) -> None:
    """One curve with its baselines and floor, both axes logarithmic."""
    plt.rcParams["svg.hashsalt"] = "vispruner"  # the same file from the same data
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    x = [row[name] for row in rows]
    axes.plot(x, [row["us"] for row in rows], "o-", label="vispruner_cuda", linewidth=2)
    baselines = sorted({baseline for row in rows for baseline in row.get("baselines_us", {})})
    for baseline in baselines:
        measured = [row for row in rows if "baselines_us" in row]
        points = [(row[name], row["baselines_us"].get(baseline)) for row in measured]
        known = [(a, b) for a, b in points if b]
        axes.plot(*zip(*known, strict=True), ".--", label=baseline)
    axes.plot(x, [max(row["floor_us"].values()) for row in rows], "k:", label="floor")
    axes.set(xscale="log", yscale="log", xlabel=name, ylabel="microseconds per call", title=where)
    axes.set_xticks(x, [str(value) for value in x])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m operators.plots", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--results", type=Path, default=provenance.RESULTS / "kernels.json")
    parser.add_argument(
        "-o", "--output", type=Path, default=provenance.ROOT / "docs", help="directory"
    )
    arguments = parser.parse_args(argv)
    if not arguments.results.exists():
        parser.error(f"{arguments.results} does not exist: run operators.gpu on a GPU")
    data = json.loads(arguments.results.read_text(encoding="utf-8"))
    gpu = data["device"]["gpu"] or {"name": "CPU, dry run"}
    for name, rows in data["curves"].items():
        if name in NUMERIC:
            path = arguments.output / f"performance_{name}.svg"
            draw(name, rows, f"prune, {gpu['name']}", path)
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
