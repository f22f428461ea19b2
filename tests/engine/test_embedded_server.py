"""A server of the embedded model: `vispruner sweep --server`, and the client of the examples."""

from __future__ import annotations

import io
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("matplotlib")
pytest.importorskip("rich_argparse")

from PIL import Image
from support.engine_process import ForkedServer, environment
from support.engine_server import Server, running
from support.engine_traffic import image_part

from vispruner import Budget, cli, embedded, sweep

pytestmark = pytest.mark.engine

TOKENS, K = 196, 32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pruning = {"k": 64, "max_k": TOKENS}
    log = tmp_path_factory.mktemp("server") / "log"
    own = [
        "--served-model-name", "scenes", "--model", embedded.path(), "--dtype", "float32",
        "--max-model-len", "512", "--enforce-eager",
        "--hf-overrides", json.dumps({"vispruner": pruning}),
        "--middleware", "vispruner.vllm.headers.TokenHeaders",
    ]  # fmt: skip
    with running(own, log, environment(), 300, ForkedServer) as server:
        yield server


def results(folder: Path) -> tuple[Any, list[Any]]:
    """The report, and the measurements in their order."""
    with (folder / "measurements.jsonl").open() as lines:
        stored = [json.loads(line) for line in lines]
    return json.loads((folder / "results.json").read_text()), stored


def test_the_results_are_those_of_transformers(server: Server, tmp_path: Path) -> None:
    call = ["sweep", "--limit", "2", "--k", f"{K},{TOKENS}", "--batch-size", "4"]
    own, others = tmp_path / "server", tmp_path / "transformers"
    assert cli.main([*call, "--server", server.url, "-o", str(own)]) == 0
    assert cli.main([*call, "-o", str(others)]) == 0
    (report, found), (expected_report, expected) = results(own), results(others)
    assert report["about"]["model"] == "scenes"
    assert report["about"]["method"] == "vispruner 0.5 8"
    for name in ("budget", "visual_tokens", "questions", "pictures"):
        assert [s[name] for s in report["settings"]] == [
            s[name] for s in expected_report["settings"]
        ], name
    assert [s["visual_tokens"] for s in report["settings"]] == [TOKENS, K, TOKENS]
    assert report["settings"][2]["equal"] == 1  # all tokens are retained
    changed = []
    for one, other in zip(found, expected, strict=True):
        assert one["visual_tokens"] == other["visual_tokens"]
        assert one["milliseconds"]["first token"] > 0
        assert one["first_choices"] is not None
        if one["answer"] != other["answer"]:
            changed.append(one["visual_tokens"])
    # The features of the engine are not the same bits, which can change a close answer.
    assert changed in ([], [K], [K, K])


@pytest.mark.parametrize("k", [K, TOKENS])
def test_the_forced_answer_has_the_probability_of_the_generated_one(server: Server, k: int) -> None:
    (item, *_) = sweep.read(None, None, 1)
    image = Image.open(io.BytesIO(bytes(item.source)))
    subject = sweep.Served(server.url, None, lambda _: image, 16)
    (whole,) = subject.measure([item], None)
    assert isinstance(whole, sweep.Measurement)
    content = [image_part(image), {"type": "text", "text": item.question}]
    said = server.client().chat.completions.create(
        model="scenes",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        logprobs=True,
        extra_body={"vllm_xargs": {"vispruner_k": k}},
    )
    answer = said.choices[0].message.content.strip()
    *tokens, _ = said.choices[0].logprobs.content  # without its end
    (found,) = subject.measure([item], Budget(k), [replace(whole, answer=answer)])
    assert isinstance(found, sweep.Measurement)
    assert found.first_choices == 1
    expected = statistics.fmean(token.logprob for token in tokens)
    assert found.log_probability == pytest.approx(expected, abs=1e-5)


def test_the_servers_own_errors(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The messages of the plugin that the command reads."""
    call = ["sweep", "--server", server.url, "-o", str(tmp_path), "--limit", "1"]
    assert cli.main([*call, "--k", str(TOKENS + 1)]) == 2
    assert f"{TOKENS + 1} is more than this server's {TOKENS} (max_k)" in capsys.readouterr().err
    assert cli.main([*call, "--ratio", "0.5"]) == 2
    assert "argument --ratio: this server takes --k" in capsys.readouterr().err


def test_the_client_of_the_examples(server: Server) -> None:
    client = Path(__file__).resolve().parents[2] / "examples" / "vllm_client.py"
    done = subprocess.run(
        [sys.executable, client, f"{server.url}/v1", "scenes"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"k=(.+?): .*; (\d+) tokens\)", done.stdout)
    questions = len(found) // 3
    assert [k for k, _ in found] == [
        k for k in ("of the server", "32", "8") for _ in range(questions)
    ]
    prompt = [int(tokens) for _, tokens in found[::questions]]
    assert prompt[0] - prompt[1] == 64 - 32
    assert prompt[1] - prompt[2] == 32 - 8
