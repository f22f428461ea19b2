"""`vispruner sweep --server`: a server in a thread, with the plugin's own checks of requests."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from vispruner import Budget, cli
from vispruner.embedded import scenes
from vispruner.sweep import Failed, Item, Measurement, Served
from vispruner.sweep.client import Client, RefusedError, ServerError
from vispruner.sweep.server import _last_tokens
from vispruner.vllm.config import Pruning
from vispruner.vllm.requests import taken_from

CHANCES = {"a": -0.5, "red": -1.0, "circle": -1.5}


@dataclass
class Fake:
    """A fake server: its behaviour, and the requests that it received.

    Attributes:
        pruning: its --hf-overrides, None if it does not prune.
        tokens: of a picture; needed: below this number the answer is another one.
        plugin, headers, logprobs: whether it has them.
        replies: path to a status and a body that are sent instead.
        delay: seconds before the first token; broken: a stream ends after it.
        refuses: a question that is answered with HTTP 400.
        large: a question about a picture with twice the tokens.
        dies: number of streams until it fails.
        asked: bodies of its requests; keys: their Authorization.
        inside, most_inside: streams at the same time, now and at most.
    """

    pruning: dict[str, Any] | None = field(default_factory=lambda: {"k": 32, "max_k": 196})
    tokens: int = 196
    needed: int = 20
    plugin: bool = True
    headers: bool = True
    logprobs: bool = True
    replies: dict[str, tuple[int, str]] = field(default_factory=dict)
    delay: float = 0.0
    broken: bool = False
    refuses: str = ""
    large: str = ""
    dies: int = 1000
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    inside: int = 0
    most_inside: int = 0
    url: str = ""

    @property
    def streams(self) -> list[dict[str, Any]]:
        return [body for body in self.asked if body.get("stream")]

    def budget(self, body: dict[str, Any]) -> Budget | None:
        """As the plugin reads it.

        Raises:
            ValueError: the request is refused.
        """
        if not self.plugin:
            return None
        asked = taken_from(SimpleNamespace(vllm_xargs=body["vllm_xargs"]))
        pruning = Pruning.of(SimpleNamespace(vispruner=self.pruning))
        if pruning is None:
            raise ValueError("vispruner: this engine does not prune: start it with --hf-overrides")
        return pruning.for_request({"vispruner": asked})


class Handler(BaseHTTPRequestHandler):
    fake: Fake

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, text: str, **headers: str) -> None:
        content = text.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.fake.keys.add(self.headers["Authorization"])
        if self.path in self.fake.replies:
            self.reply(*self.fake.replies[self.path])
        elif self.path == "/v1/models":
            self.reply(200, json.dumps({"data": [{"id": "scenes", "root": "/model"}]}))
        else:
            self.reply(200, json.dumps({"version": "0.32.0"}))

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake.asked.append(body)
        fake.keys.add(self.headers["Authorization"])
        if self.path in fake.replies:
            self.reply(*fake.replies[self.path])
            return
        question = body["messages"][0]["content"][1]["text"]
        if question == fake.refuses:
            self.reply(400, '{"error": {"message": "image too\\nsmall"}}')
            return
        if len(fake.streams) > fake.dies:
            self.reply(500, '{"error": {"message": "EngineDeadError"}}')
            return
        try:
            budget = fake.budget(body)
        except ValueError as error:
            self.reply(400, json.dumps({"error": {"message": str(error)}}))
            return
        before = fake.tokens * (2 if question == fake.large else 1)
        kept = before if budget is None else budget.count(before)
        headers = {}
        if fake.headers and budget is not None:
            headers = {
                "vispruner_tokens_before": str(before),
                "vispruner_tokens_kept": str(kept),
                "vispruner_budget": json.dumps(budget.arguments),
            }
        if body.get("stream"):
            self.stream("a red circle" if kept >= fake.needed else "a blue circle", headers)
            return
        found = None
        if len(body["messages"]) > 1 and fake.logprobs:
            loss = 0.0 if kept >= fake.needed else 1.0
            found = [None] + [
                {"7": {"logprob": CHANCES[t] - loss, "rank": 1 + (loss > 0), "decoded_token": t}}
                for t in body["messages"][1]["content"].split()
            ]
        self.reply(200, json.dumps({"choices": [], "prompt_logprobs": found}), **headers)

    def stream(self, answer: str, headers: dict[str, str]) -> None:
        fake = self.fake
        fake.inside += 1
        fake.most_inside = max(fake.most_inside, fake.inside)
        time.sleep(fake.delay)
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        deltas = [{"role": "assistant", "content": ""}]
        deltas += [{"content": f" {word}"} for word in answer.split()]
        for delta in deltas[: 2 if fake.broken else None]:
            self.wfile.write(f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n".encode())
        if not fake.broken:
            self.wfile.write(b"data: [DONE]\n\n")
        fake.inside -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # its end waits for them

    def handle_error(self, *_: Any) -> None:
        """A client that did not wait is not an error."""


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[Fake]:
    fake = Fake(**options)
    handler = type("Bound", (Handler,), {"fake": fake})
    server = _Server(("127.0.0.1", 0), handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serving() as running:
        yield running


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four questions about two pictures."""
    lines = []
    for number in range(2):
        scenes.draw(number).image.save(tmp_path / f"{number}.png")
        for question in ("what?", "which?"):
            line = {"image": f"{number}.png", "question": question, "answer": "red circle"}
            lines.append(json.dumps(line))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    return tmp_path / "questions.jsonl"


def run(url: str, data: Path, *arguments: str) -> int:
    out = data.parent / "out"
    return cli.main(["sweep", "--server", url, "--data", str(data), "-o", str(out), *arguments])


def results(data: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((data.parent / "out" / "results.json").read_text())
    return found


# ------------------------------------------------------------------------------------ one question
def served(fake: Fake, **options: Any) -> Served:
    return Served(fake.url, None, lambda item: scenes.draw(0).image, 16, timeout=5, **options)


def test_measurements(fake: Fake) -> None:
    fake.delay = 0.05
    subject = served(fake)
    assert (subject.name, subject.version, subject.unit) == ("scenes", "0.32.0", "k")
    assert (subject.most, subject.tokens, subject.method["method"]) == (196, 196, "vispruner")
    item = Item("a", b"a", "what?")
    (whole,) = subject.measure([item], None)
    assert isinstance(whole, Measurement)
    first = whole.milliseconds["first token"]
    assert whole == Measurement("a red circle", [], -1.0, 1.0, 196, None, {"first token": first})
    assert 50 <= first < 1000
    (pruned,) = subject.measure([item], Budget(8), [whole])
    assert isinstance(pruned, Measurement)
    # The log-probability is that of the unpruned model's answer, not of this one.
    assert (pruned.answer, pruned.log_probability) == ("a blue circle", -2.0)
    assert (pruned.first_choices, pruned.visual_tokens) == (0.0, 8)
    ask, forced = fake.asked[-2:]
    assert ask["vllm_xargs"] == {"vispruner_k": 8}
    assert (ask["temperature"], ask["max_completion_tokens"]) == (0, 16)
    assert forced["messages"][-1] == {"role": "assistant", "content": "a red circle"}
    assert forced["continue_final_message"]
    assert not forced["add_generation_prompt"]
    assert forced["vllm_xargs"] == {"vispruner_k": 8}


def test_the_unpruned_model_is_asked_for_all_tokens(fake: Fake) -> None:
    subject = served(fake)
    subject.measure([Item("a", b"a", "what?")], None)
    assert fake.streams[-1]["vllm_xargs"] == {"vispruner_k": 196}


def test_a_server_with_a_ratio() -> None:
    with serving(pruning={"ratio": 0.25, "max_ratio": 1.0, "method": "topk"}) as fake:
        subject = served(fake)
        assert (subject.unit, subject.most, subject.method) == ("ratio", 1.0, {"method": "topk"})
        (whole,) = subject.measure([Item("a", b"a", "what?")], None)
        assert isinstance(whole, Measurement)
        subject.measure([Item("a", b"a", "what?")], Budget(ratio=0.5, method="topk"), [whole])
        assert [body["vllm_xargs"] for body in fake.streams] == [
            {"vispruner_ratio": 1.0}, {"vispruner_ratio": 0.5}
        ]  # fmt: skip


def test_the_key_and_the_path(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert Client(f"{fake.url}/v1/", 5).get("/version") == {"version": "0.32.0"}
    assert Client(f"{fake.url}/more", 5)._path == "/more"
    assert fake.keys == {"Bearer secret"}


@pytest.mark.parametrize("key", ["sec\nret", "schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel"])
def test_a_key_that_no_header_can_hold(
    key: str, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ServerError, match="OPENAI_API_KEY has characters") as raised:
        Client(fake.url, 5)
    assert key not in str(raised.value)
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    Client(fake.url, 5).get("/version")
    assert fake.keys == {"Bearer secret"}


@pytest.mark.parametrize(
    ("url", "reply", "complaint"),
    [
        ("{}/\N{LATIN SMALL LETTER U WITH DIAERESIS}", None, "expected a URL of ASCII characters"),
        (f"http://{'a' * 64}.example", None, "cannot reach http"),
        ("{}", '{"data": 5}', "has no models"),
        ("{}", "[" * 100_000, "answers no JSON"),
    ],
)
def test_urls_and_answers_of_no_server(
    url: str, reply: str | None, complaint: str, fake: Fake
) -> None:
    if reply is not None:
        fake.replies["/v1/models"] = 200, reply
    with pytest.raises(ServerError, match=complaint) as raised:
        Served(url.format(fake.url), None, lambda item: scenes.draw(0).image, 16, timeout=5)
    assert "\n" not in str(raised.value)


def test_keys_depend_on_the_server_and_the_method(fake: Fake) -> None:
    item = Item("a", b"a", "what?")
    keys = {served(fake).key(item, budget) for budget in (None, Budget(8), Budget(8, method="mmr"))}
    fake.replies["/v1/models"] = 200, '{"data": [{"id": "other"}]}'
    keys.add(served(fake).key(item, None))
    fake.replies["/version"] = 200, '{"version": "0.33.0"}'
    keys.add(served(fake).key(item, None))
    keys.add(served(fake, concurrency=8).key(item, None))  # its times are those of another load
    assert len(keys) == 6


@pytest.mark.parametrize(
    ("pieces", "text", "count"),
    [
        (["?", " a", " red"], "a red", 2),
        (["?", "\n", "red"], "red", 1),
        (["?red"], "red", 0),  # a token of the question and the answer
        (["?", "blue"], "red", 0),
        (["red"], "", 0),
        ([], "red", 0),
    ],
)
def test_the_tokens_of_the_answer(pieces: list[str], text: str, count: int) -> None:
    prompt = [None, *({"1": {"decoded_token": piece}} for piece in pieces)]
    assert len(_last_tokens(prompt, text)) == count


# ------------------------------------------------------------------------------------- the command
def test_the_command(
    fake: Fake, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(fake.url, data, "--k", "8,32") == 0
    assert "k = 32 is the smallest setting" in capsys.readouterr().out
    found = results(data)
    assert [s["visual_tokens"] for s in found["settings"]] == [196, 8, 32]
    assert [s["right"] for s in found["settings"]] == [1, 0, 1]
    assert [s["loss"]["mean"] for s in found["settings"]] == [0, 100, 0]
    assert [s["log_probability"] for s in found["settings"]] == [-1, -2, -1]
    assert {s["cache_bytes"] for s in found["settings"]} == {None}
    assert found["about"]["version"] == "0.32.0"
    page = (data.parent / "out" / "report.html").read_text()
    assert "A server tells neither the bytes" in page
    assert "a blue circle" in page
    asked = len(fake.asked)
    assert run(fake.url, data, "--k", "8,32") == 0
    assert len(fake.asked) == asked + 2  # it connects, and measures nothing again


def test_settings_by_default(fake: Fake, data: Path) -> None:
    """Shares of the tokens, in the unit that the server takes."""
    assert run(fake.url, data, "--limit", "1") == 0
    assert [s["budget"]["k"] for s in results(data)["settings"][1:]] == [10, 20, 39, 65, 98]
    with serving(pruning={"ratio": 0.25, "max_ratio": 1.0, "method": "topk"}) as other:
        assert run(other.url, data, "--limit", "1") == 0
    settings = [s["budget"] for s in results(data)["settings"][1:]]
    assert settings[0] == {"ratio": 0.05, "method": "topk"}
    assert len(settings) == 5


def test_requests_at_once(fake: Fake, data: Path) -> None:
    fake.delay = 0.1
    assert run(fake.url, data, "--k", "8", "--batch-size", "3") == 0
    assert fake.most_inside == 3


def test_without_log_probabilities(
    fake: Fake, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.logprobs = False
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line in lines:
        del line["answer"]
    data.write_text("\n".join(map(json.dumps, lines)))
    assert run(fake.url, data, "--k", "8,32") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "loss: points, of equal answers" in said
    assert "this one gave no log-probabilities of a prompt either" in said
    found = results(data)["settings"]
    assert [s["loss"]["mean"] for s in found] == [0, 100, 0]
    assert {(s["log_probability"], s["first_choices"]) for s in found} == {(None, None)}


def test_pictures_that_the_server_cannot_take(
    fake: Fake, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.refuses, fake.large = "what?", "large?"
    line = {"image": "1.png", "question": "large?", "answer": "red circle"}
    bad = {"image": "none.png", "question": "which?", "answer": "red circle"}
    data.write_text("\n".join([data.read_text(), json.dumps(line), json.dumps(bad)]))
    assert run(fake.url, data, "--k", "32") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "skipped: 0.png: HTTP 400: image too small" in said
    assert "1.png: 392 visual tokens, of which the server retains at most 196: " in said
    assert "skipped: none.png: cannot read image none.png: no such file" in said
    assert [s["questions"] for s in results(data)["settings"]] == [2, 2]


def test_a_server_that_dies(fake: Fake, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The measurements so far stay, and the next run continues."""
    fake.dies = 3
    assert run(fake.url, data, "--k", "8") == 2
    assert capsys.readouterr().err.endswith("argument --server: HTTP 500: EngineDeadError\n")
    fake.dies = 1000
    fake.asked.clear()
    assert run(fake.url, data, "--k", "8") == 0
    assert len(fake.streams) == 8 - 3
    assert [s["right"] for s in results(data)["settings"]] == [1, 0]


@pytest.mark.parametrize(
    ("options", "arguments", "complaint"),
    [
        ({"plugin": False}, [], "does not say which tokens it retains: start vLLM with"),
        ({"headers": False}, [], "--middleware vispruner.vllm.headers.TokenHeaders"),
        ({"pruning": None}, [], "HTTP 400: vispruner: this engine does not prune"),
        ({"pruning": {"k": 64}}, [], 'retains at most 64 of 196 visual tokens; .* "max_k": 196'),
        ({"pruning": {"ratio": 0.5}}, [], 'retains at most 98 of 196 .* "max_ratio": 1.0'),
        ({}, ["--k", "8,197"], "argument --k: 197 is more than this server's 196"),
        ({}, ["--k", "0"], "argument --k: must be at least 1"),
        ({}, ["--ratio", "0.5"], "argument --ratio: this server takes --k"),
        ({"pruning": {"ratio": 0.5, "max_ratio": 1}}, ["--k", "8"], "this server takes --ratio"),
        ({}, ["--model", "another"], "has no model 'another', it has scenes"),
        ({"replies": {"/v1/models": (200, "<html>")}}, [], "answers no JSON: is it an OpenAI"),
        ({"replies": {"/v1/models": (200, "[]")}}, [], "answers no JSON object"),
        ({"replies": {"/v1/models": (200, "{}")}}, [], "has no models"),
        ({"replies": {"/v1/models": (401, '{"error": "Unauthorized"}')}}, [], "HTTP 401: Unauth"),
        ({"replies": {"/v1/models": (404, "")}}, [], "HTTP 404: Not Found"),
        (
            {"replies": {"/v1/chat/completions": (404, '{"detail": "Not Found here"}')}},
            [], "HTTP 404: Not Found here",
        ),
        ({"delay": 1.5}, ["--timeout", "1"], r"did not answer within 1 s \(--timeout\)"),
        ({"broken": True}, [], "broke off an answer"),
        ({}, ["--device", "cpu"], "argument --device: not allowed with --server"),
        ({}, ["--dtype", "float32"], "argument --dtype: not allowed with --server"),
        ({}, ["--attention", "eager"], "argument --attention: not allowed with --server"),
        ({}, ["--method", "topk"], "argument --method: not allowed with --server"),
        ({}, ["--trust-remote-code"], "argument --trust-remote-code: not allowed with --server"),
    ],
)  # fmt: skip
def test_errors_of_one_line(
    data: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    arguments: list[str],
    complaint: str,
) -> None:
    with serving(**options) as fake:
        assert run(fake.url, data, *arguments) == 2
    said = capsys.readouterr().err
    assert re.search(complaint, said), said
    assert len(said.splitlines()) == 1


def test_no_server(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert run(url, data) == 2
    assert f"argument --server: cannot reach {url}: " in capsys.readouterr().err
    for wrong in ("localhost:8000", "ftp://localhost", "http://", "http://host:port"):
        assert run(wrong, data) == 2
        said = capsys.readouterr().err
        assert f"expected a URL such as http://localhost:8000, got {wrong!r}" in said


def test_a_failing_server_is_no_fault_of_the_picture(fake: Fake) -> None:
    subject = served(fake)
    item = Item("a", b"a", "what?")
    fake.replies["/v1/chat/completions"] = 503, "overloaded"
    with pytest.raises(RefusedError, match="HTTP 503: overloaded"):
        subject.measure([item], None)
    fake.replies["/v1/chat/completions"] = 400, "vispruner: k must be at least 1"
    with pytest.raises(ServerError, match="vispruner: k must"):
        subject.measure([item, Item("b", b"b", "what?")], None)
    fake.replies["/v1/chat/completions"] = 413, "too large"
    assert subject.measure([item], None) == [Failed("HTTP 413: too large")]
