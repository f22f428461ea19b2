"""Measures whole models with and without pruning: latency by phase, operations, peak memory.

Models have their published sizes and random weights, so nothing is downloaded; speed does not
depend on the values of the weights. `--small` shrinks encoder and language model but not the number
of visual tokens, for machines without a GPU. The variants of a model and batch take turns, so that
a machine that slows down slows all of them.

Pruning is compared with the unpruned model; with a prompt of the pruned length whose tokens cost
nothing to select ("free"); and with a plain implementation of the method, which switches the tower
to eager attention for its attention weights and runs the loop in eager PyTorch ("plain").
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import provenance
import torch
from numeric import positive
from operators import baselines
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

import vispruner
from vispruner import shapes
from vispruner.phases import unpruned

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODELS = ("llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b")
PRUNING = ("score", "select", "rewrite")

_SMALL_TEXT = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
               "num_attention_heads": 6, "num_key_value_heads": 6}  # fmt: skip
_SMALL_CLIP = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
               "num_attention_heads": 4}  # fmt: skip
_SMALL_QWEN = {"depth": 8, "hidden_size": 256, "intermediate_size": 704, "num_heads": 4,
               "fullatt_block_indexes": [3, 7], "out_hidden_size": 768}  # fmt: skip


def build(name: str, device: torch.device, dtype: torch.dtype, *, small: bool) -> Any:
    """The model with random weights."""
    from transformers import AutoModelForImageTextToText

    qwen = name.startswith("qwen")
    vision = _SMALL_QWEN if qwen else _SMALL_CLIP
    config = (
        shapes.config_of(name, text=_SMALL_TEXT, vision=vision) if small else shapes.config_of(name)
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # answers have the requested length
    model.generation_config.pad_token_id = 0
    return model


def prompt(
    model: Any, batch: int, image_size: tuple[int, int], text: int
) -> tuple[dict[str, Any], int]:
    """Arguments of `generate` with one image per row, and the visual tokens per image."""
    from vispruner.models import family_of
    from vispruner.selection import Budget

    device, dtype = model.device, model.dtype
    one = shapes.picture(model.config, image_size[1], image_size[0])
    visual = family_of(model)(model, Budget(k=1)).placeholders("image", one)[0]
    call: dict[str, Any] = {}
    for key, value in one.items():
        shape = (batch * value.shape[0], *value.shape[1:])
        if value.is_meta:
            call[key] = torch.randn(shape, device=device, dtype=dtype)
        else:
            call[key] = value.expand(shape).contiguous().to(device)
    words = torch.randint(10, 1000, (batch, text), device=device)
    image = model.config.image_token_id
    pictures = torch.full((batch, visual), image, device=device)
    call["input_ids"] = torch.cat([words[:, :4], pictures, words[:, 4:]], 1)
    call["attention_mask"] = torch.ones_like(call["input_ids"])
    if "image_grid_thw" in call:
        call["mm_token_type_ids"] = (call["input_ids"] == image).long()
    return call, visual


class Case:
    """One model and batch, and the variants that are measured on it."""

    def __init__(self, model: Any, call: dict[str, Any], new_tokens: int) -> None:
        self.model, self.call = model, call
        self._settings = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens,
                          "do_sample": False}  # fmt: skip

    def _generate(self, **call: Any) -> None:
        self.model.generate(**call, **self._settings)

    def unpruned(self) -> dict[str, float]:
        with unpruned(self.model) as clock:
            self._generate(**self.call)
            return clock.milliseconds()

    def pruned(self, k: int) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            with vispruner.apply(self.model, k=k) as pruner:
                self._generate(**self.call)
                assert pruner.last is not None
                return pruner.last.milliseconds

        return run

    def free(self, k: int) -> Callable[[], dict[str, float]]:
        """The unpruned encoder, and a prompt of the pruned length that costs nothing to make."""
        with torch.no_grad(), vispruner.apply(self.model, k=k):
            ready = vispruner.prepare(self.model, self.call)
        names = ("inputs_embeds", "attention_mask")
        prompt = {name: ready[name].clone() for name in names}
        encoder = vispruner.models.family_of(self.model).encoders["image"]
        pixels = {
            name: value for name, value in self.call.items() if name.startswith(("pixel", "image_"))
        }

        def run() -> dict[str, float]:
            with unpruned(self.model) as clock:  # timed as the other ways are
                with torch.no_grad():
                    getattr(self.model.base_model, encoder)(**pixels)
                self._generate(**prompt)
                return clock.milliseconds()

        return run

    def plain(self, k: int) -> Callable[[], dict[str, float]] | None:
        """The tower in eager attention with its attention weights, and the loop; LLaVA only."""
        if "image_grid_thw" in self.call:
            return None
        tower = self.model.base_model.vision_tower
        pixels = self.call["pixel_values"]
        pixels = pixels.flatten(0, -4) if pixels.dim() > 4 else pixels

        def run() -> dict[str, float]:
            before = tower.config._attn_implementation
            tower.set_attn_implementation("eager")
            try:
                start = _now(self.model.device)
                with torch.no_grad():
                    out = tower(pixels, output_attentions=True, output_hidden_states=True)
                seen = _now(self.model.device)
                feats = out.hidden_states[-2][:, 1:]
                baselines.prune_each(feats, out.attentions[-2][:, :, 0, 1:], k)
                end = _now(self.model.device)
            finally:
                tower.set_attn_implementation(before)
            return {"vision": 1e3 * (seen - start), "loop": 1e3 * (end - seen)}

        return run


def _now(device: torch.device) -> float:
    """Seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def operations(model: Any, call: dict[str, Any], k: int | None) -> int:
    """Operations of encoder and language model up to the first token, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        if k is None:
            model.generate(**call, max_new_tokens=1, do_sample=False)
        else:
            with vispruner.apply(model, k=k):
                model.generate(**call, max_new_tokens=1, do_sample=False)
    return counter.get_total_flops()


def peak_bytes(device: torch.device, run: Callable[[], Any]) -> int | None:
    """Peak memory of the device during a run, weights included; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def first_token(phases: dict[str, float]) -> float:
    """Milliseconds to the first token of the answer."""
    return sum(value for name, value in phases.items() if name != "decode")


def measure(name: str, options: argparse.Namespace, bar: Progress) -> Iterator[dict[str, Any]]:
    """The rows of one model, batch by batch."""
    device = torch.device(options.device)
    model = build(name, device, DTYPES[options.dtype], small=options.small)
    for batch in options.batch:
        call, visual = prompt(model, batch, options.image_size, options.text_tokens)
        if batch * visual > options.most_tokens:
            continue
        case = Case(model, call, options.new_tokens)
        ways: dict[str, Callable[[], dict[str, float]]] = {"unpruned": case.unpruned}
        ways |= {f"k={k}": case.pruned(k) for k in options.k}
        one = options.k[-1] if options.baseline_k is None else options.baseline_k
        ways[f"free k={one}"] = case.free(one)
        if (plain := case.plain(one)) is not None:
            ways[f"plain k={one}"] = plain
        times: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        runs = bar.add_task(f"{name}, batch {batch}", total=(options.runs + 1) * len(ways))
        for repeat in range(options.runs + 1):
            for way, run in ways.items():
                spent = run()
                bar.advance(runs)
                bar.refresh()  # not from a thread, which would run during the measurements
                if repeat:  # the first one warms up
                    times[way].append(spent)
        bar.remove_task(runs)
        for way, run in ways.items():
            median = {
                phase: statistics.median(spent.get(phase, 0.0) for spent in times[way])
                for phase in times[way][0]
            }
            k = None if way == "unpruned" else int(way.split("=")[1])
            row = {
                "model": name, "batch": batch, "way": way, "k": k, "visual_tokens": visual,
                "milliseconds": {phase: round(value, 3) for phase, value in median.items()},
                "peak_bytes": peak_bytes(device, run),
            }  # fmt: skip
            if "prefill" in median:
                first = statistics.median(first_token(spent) for spent in times[way])
                row["first_token_ms"] = round(first, 3)
            if way == "unpruned" or way.startswith("k="):
                row["flops"] = operations(model, call, k)
            yield row
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    columns = ("model", "batch", "", "vision", "prune", "prefill", "decode", "first token", "TFLOP")
    table = Table(*columns)
    for row in rows:
        ms = row["milliseconds"]
        pruning = sum(ms.get(name, 0.0) for name in (*PRUNING, "loop"))
        cells = [ms.get("vision", 0.0), pruning, ms.get("prefill", 0.0), ms.get("decode", 0.0)]
        flops = f"{row['flops'] / 1e12:.3g}" if "flops" in row else ""
        table.add_row(
            row["model"], str(row["batch"]), row["way"],
            *(f"{cell:.2f}" if cell else "" for cell in cells),
            f"{row['first_token_ms']:.1f}" if "first_token_ms" in row else "", flops,
        )  # fmt: skip
    console.print(table)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return positive(width), positive(height)


_size.__name__ = "WxH"  # argparse uses it in its error


def _json(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"must end in .json, got {text}")
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory, or in none: create it first")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m models.end_to_end",
        description=str(__doc__).split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--models", nargs="+", choices=list(shapes.MODELS), default=list(MODELS), metavar="NAME",
        help=f"out of {', '.join(shapes.MODELS)}")  # fmt: skip
    add(
        "--k",
        nargs="+",
        type=positive,
        default=[576, 192, 128, 64, 32],
        help="retained tokens per image",
    )
    add("--baseline-k", type=positive, default=64, help="k of the rows 'free' and 'plain'")
    add("--batch", nargs="+", type=positive, default=[1, 8, 32], help="prompts per batch")
    add("--most-tokens", type=positive, default=10**6, metavar="TOKENS",
        help="skip batches with more visual tokens")  # fmt: skip
    add("--image-size", type=_size, default="672x672", metavar="WxH", help="pixels of an image")
    add("--text-tokens", type=positive, default=64, help="all other tokens of a prompt")
    add("--new-tokens", type=positive, default=32, help="tokens of an answer")
    add("--runs", type=positive, default=5, help="timed runs, after one warm-up")
    add(
        "--small",
        action="store_true",
        help="shrink the models, but not the number of visual tokens",
    )
    add("--device", default="cuda" if cuda else "cpu", help="cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES, help="of the model (bfloat16 on a GPU, float32 on a CPU)")
    add("-o", "--output", type=_json, metavar="JSON",
        help="results file (end_to_end_gpu.json or end_to_end_cpu.json in results/)")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).strip().splitlines()[0]
        parser.error(f"argument --device: cannot use {options.device!r}: {reason}")
    on_gpu = torch.device(options.device).type == "cuda"
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    name = f"end_to_end_{'gpu' if on_gpu else 'cpu'}.json"
    options.output = options.output or provenance.RESULTS / name

    import transformers

    transformers.utils.logging.set_verbosity_error()
    setup = {
        name: value for name, value in vars(options).items() if name not in ("output", "device")
    }
    console = Console()
    rows: list[dict[str, Any]] = []
    with Progress(console=console, transient=True, auto_refresh=False) as bar:
        for name in bar.track(options.models, description="models"):
            for row in measure(name, options, bar):
                rows.append(row)
                # After each row, so that an interrupted run leaves a file.
                provenance.write(
                    options.output.stem,
                    {"setup": {**setup, "transformers": transformers.__version__}, "rows": rows},
                    options.output.resolve().parent,
                )
    if not rows:
        parser.error(
            "argument --most-tokens: no batch has so few visual tokens, got "
            f"{options.most_tokens}: raise it, or lower --batch"
        )
    show(rows, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
