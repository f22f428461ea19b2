"""Measures an OpenAI server with and without pruning and writes results/serving.json.

The client is vLLM's own (`vllm bench serve`, random images). Both servers run for the whole time
and take turns, round by round, so that a slow moment of the machine affects both. Every round has
new images, at a fixed concurrency; reported are requests per second and the time to the first
token.

Without --model the servers load a random LLaVA of a size that a CPU can serve: 576 visual tokens
per image, and a language model that costs about ten times as much as its vision tower.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import provenance
import torch
from numeric import positive, whole
from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:
    from support import engine_server

# What needs the engine's environment is imported where it is used, and not for --help.

SIDE = 336
START = 600  # seconds that a server may take to start


def random_llava(folder: Path) -> Path:
    """LLaVA-1.5's tower input and token count, with few and narrow layers."""
    from support import engine_models

    vision = engine_models.clip(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=7, num_attention_heads=4,
        image_size=SIDE, patch_size=14,
    )  # fmt: skip
    text = {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "head_dim": 64,
        "num_attention_heads": 12, "num_key_value_heads": 12, "initializer_range": 0.02,
    }  # fmt: skip
    return engine_models.llava(folder, vision=vision, text=text)


def server_environment() -> dict[str, str]:
    if torch.cuda.is_available():
        return dict(os.environ)
    from support import engine_process

    threads = str(len(os.sched_getaffinity(0)))
    return engine_process.environment(OMP_NUM_THREADS=threads, VLLM_CPU_KVCACHE_SPACE="2")


def benchmark(
    server: engine_server.Server, options: argparse.Namespace, requests: int, seed: int
) -> dict[str, Any]:
    """One run of vLLM's benchmark client: the content of its results file.

    Args:
        seed: of the images and texts.
    """
    # Its module: the command `vllm` looks for a distribution of that name, and the CPU build has
    # another.
    from vllm.benchmarks import serve

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    arguments = [
        "--backend", "openai-chat", "--base-url", server.url, "--endpoint", "/v1/chat/completions",
        "--model", options.model, "--served-model-name", "model",
        "--dataset-name", "random-mm", "--seed", str(seed), "--num-prompts", str(requests),
        "--random-mm-bucket-config", str({(SIDE, SIDE, 1): 1.0}),
        "--random-mm-limit-mm-per-prompt", '{"image": 1, "video": 0}',
        "--random-input-len", str(options.input_tokens),
        "--random-output-len", str(options.output_tokens),
        "--max-concurrency", str(options.concurrency), "--temperature", "0",
        "--percentile-metrics", "ttft", "--metric-percentiles", "50,90",
        "--disable-tqdm", "--save-detailed",
    ]  # fmt: skip
    with contextlib.redirect_stdout(None):
        result: dict[str, Any] = serve.main(parser.parse_args(arguments))
    if result["completed"] != requests:
        raise RuntimeError(f"{requests - result['completed']} requests failed: {result['errors']}")
    return result


def percentile_90(values: Sequence[float]) -> float:
    """Also of a single value, which `quantiles` refuses before Python 3.13."""
    return statistics.quantiles(values, n=100)[89] if len(values) > 1 else values[0]


@dataclass
class Measured:
    """A server and its measurements.

    Attributes:
        name: in the results; pruning: its "vispruner" option, None for the stock server.
        rates: requests per second in each round.
        first: seconds to the first token of every request.
        prompts: mean tokens per prompt in each round, as the server counts them.
    """

    name: str
    pruning: dict[str, Any] | None
    rates: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    prompts: list[float] = field(default_factory=list)

    def options(self, options: argparse.Namespace) -> list[str]:
        """Of the server's command line."""
        pruning = json.dumps({"vispruner": self.pruning})
        return [
            "--model", options.model, "--served-model-name", "model",
            "--no-enable-prefix-caching", "--limit-mm-per-prompt", '{"image": 1}',
            *options.server_options,
            *(() if self.pruning is None else ("--hf-overrides", pruning)),
        ]  # fmt: skip

    def round(self, server: engine_server.Server, options: argparse.Namespace, seed: int) -> None:
        """One timed run of the client."""
        before = server.metric("vllm:prompt_tokens_total")
        result = benchmark(server, options, options.requests, seed)
        tokens = server.metric("vllm:prompt_tokens_total") - before
        self.rates.append(result["request_throughput"])
        self.first += result["ttfts"]
        self.prompts.append(tokens / options.requests)

    def result(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "pruning": self.pruning,
            "prompt_tokens": round(statistics.median(self.prompts), 1),
            "requests_per_second": round(statistics.median(self.rates), 4),
            "requests_per_second_of_rounds": [round(rate, 4) for rate in self.rates],
            "first_token_seconds": {
                "median": round(statistics.median(self.first), 4),
                "p90": round(percentile_90(self.first), 4),
            },
        }


def measure(options: argparse.Namespace, logs: Path, console: Console) -> list[dict[str, Any]]:
    from support import engine_server

    measured = [Measured("stock", None), Measured(f"k = {options.k}", {"k": options.k})]
    servers: list[tuple[Measured, engine_server.Server]] = []
    with contextlib.ExitStack() as stack, Progress(console=console) as progress:
        steps = len(measured) * (2 + options.rounds)
        task = progress.add_task("", total=steps)
        for index, one in enumerate(measured):
            progress.update(task, description=f"starting {one.name:<12}")
            running = engine_server.running(
                one.options(options), logs / f"{index}.log", server_environment(), START
            )
            servers.append((one, stack.enter_context(running)))
            progress.advance(task)
        for number in range(1 + options.rounds):  # the first one warms up
            for one, server in servers if number % 2 else reversed(servers):
                progress.update(task, description=f"round {number}: {one.name:<12}")
                if number:
                    one.round(server, options, seed=number)
                else:
                    benchmark(server, options, options.concurrency, seed=0)
                progress.advance(task)
    return [one.result() for one in measured]


def server_parser(
    prog: str, description: str | None, concurrency: int, requests: int, least: int = 1
) -> argparse.ArgumentParser:
    """The options that serving.py and load.py share, with these defaults.

    Args:
        least: requests.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m models.{prog}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="a LLaVA or Qwen-VL to serve (default: a random LLaVA)")
    add("--k", type=positive, default=64, help="tokens per image (64)")
    add("--concurrency", type=positive, default=concurrency,
        help=f"requests in flight ({concurrency})")  # fmt: skip
    add("--requests", type=whole(least), default=requests, help=f"requests per run ({requests})")
    add("--output-tokens", type=positive, default=16, help="tokens per answer (16)")
    add("--no-file", action="store_true", help="print, but write no file")
    add("server_options", nargs="*", help="after --: options for both servers, such as -tp 2")
    return parser


def check_environment(parser: argparse.ArgumentParser) -> None:
    """Refuses an environment without the engine, in one line."""
    for name in ("openai", "vllm"):
        if importlib.util.find_spec(name) is None:
            parser.error(
                f"{name} is not installed: use the environment of constraints-vllm.txt "
                "(docs/CONTRIBUTING.md)"
            )


@contextlib.contextmanager
def served(options: argparse.Namespace, longest: int) -> Iterator[tuple[Path, str]]:
    """A folder for logs, and the model's description; the default model is the random LLaVA.

    Args:
        longest: longest prompt of that LLaVA, in tokens.
    """
    if not torch.cuda.is_available():
        import engine_shims

        engine_shims.install()
    description = options.model or "random LLaVA, 576 visual tokens"
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            options.model = str(random_llava(Path(folder)))
            options.server_options += ["--dtype", "float32", "--max-model-len", str(longest)]
        yield Path(folder), description


def write(name: str, setup: dict[str, Any], results: list[dict[str, Any]], **more: Any) -> Path:
    """Writes the results file, with the versions of the engine."""
    versions = provenance.describe()["versions"] | engine_versions()
    data = {"versions": versions, "setup": setup, "results": results, **more}
    return provenance.write(name, data)


def main() -> int:
    parser = server_parser("serving", __doc__, concurrency=8, requests=24)
    parser.add_argument("--rounds", type=positive, default=5, help="rounds per server (5)")
    parser.add_argument("--input-tokens", type=positive, default=12, help="text per prompt (12)")
    options = parser.parse_args()
    check_environment(parser)
    console = Console(stderr=True)
    with served(options, longest=1024) as (folder, description):
        results = measure(options, folder, console)
    stock, pruned = results
    speedup = pruned["requests_per_second"] / stock["requests_per_second"]
    earlier = stock["first_token_seconds"]["median"] / pruned["first_token_seconds"]["median"]
    for result in results:
        console.print(
            f"{result['name']:<8} {result['prompt_tokens']:.0f} prompt tokens, "
            f"{result['requests_per_second']:.2f} requests/s, first token after "
            f"{result['first_token_seconds']['median']:.2f} s"
        )
    console.print(f"{speedup:.2f} x the requests, first token {earlier:.2f} x earlier")
    if options.no_file:
        return 0
    setup = {
        "model": description,
        "concurrency": options.concurrency,
        "requests": options.requests,
        "rounds": options.rounds,
        "input_tokens": options.input_tokens,
        "output_tokens": options.output_tokens,
    }
    rounded = {"speedup": round(speedup, 3), "first_token_earlier": round(earlier, 3)}
    console.print(f"wrote {write('serving', setup, results, **rounded)}")
    return 0


def engine_versions() -> dict[str, str | None]:
    """Versions of vLLM and transformers."""
    names = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",)}
    return {name: _version(*packages) for name, packages in names.items()}


def _version(*packages: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


if __name__ == "__main__":
    sys.exit(main())
