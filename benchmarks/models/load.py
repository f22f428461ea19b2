"""Measures an OpenAI server with and without pruning under mixed load; writes results/load.json.

The traffic is that of tests/engine/test_load.py: text and images, k from 1 to the cap, broken
images, and one client in ten that disconnects before its answer is complete; here no two requests
share an image. (vLLM's benchmark client sends the same options with every request, so it cannot
generate this mix.) The stock server gets the same requests without k. The servers run one after
the other; reported are requests per second, the time to the first token of complete answers, and
the peak use of the KV cache.

Without --model the servers load the random LLaVA of serving.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numeric import positive
from rich.console import Console

from . import serving

if TYPE_CHECKING:
    from support import engine_load, engine_server
    from support.engine_load import Job

# What needs the engine's environment is imported where it is used, and not for --help.
LEAST = 3  # requests; in shorter mixes none has an answer


async def _drive(
    server: engine_server.Server,
    warm: list[Job],
    jobs: list[Job],
    options: argparse.Namespace,
) -> tuple[float, float, list[engine_load.Outcome]]:
    """Seconds, the peak share of the KV cache in use, and the outcomes of the jobs.

    Args:
        warm: jobs that are sent first, to warm up.
    """
    from support import engine_load

    highest, done = 0.0, asyncio.Event()

    async def watch() -> None:
        nonlocal highest
        while not done.is_set():
            share = await asyncio.to_thread(server.metric, "vllm:kv_cache_usage_perc")
            highest = max(highest, share)
            await asyncio.sleep(0.5)

    async with server.async_client(timeout=3600) as client:
        await engine_load.ask_all(client, warm, 1, 8)
        watching = asyncio.create_task(watch())
        start = time.perf_counter()
        outcomes = await engine_load.ask_all(
            client, jobs, options.output_tokens, options.concurrency
        )
        seconds = time.perf_counter() - start
        done.set()
        await watching
    return seconds, highest, outcomes


def measure(
    name: str, pruning: dict[str, Any] | None, options: argparse.Namespace, log: Path
) -> dict[str, Any]:
    """Starts a server, sends it the jobs and stops it."""
    from support import engine_load, engine_server
    from support.engine_load import Job

    jobs = engine_load.mix(options.requests, options.max_k, pictures=4 * options.requests)
    if pruning is None:  # no cap, so nothing is refused
        jobs = [replace(job, k=None) for job in jobs]
    jobs = [job for job in jobs if job.kind != "refused"]
    warm = [Job("image", (1_000_000 + n,), None, "what") for n in range(8)]
    arguments = [
        "--model", options.model, "--served-model-name", "tiny", "--max-num-seqs",
        str(options.concurrency), "--limit-mm-per-prompt", '{"image": 2}',
        *options.server_options,
        *(() if pruning is None else ("--hf-overrides", json.dumps({"vispruner": pruning}))),
    ]  # fmt: skip
    with engine_server.running(
        arguments, log, serving.server_environment(), serving.START
    ) as server:
        counters = {
            "preemptions": "vllm:num_preemptions_total",
            "visual_tokens_before": "vispruner_visual_tokens_before_total",
            "visual_tokens_kept": "vispruner_visual_tokens_kept_total",
        }
        seconds, highest, outcomes = asyncio.run(_drive(server, warm, jobs, options))
        counted = {key: int(server.metric(metric)) for key, metric in counters.items()}
    first = [o.first for o in outcomes if o.prompt]
    return {
        "name": name,
        "pruning": pruning,
        "requests": len(jobs),
        "seconds": round(seconds, 2),
        "requests_per_second": round(len(jobs) / seconds, 4),
        "first_token_seconds": {
            "median": round(statistics.median(first), 4),
            "p90": round(serving.percentile_90(first), 4),
        },
        "kv_cache_highest": round(highest, 4),
        "prompt_tokens": round(statistics.mean(o.prompt for o in outcomes if o.prompt), 1),
        "complete": len(first),
        "refused": sum(o.status == 400 for o in outcomes),
        "failed": sum(o.status >= 500 for o in outcomes),
        **counted,
    }


def main() -> int:
    parser = serving.server_parser("load", __doc__, concurrency=64, requests=500, least=LEAST)
    parser.add_argument(
        "--max-k", type=positive, default=128, help="upper limit of k per request (128)"
    )
    options = parser.parse_args()
    if options.max_k < options.k:
        parser.error(f"argument --max-k: must be at least --k ({options.k}), got {options.max_k}")
    if options.max_k <= options.requests // 20:
        parser.error(
            "argument --max-k: must be above a 20th of --requests "
            f"({options.requests // 20}), got {options.max_k}"
        )
    serving.check_environment(parser)
    console = Console(stderr=True)
    pruning = {"k": options.k, "max_k": options.max_k}
    results: list[dict[str, Any]] = []
    with serving.served(options, longest=2048) as (folder, description):
        for name, setting in (
            ("stock", None),
            (f"k = {options.k}, 1 to {options.max_k}", pruning),
        ):
            result = measure(name, setting, options, folder / f"{len(results)}.log")
            console.print(json.dumps(result))
            results.append(result)
    if options.no_file:
        return 0
    setup = {
        "model": description,
        "concurrency": options.concurrency,
        "requests": results[0]["requests"],
        "output_tokens": options.output_tokens,
    }
    console.print(f"wrote {serving.write('load', setup, results)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
