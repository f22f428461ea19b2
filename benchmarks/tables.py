"""Generates the tables of README.md, docs/ and the model card from the files in results/.

Without options the documents are rewritten (documents.py has their format); `--check` changes
nothing, lists those that are out of date, and exits with 1 if there are any. It also lists results
that stand for the current kernels, but are of another csrc/. The tables named accuracy-* come from
accuracy/tables.py.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import documents
from documents import ResultsError, read_json, table

RESULTS = Path(__file__).with_name("results")
ACCURACY = "accuracy-"
RECIPE = "cpu"  # of the accuracy experiment in the documentation


#: Results that their tables can do without.
OPTIONAL = (
    "gpu_verified",
    "compiled_kernels",
    "kernels",
    "end_to_end_cpu",
    "end_to_end_gpu",
    "load",
)
#: Results that stand for the current kernels. Those of GPUs may be of an earlier csrc/, and their
#: tables name it.
CURRENT = ("kernel_counts", "occupancy", "compiled_kernels")


def _path(name: str) -> Path:
    return RESULTS / f"{name}.json"


def _load(name: str) -> Any:
    path = _path(name)
    return None if name in OPTIONAL and not path.exists() else read_json(path)


def of_other_kernels() -> list[str]:
    """A line per file in CURRENT that is of another csrc/."""
    import provenance  # needs torch

    from vispruner_cuda import _library

    current = {
        "csrc_tree": provenance.tree_hash(documents.ROOT / "csrc"),
        "sources": _library.sources_hash(documents.ROOT),
    }
    lines = []
    for name in CURRENT:
        data = _load(name)
        if data is None:
            continue
        # compiled_kernels.json has the hash of the library.
        key = "sources" if name == "compiled_kernels" else "csrc_tree"
        if data.get(key) != current[key]:
            lines.append(
                f"{_path(name)}: of csrc {str(data.get(key))[:12]}, not of the current "
                f"{str(current[key])[:12]}: measure again"
            )
    return lines


def _where(data: Any) -> str:
    """Device, versions and date of a result, with the GPU if there is one."""
    device, versions = data["device"], data["versions"]
    if gpu := device.get("gpu"):
        return f"{gpu['name']}, driver {gpu['driver']}; torch {versions['torch']}; {data['date']}."
    threads = "thread" if device["threads"] == 1 else "threads"
    return (
        f"{device['processor']}, {device['threads']} {threads}, {device['instruction_set']}; "
        f"torch {versions['torch']}; {data['date']}."
    )


_LOOPS = ("float32", "float32, channels reversed", "bfloat16")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


# The rows of the README.
_SUMMARY = (
    "prune 1x576x1024 float32 k=64",
    "prune 8x576x1024 float32 k=64",
    "prune 1x2880x1024 float32 k=64",
    "pairwise_cosine 1x2880x1024 float32",
    "received_attention 1x2304x80 float32",
)


def _cpu_speed(data: Any, only: Sequence[str] = ()) -> str:
    rows = []
    for row in data["speed"]:
        if only and row["name"] not in only:
            continue
        median = dict(row["median_ms"])
        ours = median.pop("vispruner_cuda")
        baseline = min(median, key=lambda name: median[name])
        rows.append(
            [
                f"`{row['name']}`",
                f"{_milliseconds(median[baseline])} ({baseline})",
                _milliseconds(ours),
                _times(row["speedup"]),
            ]
        )
    speeds = table(
        ["work (images x tokens x channels)", "eager PyTorch", "vispruner_cuda", "speed-up"], rows
    )
    return f"{speeds}\nMedians, interleaved in one process. {_where(data)}\n"


def cpu_speed(results: Callable[[str], Any]) -> str:
    """Operators compared with the fastest eager baseline."""
    return _cpu_speed(results("cpu"))


def cpu_speed_summary(results: Callable[[str], Any]) -> str:
    """The rows for the README."""
    return _cpu_speed(results("cpu"), _SUMMARY)


def _times(speedup: float) -> str:
    return f"{speedup:.1f} x" if speedup < 10 else f"{speedup:.0f} x"


def cpu_methods(results: Callable[[str], Any]) -> str:
    """Every method of prune compared with its fastest eager baseline."""
    data = results("methods_cpu")
    rows = []
    for row in data["speed"]:
        shortest = dict(row["min_ms"])
        ours = shortest.pop("vispruner_cuda")
        baseline = min(shortest, key=lambda name: shortest[name])
        shape = f"{row['images']} x {row['tokens']}, {row['dtype']}, k = {row['k']}"
        rows.append(
            [
                f"`{row['method']}`, {shape}",
                f"{_milliseconds(shortest[baseline])} ({baseline})",
                _milliseconds(ours),
                _times(row["speedup_of_minima"]),
                _times(row["speedup"]),
            ]
        )
    head = ["work", "eager PyTorch", "vispruner_cuda", "speed-up", "speed-up of medians"]
    return (
        f"{table(head, rows)}\nFastest runs, interleaved in one process; the machine was shared. "
        f"{row['channels']} channels. {_where(data)}\n"
    )


def method_counts(results: Callable[[str], Any]) -> str:
    """Warp instructions of every greedy method's loop, and of the whole call."""
    rows = [row for row in results("kernel_counts")["rows"] if row["tokens"] == 576]

    def loop(row: Any) -> int:  # its kernel has one block per image
        return int(max(c["longest_block"] for c in row["kernels"].values() if c["blocks"] == 1))

    def whole(row: Any) -> int:
        return int(sum(c["warp_instructions"] for c in row["kernels"].values()))

    first = rows[0]
    cells = [
        [
            f"`{row['method']}`",
            row["features"],
            f"{loop(row):,}",
            f"{loop(row) / loop(first):.2f}",
            f"{whole(row):,}",
            f"{whole(row) / whole(first):.2f}",
        ]
        for row in rows
    ]
    head = ["method", "features", "loop", "of the first row", "all kernels", "of the first row"]
    return (
        f"{table(head, cells)}\nWarp instructions at {first['tokens']} x {first['channels']}, "
        f"k = {first['k']}, {first['dtype']}, PTX of {first['device']}.\n"
    )


def occupancy(results: Callable[[str], Any]) -> str:
    """Blocks of every kernel that a multiprocessor holds, and registers per thread."""
    data = results("occupancy")
    archs = list(data["limits"])

    def cell(on: Any) -> str:
        return f"{on['blocks']} ({on['registers']})" if on else ""

    rows = [
        [
            f"`{row['kernel']}`",
            str(row["threads"]),
            f"{max(on['shared'] for on in row['on'].values()) / 1000:.1f} KB",
            *(cell(row["on"].get(arch)) for arch in archs),
        ]
        for row in sorted(data["rows"], key=lambda row: (row["kernel"], row["threads"]))
    ]
    head = ["kernel", "threads", "shared memory", *archs]
    tree = data["csrc_tree"][:12]
    return f"{table(head, rows)}\nBlocks (registers per thread), csrc tree `{tree}`.\n"


def cpu_memory(results: Callable[[str], Any]) -> str:
    """Extra memory of one call."""
    data = results("cpu")

    def mib(count: int) -> str:
        return f"{count / 2**20:.1f} MiB"

    rows = [
        [
            f"`{row['name']}`",
            mib(row["features_bytes"]),
            mib(row["gram_bytes"]),
            mib(row["peak_extra_bytes"]),
            f"{row['copies_of_features_besides_gram']:.2f}",
        ]
        for row in data["memory"]
    ]
    head = ["work", "features", "Gram matrix", "peak extra", "(peak - Gram) / features"]
    return f"{table(head, rows)}\nGrowth of the peak resident set over one call. {_where(data)}\n"


def rounding_sensitivity(results: Callable[[str], Any]) -> str:
    """Agreement of the diverse half under rounding errors, and coverage."""
    data = results("rounding_sensitivity")
    reordered = "canonical v1, channels reversed, in a batch"
    agreement, coverage = [], []
    for result in data["results"]:
        row = {variant["variant"]: variant for variant in result["variants"]}
        chance = row["random diverse half"]
        shape = f"{result['tokens']} x {result['channels']}, k = {result['k']}"
        label = f"{result['features']} ({result['images']} images, {shape})"
        agreement.append(
            [
                label,
                *(_percent(row[f"loop, {x}"]["diverse_agreement"]) for x in _LOOPS),
                _percent(chance["diverse_agreement"]),
                _percent(row[reordered]["diverse_agreement_with_canonical"]),
            ]
        )
        names = ("loop, float64", "loop, float32", "loop, bfloat16", "canonical v1")
        coverage.append(
            [
                label,
                *(f"{row[name]['coverage']:.3f}" for name in names),
                f"{chance['coverage']:.3f}",
            ]
        )
    head = [
        "features",
        *(f"{x} and float64 loop" for x in _LOOPS),
        "random and float64 loop",
        "canonical v1, and with channels reversed, in a batch",
    ]
    kinds = ["features", "float64", "float32", "bfloat16", "canonical v1", "random diverse half"]
    return (
        "Agreement of two runs on the diverse half:\n\n"
        f"{table(head, agreement)}\n"
        "Coverage of the dropped tokens:\n\n"
        f"{table(kinds, coverage)}\n"
        f"Tokens x channels; ratio {data['setup']['important_ratio']}. {_where(data)}\n"
    )


def gpu_status(results: Callable[[str], Any]) -> str:
    """GPU runs, from gpu_verified.json, which gpu_check.sh writes."""
    data = results("gpu_verified")
    head = ["GPU", "date", "torch, driver", "result", "tests passed", "failed", "csrc tree"]
    if data is None:
        return "GPU-tested: not yet. No kernel of this project has run on a GPU.\n"
    runs = data if isinstance(data, list) else [data]

    def verdict(run: Any) -> str:
        if not run["clean"]:
            return "**NOT CLEAN**"
        tools = run["sanitizers"]
        without = [name for name, tool in tools.items() if tool["status"] == "unavailable"]
        if not without:
            return "clean"
        missing = "compute-sanitizer" if len(without) == len(tools) else ", ".join(without)
        return f"clean, but without {missing}"

    rows = [
        [
            str(run["device"]),
            str(run["date"]),
            f"{run['torch']}, {run['driver']}",
            verdict(run),
            str(run["tests"]["passed"]),
            str(run["tests"]["failed"]),
            f"`{(run['csrc_tree'] or 'unknown')[:12]}`",
        ]
        for run in runs
    ]
    return table(head, rows)


def compiled_kernels(results: Callable[[str], Any]) -> str:
    """The compiled kernels' runs on the host, from a run of `make test`."""
    data = results("compiled_kernels")
    if data is None:
        return "Not recorded.\n"
    targets = " and ".join(f"sm_{target}" for target in data["targets"])
    return (
        f"{data['launches']:,} launches of {len(data['kernels'])} kernels (PTX for {targets}) in "
        f"{data['calls']:,} calls: errors reported by a checker in {data['failed']}. "
        f"{data['faults'] - data['tests_failed']} of {data['faults']} seeded faults detected. "
        f"{data['date']}.\n"
    )


def gpu_goals(results: Callable[[str], Any]) -> str:
    """Speed goals: goal, measured, best baseline, floor."""
    data = results("kernels")
    if data is None:
        return "Not measured yet: no GPU has run these kernels.\n"
    from operators.workloads import GOALS  # needs torch

    notes = ""
    measured = len({row["name"] for row in data["rows"]} & {goal.name for goal in GOALS})
    if measured < len(GOALS) or not data["complete"]:
        notes += f"**incomplete: {measured} of {len(GOALS)} goals**\n\n"
    for name, reason in data["no_baseline"].items():
        notes += f"No result of the baseline {name}: {reason}.\n\n"
    rows = []
    for row in data["rows"]:
        ours = row["us_per_image"] if row["per"] == "image" else row["us"]
        floor = max(row["floor_us"].values()) / (row["images"] if row["per"] == "image" else 1)
        baselines = {name: time for name, time in row.get("baselines_us", {}).items() if time}
        if row["relative_to"] == "floor":
            ours, unit = ours / floor, "x floor"
        elif row["relative_to"] in baselines:
            ours, unit = ours / baselines[row["relative_to"]], f"x {row['relative_to']}"
        elif row["relative_to"]:
            ours, unit = math.nan, f"x {row['relative_to']}"  # that baseline has no result
        else:
            unit = "us per image" if row["per"] == "image" else "us"
        best = min(
            (name for name in baselines if "copy" not in name),
            key=lambda n: baselines[n],
            default=None,
        )
        rows.append(
            [
                row["name"],
                f"{row['goal']:g} ({row['aim']:g}) {unit}" if row["goal"] else "",
                "not measured" if math.isnan(ours) else f"{ours:.3g} {unit}",
                f"{row['us']:.3g} us",
                f"{baselines[best]:.3g} us ({best})" if best else "",
                f"{max(row['floor_us'].values()):.3g} us "
                f"({max(row['floor_us'], key=lambda n: row['floor_us'][n])})",
            ]
        )
    head = ["work", "goal (aim)", "measured", "whole call", "best baseline", "floor"]
    return (
        f"{notes}{table(head, rows)}\nHost time of one `prune` call: {data['host_us']:.1f} us. "
        f"csrc tree `{data['csrc_tree'][:12]}`. {_where(data)}\n"
    )


def _end_to_end(data: Any) -> str:
    """One row per model, batch and k."""
    pruning = ("score", "select", "rewrite")
    rows = []
    whole: dict[str, Any] = {}
    free: dict[tuple[str, int], Any] = {}
    for row in data["rows"]:
        if row["way"].startswith("free"):
            free[row["model"], row["batch"]] = row
    for row in data["rows"]:
        ms = row["milliseconds"]
        if row["way"] == "unpruned":
            whole = row
        if "flops" not in row:
            continue
        alone = row is whole
        spent = sum(ms.get(name, 0.0) for name in pruning)
        less = 100 * (row["first_token_ms"] / whole["first_token_ms"] - 1)
        flops = 100 * (row["flops"] / whole["flops"] - 1)
        baseline = free.get((row["model"], row["batch"]))
        over = ""
        if baseline is not None and row["k"] == int(baseline["way"].split("=")[1]):
            over = f"{100 * (sum(ms.values()) / sum(baseline['milliseconds'].values()) - 1):+.1f} %"
        memory = row["peak_bytes"]
        rows.append(
            [
                f"{row['model']}, batch {row['batch']}",
                "unpruned" if alone else f"k = {row['k']}",
                _milliseconds(ms["vision"]),
                "" if alone else f"{_milliseconds(spent)} ({100 * spent / ms['vision']:.1f} %)",
                _milliseconds(ms["prefill"]),
                _milliseconds(ms["decode"]),
                _milliseconds(row["first_token_ms"]) + ("" if alone else f" ({less:+.0f} %)"),
                f"{row['flops'] / 1e12:.3g} T" + ("" if alone else f" ({flops:+.0f} %)"),
                over,
                "" if memory is None else f"{memory / 2**30:.1f} GiB",
            ]
        )
    head = [
        "model", "tokens", "vision", "pruning (of vision)", "prefill", "decode",
        "to first token", "operations", "overhead", "peak memory",
    ]  # fmt: skip
    if all(not row[-1] for row in rows):  # not on the CPU
        head, rows = head[:-1], [row[:-1] for row in rows]
    setup = data["setup"]
    return (
        f"{table(head, rows)}\nRandom weights"
        f"{' at a small size' if setup['small'] else ''}, {setup['dtype']}; "
        f"{setup['text_tokens']} other tokens in the prompt, {setup['new_tokens']} in the answer; "
        f"medians of {setup['runs']} interleaved runs. {_where(data)}\n"
    )


def end_to_end_cpu(results: Callable[[str], Any]) -> str:
    """Shrunk models on the CPU."""
    data = results("end_to_end_cpu")
    return "Not measured yet.\n" if data is None else _end_to_end(data)


def end_to_end_gpu(results: Callable[[str], Any]) -> str:
    """Whole models at their published sizes."""
    data = results("end_to_end_gpu")
    return "Not measured yet: no GPU has run them.\n" if data is None else _end_to_end(data)


def capacity(results: Callable[[str], Any]) -> str:
    """Users per GPU by number of retained tokens, from models/capacity.py."""
    data = results("capacity")
    setup = data["setup"]
    wanted = sorted(data["models"][0]["rows"][0]["gpus"], key=int)
    rows = []
    for model in data["models"]:
        whole = model["rows"][0]["visual_tokens"]
        for row in model["rows"]:
            retained = row["visual_tokens"]
            rows.append(
                [
                    f"{model['name']}, {model['image']}",
                    f"{retained}"
                    if retained == whole
                    else f"{retained} ({whole / retained:.1f} x fewer)",
                    f"{row['kv_bytes_of_the_image'] / 2**20:.1f} MiB",
                    str(row["users_per_gpu"]),
                    *(str(row["gpus"][users]) for users in wanted),
                ]
            )
    head = [
        "model, image",
        "visual tokens",
        "KV cache of the image",
        "users per GPU",
        *(f"GPUs for {int(users):,} users" for users in wanted),
    ]
    return (
        f"{table(head, rows)}\nComputed, not measured: weights and cache in 16 bits, "
        f"{setup['text_tokens']} tokens of text per user, {setup['gpu_bytes'] / 1e9:.0f} GB per "
        f"GPU, of which vLLM uses {_percent(setup['utilization'])}, minus "
        f"{setup['reserve_bytes'] / 1e9:.0f} GB for activations; all users at the same time.\n"
    )


def serving(results: Callable[[str], Any]) -> str:
    """A server with and without pruning, from models/serving.py."""
    data = results("serving")
    setup, versions = data["setup"], data["versions"]
    rows = [
        [
            row["name"],
            f"{row['prompt_tokens']:.0f}",
            f"{row['requests_per_second']:.2f}",
            f"{row['first_token_seconds']['median']:.2f} s",
            f"{row['first_token_seconds']['p90']:.2f} s",
        ]
        for row in data["results"]
    ]
    head = ["server", "tokens per prompt", "requests/s", "first token, median", "90 %"]
    return (
        f"{table(head, rows)}\n{data['speedup']:.2f} x the requests, first token "
        f"{data['first_token_earlier']:.2f} x earlier. {setup['model']}; {setup['concurrency']} "
        f"requests in flight, {setup['output_tokens']} tokens per answer; median of "
        f"{setup['rounds']} alternating rounds of {setup['requests']} requests; vLLM "
        f"{versions['vllm']}. "
        f"{_where(data)}\n"
    )


def load(results: Callable[[str], Any]) -> str:
    """A server with and without pruning under mixed load, from models/load.py."""
    data = results("load")
    if data is None:
        return "Not measured yet.\n"
    setup, versions = data["setup"], data["versions"]
    rows = [
        [
            row["name"],
            f"{row['prompt_tokens']:.0f}",
            f"{row['requests_per_second']:.2f}",
            f"{row['first_token_seconds']['median']:.1f} s",
            f"{row['first_token_seconds']['p90']:.1f} s",
            f"{100 * row['kv_cache_highest']:.1f} %",
            str(row["failed"]),
        ]
        for row in data["results"]
    ]
    head = [
        "server", "tokens per prompt", "requests/s", "first token, median", "90 %",
        "KV cache, peak", "failed",
    ]  # fmt: skip
    return (
        f"{table(head, rows)}\n{setup['model']}; {setup['requests']} requests, "
        f"{setup['concurrency']} in flight, {setup['output_tokens']} tokens per answer; vLLM "
        f"{versions['vllm']}. {_where(data)}\n"
    )


def host(results: Callable[[str], Any]) -> str:
    """Calls with almost no work."""
    data = results("host")
    rows = [[f"`{r['call']}`", f"{r['us']:.1f} us", _times(r["ratio"])] for r in data["calls"]]
    head = ["call", "median", "of the first row"]
    return f"{table(head, rows)}\nOne image with 8 tokens and 8 channels. {_where(data)}\n"


def loop_counts(results: Callable[[str], Any]) -> str:
    """Scans and chains in the dedup loop."""
    data = results("loop_counts")
    head = ["features", "tokens", *data["results"][0]["counts"]]
    rows = [
        [row["features"], str(row["tokens"]), *(f"{x:g}" for x in row["counts"].values())]
        for row in data["results"]
    ]
    return table(head, rows)


TABLES: dict[str, Callable[[Callable[[str], Any]], str]] = {
    "cpu-speed": cpu_speed,
    "cpu-speed-summary": cpu_speed_summary,
    "cpu-methods": cpu_methods,
    "cpu-memory": cpu_memory,
    "host": host,
    "rounding-sensitivity": rounding_sensitivity,
    "loop-counts": loop_counts,
    "method-counts": method_counts,
    "occupancy": occupancy,
    "gpu-status": gpu_status,
    "compiled-kernels": compiled_kernels,
    "gpu-goals": gpu_goals,
    "capacity": capacity,
    "serving": serving,
    "load": load,
    "end-to-end-cpu": end_to_end_cpu,
    "end-to-end-gpu": end_to_end_gpu,
}


@functools.cache
def _accuracy(recipe: str) -> dict[str, Callable[[], str]]:
    from accuracy.tables import makers  # needs NumPy, PyYAML and transformers

    return makers(recipe)


def part(name: str, recipe: str = RECIPE) -> str:
    """The table of this name; KeyError if there is none.

    Raises:
        ResultsError: a results file is missing or broken.
    """
    if name.startswith(ACCURACY):
        return _accuracy(recipe)[name.removeprefix(ACCURACY)]()
    maker = TABLES[name]
    last = ""

    def results(file: str) -> Any:
        nonlocal last
        last = file
        return _load(file)

    try:
        return maker(results)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ResultsError(
            f"{_path(last)}: lacks what table {name} shows ({type(error).__name__}: {error}): "
            "restore it, or run its benchmark again"
        ) from error


def update(root: Path = documents.ROOT, *, check: bool = False, recipe: str = RECIPE) -> list[Path]:
    """Writes every document that is out of date, or with `check` only returns their paths."""
    stale = []
    for path in documents.paths(root):
        old = path.read_text(encoding="utf-8")
        new = documents.render(old, lambda name: part(name, recipe))
        if new != old:
            stale.append(path)
            if not check:
                path.write_text(new, encoding="utf-8")
    return stale


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    parser.add_argument("--root", type=Path, default=documents.ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        stale = update(options.root, check=options.check)
        others = of_other_kernels() if options.check else []
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 1
    for path in stale:
        wrong = "tables are out of date: run python benchmarks/tables.py"
        print(f"{path}: {wrong if options.check else 'updated'}")
    for line in others:
        print(line)
    return 1 if others or (options.check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
