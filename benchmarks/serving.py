"""Measures an OpenAI server with and without pruning and writes results/serving.json.

Both servers run for the whole time and take turns, round by round, so that a slow moment of the
machine hits both. A round sends a number of requests, each with an image of its own, at a fixed
concurrency; reported are requests per second and the time to the first token.

Without --model the servers load a random LLaVA of a size that a CPU can serve: 576 visual tokens an
image, and a language model that costs about ten times what its vision tower does.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import importlib.metadata
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import provenance
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
# The tests know how to write a whole checkpoint, and what vLLM's CPU build needs beside itself.
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "support" / "engine_site")]
from support import engine_models, engine_process, engine_server  # noqa: E402

SIDE = 336
START = 600  # seconds that a server may take to start


def random_llava(folder: Path) -> Path:
    """LLaVA-1.5's tower input and token count, with few and narrow layers."""
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
    threads = str(len(os.sched_getaffinity(0)))
    return engine_process.environment(OMP_NUM_THREADS=threads, VLLM_CPU_KVCACHE_SPACE="2")


@dataclass
class Measured:
    """A server and what was measured of it.

    Attributes:
        name: in the results; pruning: its "vispruner" option, None for the stock server.
        seconds: of each round; first: seconds to the first token of every request.
        prompts: tokens of every prompt, as the server counts them.
    """

    name: str
    pruning: dict[str, Any] | None
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)

    def options(self, options: argparse.Namespace) -> list[str]:
        """Of the server's command line."""
        pruning = json.dumps({"vispruner": self.pruning})
        return [
            "--model", options.model, "--served-model-name", "model",
            "--no-enable-prefix-caching", "--limit-mm-per-prompt", '{"image": 1}',
            *options.server_options,
            *(() if self.pruning is None else ("--hf-overrides", pruning)),
        ]  # fmt: skip

    async def round(
        self, server: engine_server.Server, requests: list[dict[str, Any]], concurrency: int
    ) -> None:
        """Sends the requests, `concurrency` of them at a time."""
        gate = asyncio.Semaphore(concurrency)
        async with server.async_client(timeout=3600) as client:

            async def one(request: dict[str, Any]) -> None:
                async with gate:
                    start = time.perf_counter()
                    stream = await client.chat.completions.create(**request)
                    seen = False
                    async for chunk in stream:
                        if not seen and chunk.choices:  # sent with the first token
                            seen = True
                            self.first.append(time.perf_counter() - start)
                        if chunk.usage is not None:
                            self.prompts.append(chunk.usage.prompt_tokens)

            start = time.perf_counter()
            await asyncio.gather(*map(one, requests))
            self.seconds.append(time.perf_counter() - start)

    def forget(self) -> None:
        for values in (self.seconds, self.first, self.prompts):
            values.clear()

    def result(self, requests: int) -> dict[str, Any]:
        rates = [requests / seconds for seconds in self.seconds]
        quantiles = statistics.quantiles(self.first, n=100)
        return {
            "name": self.name,
            "pruning": self.pruning,
            "prompt_tokens": statistics.median(self.prompts),
            "requests_per_second": round(statistics.median(rates), 4),
            "requests_per_second_of_rounds": [round(rate, 4) for rate in rates],
            "first_token_seconds": {
                "median": round(statistics.median(self.first), 4),
                "p90": round(quantiles[89], 4),
            },
        }


def request_of(number: int, tokens: int) -> dict[str, Any]:
    """A question about an image that nobody has asked about before."""
    coarse = np.random.default_rng(number).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(data, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what is in the image? describe the picture in detail"},
    ]
    return {
        "model": "model", "messages": [{"role": "user", "content": content}], "temperature": 0,
        "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True},
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip


def measure(options: argparse.Namespace, logs: Path, console: Console) -> list[dict[str, Any]]:
    measured = [Measured("stock", None), Measured(f"k = {options.k}", {"k": options.k})]
    servers: list[tuple[Measured, engine_server.Server]] = []
    with contextlib.ExitStack() as stack, Progress(console=console) as progress:
        steps = len(measured) * (2 + options.rounds)
        task = progress.add_task("", total=steps)
        for index, one in enumerate(measured):
            progress.update(task, description=f"starting {one.name:<12}")
            serving = engine_server.running(
                one.options(options), logs / f"{index}.log", server_environment(), START
            )
            servers.append((one, stack.enter_context(serving)))
            progress.advance(task)
        number = 0
        for turn in range(1 + options.rounds):  # the first one warms up
            count = options.requests if turn else options.concurrency
            requests = [request_of(number + i, options.output_tokens) for i in range(count)]
            number += count
            for one, server in servers if turn % 2 else reversed(servers):
                progress.update(task, description=f"round {turn}: {one.name:<12}")
                asyncio.run(one.round(server, requests, options.concurrency))
                if not turn:
                    one.forget()
                progress.advance(task)
    return [one.result(options.requests) for one in measured]


def server_parser(description: str | None, concurrency: int, requests: int) -> Any:
    """The options of a benchmark that serves with and without pruning, with these defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a LLaVA or Qwen-VL to serve (default: a random LLaVA)")
    add("--k", type=int, default=64, help="tokens per image (64)")
    add(
        "--concurrency",
        type=int,
        default=concurrency,
        help=f"requests in flight ({concurrency})",
    )
    add("--requests", type=int, default=requests, help=f"requests per run ({requests})")
    add("--output-tokens", type=int, default=16, help="tokens per answer (16)")
    add("--no-file", action="store_true", help="print, but write no file")
    add("server_options", nargs="*", help="after --: options of both servers, such as -tp 2")
    return parser


@contextlib.contextmanager
def served(options: argparse.Namespace, longest: int) -> Iterator[tuple[Path, str]]:
    """A folder for logs and the model's description, with the random LLaVA as the default model.

    Args:
        longest: prompt of that LLaVA, in tokens.
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
    """The results file, with the versions of the engine."""
    versions = provenance.describe()["versions"] | engine_versions()
    data = {"versions": versions, "setup": setup, "results": results, **more}
    return provenance.write(name, data)


def main() -> int:
    parser = server_parser(__doc__, concurrency=8, requests=24)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each server (5)")
    options = parser.parse_args()
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
        "output_tokens": options.output_tokens,
    }
    rounded = {"speedup": round(speedup, 3), "first_token_earlier": round(earlier, 3)}
    console.print(f"wrote {write('serving', setup, results, **rounded)}")
    return 0


def engine_versions() -> dict[str, str | None]:
    """Of the engine and what it loads models with."""
    names = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",)}
    return {name: _version(*packages) for name, packages in names.items()}


def _version(*packages: str) -> str | None:
    """Of the first of these distributions that is installed."""
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


if __name__ == "__main__":
    sys.exit(main())
