"""Metrics: /metrics, the log, and the usage and headers of an answer."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import openai
import torch
from support.engine_process import TESTS, ForkedServer, environment
from support.engine_server import Server, running
from support.engine_traffic import chat, video_part

from vispruner.vllm.timing import Timing

pytestmark = pytest.mark.engine

START = 300  # seconds that a busy machine may take to start a server
K, MOST, PATCHES = 8, 48, 64
COUNTERS = ("images", "visual_tokens_before", "visual_tokens_kept")


def options(folder: Path, pruning: dict[str, Any], *more: str) -> list[str]:
    return [
        "--model", str(folder), "--served-model-name", "tiny", "--dtype", "float32",
        "--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager",
        "--hf-overrides", json.dumps({"vispruner": pruning}),
        "--enable-prompt-tokens-details", "--middleware", "vispruner.vllm.headers.TokenHeaders",
        *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def llava(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """As in production: one process serves, the engine runs in another one."""
    log = tmp_path_factory.mktemp("llava") / "log"
    own = options(
        checkpoint("llava"), {"k": K, "max_k": MOST}, "--limit-mm-per-prompt", '{"image": 3}'
    )
    with running(own, log, environment(), START, ForkedServer) as server:
        yield server


@pytest.fixture(scope="module")
def qwen(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path]]:
    """All processes share their counters; each batch is logged. The server, and its log."""
    folder = tmp_path_factory.mktemp("qwen")
    variables = environment(
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path_factory.mktemp("counters")),
        VLLM_LOGGING_LEVEL="INFO",
        VLLM_LOG_STATS_INTERVAL="0.001",
    )
    own = options(checkpoint("qwen25"), {"ratio": 0.25})
    with running(own, folder / "log", variables, START) as server:
        yield server, folder / "log"


def pruning(server: Server, k: Any = None) -> tuple[float, ...]:
    """The counters of images with this k, or of all images without k."""
    labels = {} if k is None else {"k": str(k)}
    return tuple(server.metric(f"vispruner_{name}_total", **labels) for name in COUNTERS)


def gained(now: tuple[float, ...], before: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(a - b for a, b in zip(now, before, strict=True))


def test_the_series_are_there_before_the_first_image(llava: Server) -> None:
    for name in COUNTERS:
        assert re.search(rf'^vispruner_{name}_total{{k="{K}",[^}}]*}} ', llava.metrics(), re.M)


def test_images_and_tokens_are_counted_by_k(llava: Server) -> None:
    create = llava.client().chat.completions.create
    start, of_3 = pruning(llava), pruning(llava, 3)
    create(**chat(1))
    create(**chat(1))  # its processed image comes from a cache
    create(**chat(1, 2, 1, k=3))
    create(**chat(4, k=MOST, n=2, temperature=0.5))  # two answers, one image
    create(**chat())
    assert gained(pruning(llava, 3), of_3) == (3, 3 * PATCHES, 3 * 3)
    assert gained(pruning(llava), start) == (6, 6 * PATCHES, 2 * K + 3 * 3 + MOST)


def test_what_is_refused_is_not_counted(llava: Server) -> None:
    create = llava.client().chat.completions.create
    start = pruning(llava)
    with pytest.raises(openai.BadRequestError, match="more than this engine's"):
        create(**chat(1, k=MOST + 1))
    with pytest.raises(openai.BadRequestError, match="maximum"):
        create(**chat(1, text="what " * 600))  # the prompt is built, and then too long
    with pytest.raises(openai.BadRequestError):
        create(**chat(1, temperature=-1))
    assert pruning(llava) == start


def test_beams_are_not_counted(llava: Server) -> None:
    """As documented: vLLM rebuilds the prompt of each step without what this package notes."""
    start = pruning(llava)
    beams = chat(1, n=2)
    beams["extra_body"]["use_beam_search"] = True
    assert len(llava.client().chat.completions.create(**beams).choices) == 2
    assert pruning(llava) == start


def test_clients_see_what_was_kept(llava: Server) -> None:
    raw = llava.client().chat.completions.with_raw_response
    answer = raw.create(**chat(1, 2, k=5))
    assert answer.headers["vispruner-tokens-before"] == str(2 * PATCHES)
    assert answer.headers["vispruner-tokens-kept"] == "10"
    budget = json.loads(answer.headers["vispruner-budget"])
    assert budget == {"k": 5, "method": "vispruner", "important_ratio": 0.5, "step": 8}
    usage = answer.parse().usage
    assert usage.prompt_tokens_details.model_extra["multimodal_tokens"] == {"image": 10}
    # The headers of a stream are sent before its first token.
    assert raw.create(**chat(1, stream=True)).headers["vispruner-tokens-kept"] == str(K)
    assert "vispruner-tokens-kept" not in raw.create(**chat()).headers


def test_videos_and_ratios(qwen: tuple[Server, Path]) -> None:
    server, _ = qwen
    video = {"modality": "video", "ratio": "0.25", "model_name": "tiny"}
    create = server.client().chat.completions.create
    create(**chat(1, 3))
    create(**chat(parts=[video_part(0)]))
    assert server.metric("vispruner_images_total", ratio="0.25") == 2
    assert server.metric("vispruner_videos_total", ratio="0.25") == 1
    before = server.metric("vispruner_visual_tokens_before_total", **video)
    assert server.metric("vispruner_visual_tokens_kept_total", **video) == before / 4 > 0


def test_the_time_of_workers_is_counted_where_processes_share_counters(
    qwen: tuple[Server, Path],
) -> None:
    server, log = qwen
    create = server.client().chat.completions.create
    names = [f"vispruner_{phase}_seconds_total" for phase in ("scoring", "selection")]
    start = [server.metric(name) for name in names]
    pictures = server.metric("vispruner_scored_pictures_total")
    begin = time.monotonic()
    create(**chat(9, 10))
    create(**chat(11))
    spent = time.monotonic() - begin
    assert server.metric("vispruner_scored_pictures_total") == pictures + 3
    for name, earlier in zip(names, start, strict=True):
        assert 0 < server.metric(name) - earlier < spent
    lines = re.findall(
        r"Pruned (\d+) pictures in [\d.]+ s: (\d+) visual tokens, (\d+) kept; "
        r"scoring [\d.]+ ms and selection [\d.]+ ms per picture", log.read_text(),
    )  # fmt: skip
    assert sum(int(n) for n, _, _ in lines) == pictures + 3
    assert all(0 < int(kept) < int(before) for _, before, kept in lines)


def test_a_worker_keeps_no_times_for_ever() -> None:
    """Neither the rank that counts nor one that duplicates its work."""
    for counted in (True, False):
        timing = Timing("of-a-test", torch.device("cpu"), counted)
        before = timing._counters.pictures.labels("of-a-test")._value.get()
        for _ in range(5):
            for phase in ("scoring", "selection"):
                with timing(phase):
                    pass
            timing.record(2, 128, 16)
        assert not (timing._clock and timing._clock.take())
        gained = timing._counters.pictures.labels("of-a-test")._value.get() - before
        assert gained == (10 if counted else 0)


def test_every_metric_of_the_dashboard_exists(qwen: tuple[Server, Path]) -> None:
    server, _ = qwen
    server.client().chat.completions.create(**chat(1))
    dashboard = json.loads((TESTS.parent / "examples" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for query in queries for name in re.findall(r"\b(?:vispruner_|vllm:)\w+", query)}
    there = set(re.findall(r"^([\w:]+)[{ ]", server.metrics(), re.M))
    assert len(queries) >= 6
    assert named <= there, named - there
    own = {name for name in there if name.startswith("vispruner_")}
    assert own <= named, own - named  # it shows every metric
