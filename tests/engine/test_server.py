"""The OpenAI-compatible server, driven by the official client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import openai
from support import engine_traffic
from support.engine_process import ForkedServer, environment
from support.engine_server import Server, running

pytestmark = pytest.mark.engine

K, MOST = 8, 48
PATCHES = 64
START = 300  # seconds that a busy machine may take to start a server


def options(checkpoint: Callable[[str], Path]) -> list[str]:
    return [
        "--model", str(checkpoint("llava")), "--served-model-name", "tiny",
        "--dtype", "float32", "--seed", "0",
        "--max-model-len", "512", "--max-num-seqs", "64", "--enforce-eager",
        "--limit-mm-per-prompt", '{"image": 2}',
        "--hf-overrides", json.dumps({"vispruner": {"k": K, "max_k": MOST}}),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def server(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    trusting = [*options(checkpoint), "--trust-request-mm-kwargs"]
    with running(trusting, log, environment(), START, ForkedServer) as server:
        yield server


def chat(*numbers: int, k: Any = None, **more: Any) -> dict[str, Any]:
    """Arguments of a chat completion about these pictures; k is in the field that needs trust."""
    call = engine_traffic.chat(*numbers, **more)
    if k is not None:
        call["extra_body"]["mm_processor_kwargs"] = {"vispruner": {"k": k}}
    return call


def text_tokens(server: Server, *numbers: int) -> int:
    """Tokens of the prompt about these pictures, without the visual ones."""
    usage = server.client().chat.completions.create(**chat(*numbers, k=1)).usage
    return int(usage.prompt_tokens) - len(numbers)


def test_usage_counts_the_retained_tokens(server: Server) -> None:
    client = server.client()
    for numbers, k, expected in (
        ((1,), None, K),
        ((1, 2), None, 2 * K),
        ((1,), 3, 3),
        ((1, 2), MOST, 2 * MOST),
    ):
        answer = client.chat.completions.create(**chat(*numbers, k=k))
        assert answer.usage.prompt_tokens == text_tokens(server, *numbers) + expected
        assert answer.usage.completion_tokens == 6
        assert answer.choices[0].message.content


def test_streaming(server: Server) -> None:
    client = server.client()
    whole = client.chat.completions.create(**chat(1, length=12))
    stream = client.chat.completions.create(
        **chat(1, length=12, stream=True, stream_options={"include_usage": True})
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len([c for c in chunks if c.choices]) > 2
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (MOST + 1, f"k={MOST + 1} is more than this engine's {MOST}"),
        (0, "k must be at least 1"),
        (-5, "k must be at least 1"),
        ("many", "k must be an int"),
        (2.5, "k must be an int"),
        ([8], "k must be an int"),
    ],
)
def test_a_bad_k_is_the_clients_fault(server: Server, k: Any, message: str) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match=message) as error:
        client.chat.completions.create(**chat(1, k=k))
    assert error.value.status_code == 400
    assert server.healthy()
    assert client.chat.completions.create(**chat(1, k=K)).choices[0].message.content


def with_fields(call: dict[str, Any], **fields: Any) -> dict[str, Any]:
    call["extra_body"]["vllm_xargs"] = fields
    return call


def test_k_in_vllm_xargs(server: Server) -> None:
    create = server.client().chat.completions.create
    for k in (1, 5, MOST):
        one, other = (create(**chat(1, k=k)), create(**with_fields(chat(1), vispruner_k=k)))
        assert one.choices[0].message.content == other.choices[0].message.content
        assert one.usage.prompt_tokens == other.usage.prompt_tokens
    assert create(**with_fields(chat(1), session_id="a")).usage.prompt_tokens == (
        create(**chat(1)).usage.prompt_tokens
    )


@pytest.mark.parametrize(
    ("k", "fields", "message"),
    [
        (None, {"vispruner_k": MOST + 1}, f"k={MOST + 1} is more than this engine's {MOST}"),
        (None, {"vispruner_k": 0}, "k must be at least 1"),
        (None, {"vispruner_k": "8"}, "k must be an int"),
        (None, {"vispruner_ratio": 0.5}, "unknown option 'ratio'"),
        (None, {"vispruner_top": 8}, "'vispruner_top', which nothing reads"),
        (None, {"visprunner_k": 8}, "'visprunner_k', which nothing reads"),
        (4, {"vispruner_k": 8}, "not in both"),
    ],
)
def test_bad_fields_are_the_clients_fault(
    server: Server, k: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=f"vispruner: .*{message}"):
        server.client().chat.completions.create(**with_fields(chat(1, k=k), **fields))


@pytest.mark.parametrize("field", ["vispruner_k", "vispruner"])
def test_fields_outside_of_xargs(server: Server, field: str) -> None:
    call = chat(1)
    call["extra_body"][field] = 4
    with pytest.raises(openai.BadRequestError, match=f"has '{field}', which nothing reads"):
        server.client().chat.completions.create(**call)


@pytest.mark.parametrize("fields", [[1], "x", 7])
def test_xargs_of_a_request_that_does_not_declare_them(server: Server, fields: Any) -> None:
    call = {"messages": engine_traffic.chat(1)["messages"], "vllm_xargs": fields}
    with pytest.raises(openai.BadRequestError, match="vllm_xargs must be an object"):
        server.client().post(f"{server.url}/tokenize", body=call, cast_to=object)


def test_k_of_a_pooling_request(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = tmp_path_factory.mktemp("pooling") / "log"
    pooling = [*options(checkpoint), "--runner", "pooling"]
    with running(pooling, log, environment(), START, ForkedServer) as pooled:

        def tokens(**fields: Any) -> int:
            call = {"messages": engine_traffic.chat(1)["messages"], "vllm_xargs": fields}
            answer: Any = pooled.client().post("/embeddings", body=call, cast_to=object)
            return int(answer["usage"]["prompt_tokens"])

        assert tokens() - tokens(vispruner_k=3) == K - 3
        with pytest.raises(openai.BadRequestError, match="k=999 is more than this engine's"):
            tokens(vispruner_k=999)


def test_many_users_at_once(server: Server) -> None:
    """200 requests in flight, with k from 1 to the cap, 16 pictures, and some refused requests."""
    text = text_tokens(server, 1)
    kinds = [(number, 1 + 7 * number % MOST) for number in range(200)]

    async def ask(client: openai.AsyncOpenAI, number: int, k: int) -> Any:
        wanted = MOST + 1 if number % 20 == 19 else k
        try:
            return await client.chat.completions.create(**chat(number % 16, k=wanted))
        except openai.BadRequestError as error:
            return error

    async def everyone() -> list[Any]:
        async with server.async_client(timeout=300) as client:
            return await asyncio.gather(*(ask(client, *kind) for kind in kinds))

    answers = asyncio.run(everyone())
    texts: dict[tuple[int, int], str] = {}
    for (number, k), answer in zip(kinds, answers, strict=True):
        if number % 20 == 19:
            assert isinstance(answer, openai.BadRequestError)
            continue
        assert answer.usage.prompt_tokens == text + k
        assert answer.usage.completion_tokens == 6
        # Equal requests have equal answers in any batch.
        own = texts.setdefault((number % 16, k), answer.choices[0].message.content)
        assert answer.choices[0].message.content == own
    assert server.healthy()


def test_clients_need_no_trust_for_k(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Without --trust-request-mm-kwargs, k is the only option that a client has."""
    log = tmp_path_factory.mktemp("closed") / "log"
    with running(options(checkpoint), log, environment(), START, ForkedServer) as closed:
        create = closed.client().chat.completions.create
        with pytest.raises(openai.BadRequestError, match="trust-request-mm-kwargs"):
            create(**chat(1, k=4))
        whole, few = create(**chat(1)), create(**with_fields(chat(1), vispruner_k=3))
        assert whole.usage.prompt_tokens - few.usage.prompt_tokens == K - 3
