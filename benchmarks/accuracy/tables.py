"""The accuracy tables of the documentation, as Markdown, from the results files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from documents import table

from vispruner.embedded.scenes import KINDS

from .analyses import RATIOS, STEPS
from .evaluation import EMBEDDED, UNSEEN, Asked
from .recipe import Recipe, load
from .results import Filter, Results, load_analyses
from .rules import RANDOM_DRAWS
from .statistics import Mean

SHOWN = {
    "vispruner": "VisPruner",
    "important": "important only",
    "diverse": "diverse only",
    "random": f"random ({RANDOM_DRAWS} draws)",
    "grid": "uniform grid",
    "fastv/2": "FastV after layer 2 (costs more)",
    "fastv/1": "FastV after layer 1 (costs more)",
    "matched": "FastV after layer 1, cost-matched",
    "oracle": "objects first (oracle)",
}
METHODS_SHOWN = {
    "vispruner": "`vispruner`",
    "diverse": "`vispruner`, ratio 0",
    "topk": "`topk`",
    "random": f"`random` ({RANDOM_DRAWS} seeds)",
    "maxmin": "`maxmin`",
    "scope": "`scope`",
    "scope, alpha 0.5": "`scope`, alpha 0.5",
    "scope, alpha 2": "`scope`, alpha 2",
    "mmr": "`mmr`",
    "mmr, lambda 0.25": "`mmr`, lambda 0.25",
    "mmr, lambda 4": "`mmr`, lambda 4",
}
METHODS_SLICED = ("full", "vispruner", "topk", "random", "maxmin", "scope", "mmr")
METHODS_SLICE_BUDGET = 3  # index into the recipe's budgets
SLICED = ("full", "vispruner", "important", "diverse", "random", "fastv/2", "oracle")
SLICE_BUDGETS = (2, 3)  # indices into the recipe's budgets
DECAYS = ("decay", "no decay")
COMPARED = ("important", "diverse", "fastv/2")  # by seed


def everything(asked: Asked) -> bool:
    """All questions except those about images with unseen backgrounds."""
    return asked.background != UNSEEN


def _machine(run: dict[str, Any]) -> str:
    """Where and when a results file was measured: the seeds' may differ."""
    return f"{run['device']['processor']}, torch {run['versions']['torch']}, {run['date']}."


def _on(background: str) -> Filter:
    return lambda asked: asked.background == background


def _with_objects(low: int, high: int) -> Filter:
    return lambda asked: everything(asked) and low <= asked.objects <= high


def _with_distractors(some: bool) -> Filter:
    return lambda asked: everything(asked) and (asked.distractors > 0) == some


def _about_size(low: int, high: int) -> Filter:
    return lambda asked: everything(asked) and asked.size is not None and low <= asked.size <= high


def _of_kind(kind: str) -> Filter:
    return lambda asked: everything(asked) and asked.kind == kind


def _slices(backgrounds: Sequence[str]) -> dict[str, Filter]:
    """Names to filters."""
    return {
        "all": everything,
        **{f"background: {name}": _on(name) for name in backgrounds},
        f"background: {UNSEEN} (not trained on)": _on(UNSEEN),
        "objects: 1 or 2": _with_objects(1, 2),
        "objects: 3 or 4": _with_objects(3, 4),
        "objects: 5 or 6": _with_objects(5, 6),
        "distractors: none": _with_distractors(False),
        "distractors: some": _with_distractors(True),
        "asked object: up to 13 pixels": _about_size(0, 13),
        "asked object: 14 to 20 pixels": _about_size(14, 20),
        "asked object: 21 to 32 pixels": _about_size(21, 32),
        **{f"question: {kind}": _of_kind(kind) for kind in KINDS},
    }


def _points(mean: Mean) -> str:
    return f"{100 * mean.value:+.1f} ± {100 * mean.error:.1f}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"


def _asked(results: Results) -> int:
    return sum(everything(asked) for asked in results.asked)


def makers(name: str) -> dict[str, Callable[[], str]]:
    """Every table of a recipe's results: NAME to the text of `<!-- table:accuracy-NAME -->`."""
    return Tables(load(name), Results.load(name), load_analyses(name)).makers


class Tables:
    """The makers of all tables, by name."""

    def __init__(
        self, recipe: Recipe, results: Results, analyses: Sequence[dict[str, Any]]
    ) -> None:
        self._recipe, self._results, self._analyses = recipe, results, analyses
        self.makers: dict[str, Callable[[], str]] = {
            "summary": self._summary,
            "rules": lambda: self._rules("subset"),
            "rules-before": lambda: self._rules("language"),
            "embedded": lambda: self._rules("subset", self._results.seeds.index(EMBEDDED)),
            "methods": self._methods,
            "methods-random": lambda: self._methods_minus("random"),
            "methods-vispruner": lambda: self._methods_minus("vispruner"),
            "methods-slices": self._methods_sliced,
            "kinds": self._by_kind,
            "paired": self._paired,
            "slices": self._sliced,
            "seeds": self._by_seed,
            "ratio": lambda: self._ablation([f"ratio {r}" for r in RATIOS]),
            "step": lambda: self._ablation([f"step {s}" for s in STEPS]),
            "by-attention": self._by_attention,
            "shift": self._shift,
            "dispersion": self._dispersion,
            "settings": self._settings,
        }

    def _key(self, rule: str, k: int) -> str | None:
        if rule == "full":
            return "full"
        if rule == "matched":
            matched = self._recipe.matched_budget(k, 1)
            return f"fastv/1@{matched}" if matched else None
        return f"{rule}@{k}"

    def _summary(self) -> str:
        """The short table of the README."""
        budgets = self._recipe.budgets[1:5]
        whole = self._results.mean("subset", "full", everything).percent()
        rows = []
        for rule in ("vispruner", "random", "oracle"):
            means = (self._results.mean("subset", f"{rule}@{k}", everything) for k in budgets)
            rows.append([SHOWN[rule], whole, *(mean.percent() for mean in means)])
        head = ["retained visual tokens", f"{self._recipe.patches} (all)", *map(str, budgets)]
        return (
            f"{table(head, rows)}\nCorrect answers (%) ± standard error, "
            f"{_asked(self._results)} questions, {_seeds(self._results.seeds)}.\n"
        )

    def _rules(self, stage: str, run: int | None = None) -> str:
        budgets = self._recipe.budgets
        full = self._results.mean(stage, "full", everything, run=run)
        rows = []
        for rule, name in SHOWN.items():
            keys = (self._key(rule, k) for k in budgets)
            cells = [
                self._results.mean(stage, key, everything, run=run).percent() if key else ""
                for key in keys
            ]
            rows.append([name, *cells])
        accuracies = table(["k =", *(str(k) for k in budgets)], rows)
        seeds = self._results.seeds if run is None else [self._results.seeds[run]]
        return (
            f"All {self._recipe.patches} tokens: {full.percent()} %. Accuracy (%) ± standard "
            f"error, {_asked(self._results)} questions, {_seeds(seeds)}:\n\n{accuracies}"
        )

    @functools.cached_property
    def _method_results(self) -> Results:
        return Results.load(str(self._results.runs[0]["recipe"]), "methods")

    def _methods(self) -> str:
        """Accuracy of every method of `prune`."""
        results, budgets = self._method_results, self._recipe.budgets
        rows = [
            [name, *(results.mean("subset", f"{m}@{k}", everything).percent() for k in budgets)]
            for m, name in METHODS_SHOWN.items()
        ]
        machines = "".join(f"- Seed {run['seed']}: {_machine(run)}\n" for run in results.runs)
        return (
            f"All {self._recipe.patches} tokens: "
            f"{results.mean('subset', 'full', everything).percent()} %. Accuracy (%) ± standard "
            f"error, {_asked(results)} questions, {_seeds(results.seeds)}:\n\n"
            f"{table(['k =', *map(str, budgets)], rows)}\n{machines}"
        )

    def _methods_minus(self, other: str) -> str:
        """Differences of every method from another one, paired by question."""
        results, budgets = self._method_results, self._recipe.budgets
        rows = [
            [
                name,
                *(
                    _points(results.mean("subset", f"{m}@{k}", everything, minus=f"{other}@{k}"))
                    for k in budgets
                ),
            ]
            for m, name in METHODS_SHOWN.items()
            if m != other
        ]
        return table([f"minus `{other}`, k =", *map(str, budgets)], rows)

    def _methods_sliced(self) -> str:
        results, k = self._method_results, self._recipe.budgets[METHODS_SLICE_BUDGET]
        rows = []
        for label, where in _slices(self._recipe.style.backgrounds).items():
            keys = (m if m == "full" else f"{m}@{k}" for m in METHODS_SLICED)
            means = [results.mean("subset", key, where) for key in keys]
            rows.append([label, str(means[0].count), *(mean.percent() for mean in means)])
        names = ["all tokens", *(METHODS_SHOWN[m] for m in METHODS_SLICED[1:])]
        return table([f"k = {k}", "questions", *names], rows)

    def _paired(self) -> str:
        budgets = self._recipe.budgets
        rows = []
        for rule, name in SHOWN.items():
            if rule == "vispruner":
                continue
            cells = []
            for k in budgets:
                key = self._key(rule, k)
                gain = key and self._results.mean("subset", key, everything, minus=f"vispruner@{k}")
                cells.append(_points(gain) if gain else "")
            rows.append([name, *cells])
        head = ["minus VisPruner, k =", *(str(k) for k in budgets)]
        return (
            "Difference from VisPruner in points ± standard error, on the same questions:\n\n"
            f"{table(head, rows)}"
        )

    def _sliced(self) -> str:
        names = {"full": "all tokens", **SHOWN}
        parts = []
        for place in SLICE_BUDGETS:
            k = self._recipe.budgets[place]
            rows = []
            for label, where in _slices(self._recipe.style.backgrounds).items():
                cells = []
                count = 0
                for rule in SLICED:
                    mean = self._results.mean("subset", str(self._key(rule, k)), where)
                    cells.append(mean.percent())
                    count = mean.count
                rows.append([label, str(count), *cells])
            head = [f"k = {k}", "questions", *(names[rule] for rule in SLICED)]
            parts.append(table(head, rows))
        return "\n".join(parts)

    def _by_kind(self) -> str:
        """Change in accuracy with VisPruner, by retained tokens and kind of question."""
        rows = []
        for k in self._recipe.budgets:
            cells = [
                _points(self._results.mean("subset", f"vispruner@{k}", where, minus="full"))
                for where in (everything, *map(_of_kind, KINDS))
            ]
            before = self._results.mean("language", f"vispruner@{k}", everything, minus="full")
            rows.append([f"{k} ({100 * k / self._recipe.patches:.0f} %)", *cells, _points(before)])
        return table(["retained tokens", "all", *KINDS, "all, before the subset stage"], rows)

    def _by_seed(self) -> str:
        budgets = self._recipe.budgets[1:5]
        rows = []
        for run, seed in enumerate(self._results.seeds):
            cells = [self._results.mean("subset", "full", everything, run=run).percent()]
            cells += [
                self._results.mean("subset", f"vispruner@{k}", everything, run=run).percent()
                for k in budgets
            ]
            rows.append([f"VisPruner, seed {seed}", *cells])
        for rule in COMPARED:
            for run, seed in enumerate(self._results.seeds):
                gains = [
                    self._results.mean(
                        "subset", f"{rule}@{k}", everything, minus=f"vispruner@{k}", run=run
                    )
                    for k in budgets
                ]
                rows.append([f"{SHOWN[rule]}, difference, seed {seed}", "", *map(_points, gains)])
        head = ["tokens", f"{self._recipe.patches}", *(str(k) for k in budgets)]
        return f"Accuracy (%) and differences in points ± standard error:\n\n{table(head, rows)}"

    def _analysis(self, part: str, name: str) -> tuple[float, float]:
        """Mean accuracy over seeds, and its standard error from scenes and seeds.

        The files contain only means, so the error from scenes is that of a single seed, an upper
        bound.
        """
        values, errors = np.transpose([run[part]["accuracy"][name] for run in self._analyses])
        between = values.var(ddof=1) / len(values) if len(values) > 1 else 0.0
        return float(values.mean()), float(np.sqrt(np.square(errors).mean() + between))

    def _ablation(self, names: Sequence[str]) -> str:
        accuracy = self._analyses[0]["ablations"]["accuracy"]
        budgets = sorted({int(key.split("@")[1]) for key in accuracy if "@" in key}, reverse=True)
        rows = []
        for name in names:
            cells = [self._analysis("ablations", f"{name}@{k}") for k in budgets]
            rows.append([name, *(f"{100 * v:.1f} ± {100 * e:.1f}" for v, e in cells)])
        return table(["k =", *(str(k) for k in budgets)], rows)

    def _by_attention(self) -> str:
        accuracy = self._analyses[0]["by_attention"]["accuracy"]
        names = list(dict.fromkeys(key.split("@")[0] for key in accuracy))
        rows = []
        for name in names:
            cells = [self._analysis("by_attention", f"{name}@{k}") for k in self._recipe.budgets]
            label = "[CLS], tower" if name == "cls" else f"{name.replace('text', 'text, layer')}"
            rows.append([label, *(f"{100 * v:.1f} ± {100 * e:.1f}" for v, e in cells)])
        return table(
            ["top k by, k =", *(str(k) for k in self._recipe.budgets)],
            rows,
        )

    def _shift(self) -> str:
        """Share of the selected tokens in the lowest two rows, by seed."""

        def lowest(rows: Sequence[float]) -> str:
            return f"{100 * sum(rows[-2:]) / sum(rows):.0f} %"

        layers = [f"text {layer + 1}" for layer in range(self._recipe.language.layers)]
        rows = []
        for run in self._analyses:
            attention = run["attention"]
            cells = [
                "{} ({})".format(
                    *(lowest(attention[f"selected rows/{layer}, {decay}"]) for decay in DECAYS)
                )
                for layer in layers
            ]
            ends = (lowest(attention[f"selected rows/{name}"]) for name in ("cls", "vispruner"))
            rows.append([str(run["seed"]), *cells, *ends, lowest(attention["rows/objects"])])
        names = [name.replace("text", "text, layer") for name in layers]
        head = ["seed", *names, "[CLS]", "VisPruner", "objects"]
        k = self._analyses[0]["attention"]["k"]
        return (
            f"Share of the {k} selected tokens in the lowest 2 of {self._recipe.grid} rows; in "
            f"parentheses, with one position for all visual tokens:\n\n{table(head, rows)}"
        )

    def _dispersion(self) -> str:
        found = [run["attention"] for run in self._analyses]
        names = [key.partition("/")[2] for key in found[0] if key.startswith("entropy/")]

        def average(key: str) -> float:
            return float(np.mean([attention[key] for attention in found]))

        rows = []
        for name in names:
            if name.endswith(", no decay"):
                continue
            half = np.mean([attention[f"cumulative/{name}"] for attention in found], 0)
            rows.append(
                [
                    "[CLS], tower" if name == "cls" else f"text, layer {name.split()[1][:-1]}",
                    f"{average(f'entropy/{name}'):.3f}",
                    f"{100 * half[1]:.0f} %",
                    f"{100 * average(f'mass on objects/{name}'):.0f} %",
                    f"{float(np.mean([a['auroc'][name] for a in found])):.3f}",
                ]
            )
        head = ["attention", "entropy", "on the top 10 %", "on objects", "AUROC of objects"]
        area = average("area of objects")
        return (
            f"{table(head, rows)}\nObjects cover {100 * area:.0f} % of the patches; uniform "
            "attention has entropy 1.\n"
        )

    def _settings(self) -> str:
        """Machines, versions and dates of the numbers."""
        lines = []
        for run in self._results.runs:
            last = {line["stage"]: line["seconds"] for line in run["training"]}
            minutes = sum(last[stage] for stage in self._recipe.stages) / 60
            lines.append(
                f"- Seed {run['seed']}: trained in {minutes:.0f} minutes; {_machine(run)}\n"
            )
        agree = min(
            run["checkpoints"]["subset"]["agrees_with_generate"]["share"]
            for run in self._results.runs
        )
        return (
            f"{''.join(lines)}\n`generate()` under `vispruner.apply` agreed with the fast "
            f"evaluation on {100 * agree:.1f} % of the sampled questions.\n"
        )
