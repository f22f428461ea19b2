"""500 mixed requests at once: every answer equals that of the same request alone."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from support.engine_load import LONGER, Job, Outcome, ask_all, mix
from support.engine_process import environment
from support.engine_server import Server, running

pytestmark = [pytest.mark.engine, pytest.mark.slow]

START = 300  # seconds that a busy machine may take to start a server
REQUESTS, CONCURRENCY, LENGTH = 500, 64, 12
K, PATCHES = 8, 64


def asked(server: Server, jobs: list[Job], concurrency: int) -> list[Outcome]:
    async def all_of_them() -> list[Outcome]:
        async with server.async_client(timeout=600) as client:
            return await ask_all(client, jobs, LENGTH, concurrency)

    return asyncio.run(all_of_them())


def idle(server: Server) -> dict[str, float]:
    """The engine's running and waiting requests and KV cache use, once idle or after half a
    minute."""
    until = time.monotonic() + 30
    while True:
        names = ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
        held = {name: server.metric(f"vllm:{name}") for name in names}
        if not any(held.values()) or time.monotonic() > until:
            return held
        time.sleep(0.2)


def counted(server: Server) -> dict[int, tuple[float, ...]]:
    """Images, visual tokens before and after pruning, for each k."""
    names = ("images", "visual_tokens_before", "visual_tokens_kept")
    return {
        k: tuple(server.metric(f"vispruner_{name}_total", k=str(k)) for name in names)
        for k in range(1, PATCHES + 2)
    }


def test_mixed_load(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    options = [
        "--model", str(checkpoint("llava")), "--served-model-name", "tiny", "--dtype", "float32",
        "--max-model-len", "512", "--max-num-seqs", "64", "--enforce-eager",
        "--limit-mm-per-prompt", '{"image": 2}',
        "--hf-overrides", json.dumps({"vispruner": {"k": K, "max_k": PATCHES}}),
    ]  # fmt: skip
    jobs = mix(REQUESTS, PATCHES)
    log = tmp_path_factory.mktemp("load") / "log"
    with running(options, log, environment(VLLM_SERVER_DEV_MODE="1"), START) as server:
        outcomes = asked(server, jobs, CONCURRENCY)
        assert not any(idle(server).values()), idle(server)
        # The engine has dropped the long answers of disconnected clients.
        made = server.metric("vllm:generation_tokens_total")
        assert made < LENGTH * (REQUESTS + LONGER * REQUESTS // 40)
        counts = counted(server)

        expected: dict[int, Counter[str]] = {k: Counter() for k in counts}
        maybe = {job.k: len(job.images) for job in jobs if isinstance(job.leaves, float)}
        complete = []
        for job, outcome in zip(jobs, outcomes, strict=True):
            if job.kind in ("broken", "refused"):
                assert outcome.status == 400, (job, outcome)
                continue
            assert outcome.status == 200 or isinstance(job.leaves, float), (job, outcome)
            if not isinstance(job.leaves, float):
                expected[job.k or K]["images"] += len(job.images)
            if job.leaves is None:
                complete.append((job, outcome))
        assert len(maybe) == REQUESTS // 20
        for k, found in counts.items():
            images = found[0] if k in maybe else expected[k]["images"]
            assert images in (0, maybe.get(k, images))
            assert found == (images, images * PATCHES, images * k), k

        # Alone, and recomputed: the images and prompts of the load are not cached any more.
        server.post("/reset_prefix_cache")
        server.post("/reset_mm_cache")
        server.post("/reset_encoder_cache")
        alone = asked(server, [job for job, _ in complete], 1)
        different = [
            (job, outcome.text, own.text)
            for (job, outcome), own in zip(complete, alone, strict=True)
            if (outcome.text, outcome.prompt) != (own.text, own.prompt)
        ]
        assert not different, f"{len(different)} of {len(complete)}: {different[:3]}"
        assert len({outcome.text for _, outcome in complete}) > len(complete) // 4
        assert server.healthy()
