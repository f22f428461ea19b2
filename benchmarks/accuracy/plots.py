"""The accuracy plots of the documentation, as SVG, from the results files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from .analyses import RATIOS, STEPS
from .recipe import Recipe
from .results import Results
from .tables import SHOWN, everything

_STYLES = {
    "vispruner": ("#d95f02", "o-"),
    "important": ("#e6ab02", "^-"),
    "diverse": ("#1f78b4", "s-"),
    "random": ("#888888", "x:"),
    "grid": ("#555555", "+:"),
    "fastv/2": ("#7570b3", "d--"),
    "fastv/1": ("#e7298a", "v--"),
    "oracle": ("#000000", "-"),
}


@contextmanager
def _figure(path: Path, columns: int, width: float = 4.6) -> Iterator[list[Any]]:
    """Axes side by side; equal data give equal files."""
    plt.rcParams["svg.hashsalt"] = "vispruner"
    figure, axes = plt.subplots(
        1, columns, figsize=(width * columns, 3.8), layout="constrained", squeeze=False
    )
    yield list(axes[0])
    for one in axes[0]:
        one.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _budget_axis(axes: Any, budgets: Sequence[int]) -> None:
    axes.set(xscale="log", xlabel="retained visual tokens")
    axes.set_xticks(budgets, [str(k) for k in budgets])
    axes.minorticks_off()


def rules(recipe: Recipe, results: Results, path: Path) -> None:
    """Accuracy by k, before and after the subset stage."""
    titles = {"language": "before the subset stage", "subset": "after it (the embedded model)"}
    with _figure(path, len(titles), 5.2) as all_axes:
        for axes, (stage, title) in zip(all_axes, titles.items(), strict=True):
            full = 100 * results.mean(stage, "full", everything).value
            axes.axhline(full, color="#000000", linewidth=0.8, linestyle=":")
            for rule, (color, style) in _STYLES.items():
                means = [results.mean(stage, f"{rule}@{k}", everything) for k in recipe.budgets]
                axes.errorbar(
                    recipe.budgets,
                    [100 * mean.value for mean in means],
                    [100 * mean.error for mean in means],
                    color=color,
                    fmt=style,
                    label=SHOWN[rule],
                    markersize=4,
                    linewidth=1.2,
                )
            _budget_axis(axes, recipe.budgets)
            axes.set(title=title, ylabel="correct answers (%)", ylim=(20, 100))
        all_axes[-1].legend(fontsize=7)


def training(results: Results, path: Path) -> None:
    """Validation figures from the training logs of all seeds."""
    shown = (
        ("tower", ("objects", "f1_early")),
        ("language", ("all", "random_third")),
        ("subset", ("all", "random_third")),
    )
    with _figure(path, len(shown), 3.6) as all_axes:
        for axes, (stage, figures) in zip(all_axes, shown, strict=True):
            for color, figure in enumerate(figures):
                for number, run in enumerate(results.runs):
                    lines = [line for line in run["training"] if line["stage"] == stage]
                    axes.plot(
                        [line["step"] for line in lines],
                        [line["figures"][figure] for line in lines],
                        color=f"C{color}",
                        label=None if number else figure.replace("_", " "),
                        linewidth=1,
                    )
            axes.set(title=stage, xlabel="step", ylim=(0, 1))
            axes.legend(fontsize=8)


def shift(recipe: Recipe, analyses: Sequence[dict[str, Any]], path: Path) -> None:
    """Attention by row of the image, and the rows of the selected tokens."""
    found = [run["attention"] for run in analyses]
    rows = np.arange(1, recipe.grid + 1)
    last = recipe.language.layers
    panels = {
        "attention, unchanged model": ("rows", "decay"),
        "attention, one position for all": ("rows", "no decay"),
        f"selected, k = {found[0]['k']}": ("selected rows", "decay"),
    }

    def average(key: str) -> Any:
        return 100 * np.mean([attention[key] for attention in found], 0)

    with _figure(path, len(panels), 4.0) as all_axes:
        for axes, (title, (what, decay)) in zip(all_axes, panels.items(), strict=True):
            axes.plot(rows, average("rows/objects"), "k:", label="objects")
            for layer in range(1, last + 1):
                color = plt.get_cmap("Purples")(0.35 + 0.65 * layer / last)
                values = average(f"{what}/text {layer}, {decay}")
                axes.plot(rows, values, color=color, label=f"text, layer {layer}")
            axes.plot(rows, average(f"{what}/cls"), color="#d95f02", label="[CLS]")
            if what == "selected rows":
                axes.plot(rows, average(f"{what}/vispruner"), color="#1f78b4", label="VisPruner")
            axes.set(title=title, xlabel="row of patches from the top", ylabel="share (%)")
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=7)


def dispersion(recipe: Recipe, analyses: Sequence[dict[str, Any]], path: Path) -> None:
    """Cumulative share of the attention on the most attended tokens."""
    found = [run["attention"] for run in analyses]
    with _figure(path, 1, 5.2) as (axes,):
        for name, label, color in (
            ("cls", "[CLS], tower", "#d95f02"),
            *(
                (
                    f"text {layer}, decay",
                    f"text, layer {layer}",
                    plt.get_cmap("Purples")(0.35 + 0.65 * layer / recipe.language.layers),
                )
                for layer in range(1, recipe.language.layers + 1)
            ),
        ):
            curve = 100 * np.mean([attention[f"cumulative/{name}"] for attention in found], 0)
            share = np.linspace(0, 100, len(curve) + 1)
            axes.plot(share, [0, *curve], color=color, label=label)
        axes.plot([0, 100], [0, 100], "k:", linewidth=0.8, label="uniform")
        axes.set(xlabel="most attended tokens (%)", ylabel="share of the attention (%)")
        axes.legend(fontsize=8)


def ablations(analyses: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy by important ratio, and by step."""
    accuracy = [run["ablations"]["accuracy"] for run in analyses]
    budgets = sorted({int(key.split("@")[1]) for key in accuracy[0] if "@" in key}, reverse=True)
    with _figure(path, 2) as all_axes:
        for axes, name, settings in zip(all_axes, ("ratio", "step"), (RATIOS, STEPS), strict=True):
            for k in budgets:
                pairs = [
                    np.mean([found[f"{name} {value}@{k}"] for found in accuracy], 0)
                    for value in settings
                ]
                means, errors = 100 * np.array(pairs).T
                axes.errorbar(settings, means, errors, fmt="o-", markersize=4, label=f"k = {k}")
            axes.set(xlabel=f"important {name}" if name == "ratio" else name)
            axes.set_ylabel("correct answers (%)")
        all_axes[1].set_xscale("log", base=2)
        all_axes[1].set_xticks(STEPS, [str(step) for step in STEPS])
        all_axes[0].legend(fontsize=8)


def draw_all(
    recipe: Recipe, results: Results, analyses: Sequence[dict[str, Any]], directory: Path
) -> list[Path]:
    """Writes accuracy_*.svg; some plots need analyses."""
    paths = [directory / f"accuracy_{name}.svg" for name in ("rules", "training")]
    rules(recipe, results, paths[0])
    training(results, paths[1])
    if analyses:
        more = [directory / f"accuracy_{name}.svg" for name in ("shift", "dispersion", "ablations")]
        shift(recipe, analyses, more[0])
        dispersion(recipe, analyses, more[1])
        ablations(analyses, more[2])
        paths += more
    return paths
