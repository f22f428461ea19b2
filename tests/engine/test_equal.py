"""A pruned engine answers what the pruned model answers in transformers; nothing else changes.

The pictures are noise, whose patches do not resemble each other, so that rounding errors of the
features do not change the choice. `test_smooth` has pictures where they may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from support.engine_process import Engine
from support.engine_requests import Request, Transformers

pytestmark = pytest.mark.engine

FAMILIES = ("llava", "llava_next", "qwen25", "qwen3")
K = 8
ALL = 256  # no less than the tokens of any picture here
BLOCK = 32  # tokens of a block of the KV cache, the fewest that vLLM has on a CPU

ONE = Request("USER: {image}what is in the image? ASSISTANT:", [1])
OTHER = Request("USER: {image}what is in the image? ASSISTANT:", [2])
TWO = Request("USER: {image} and {image} describe the picture ASSISTANT:", [1, 2])
NONE = Request("USER: what is in the image? ASSISTANT:")
VIDEO = Request("USER: {video} describe ASSISTANT:", videos=[0])
BOTH = Request("USER: {video} and {image} in detail, {image} ASSISTANT:", [1, 3], [0])


def requests_of(family: str) -> list[Request]:
    videos = [VIDEO, BOTH] if family.startswith("qwen") else []
    return [ONE, OTHER, TWO, NONE, *videos]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def transformers_of(checkpoint: Callable[[str], Path]) -> Callable[[str], Transformers]:
    known: dict[str, Transformers] = {}

    def of(family: str) -> Transformers:
        if family not in known:
            known[family] = Transformers(family, checkpoint(family))
        return known[family]

    return of


def limits(family: str) -> dict[str, int]:
    return {"image": 2, "video": 1} if family.startswith("qwen") else {"image": 2}


def asked(run: Engine, family: str, requests: list[Request]) -> list[Any]:
    return run([request.for_engine(family) for request in requests])


def test_keeping_all_is_plain_vllm(engine: Callable[..., Engine], family: str) -> None:
    requests = requests_of(family)
    common = {"limit_mm_per_prompt": limits(family)}
    plain = asked(engine(family, plugin=False, **common), family, requests)
    idle = asked(engine(family, **common), family, requests)
    assert idle == plain  # without the option: the same bits, logprobs included
    pruned = engine(family, {"k": K, "max_k": ALL}, **common)
    whole = asked(pruned, family, [replace(request, k=ALL) for request in requests])
    assert [(a.prompt, a.tokens) for a in whole] == [(a.prompt, a.tokens) for a in plain]
    fewer = asked(pruned, family, requests)
    assert [len(a.prompt) < len(b.prompt) for a, b in zip(fewer, plain, strict=True)] == [
        bool(request.images or request.videos) for request in requests
    ]


def test_fewer_tokens_are_those_of_transformers(
    engine: Callable[..., Engine], transformers_of: Callable[[str], Transformers], family: str
) -> None:
    requests = requests_of(family)
    pruned = engine(family, {"k": K, "max_k": ALL}, limit_mm_per_prompt=limits(family))
    found = asked(pruned, family, requests)
    expected = transformers_of(family)(requests, K)
    assert [(len(a.prompt), a.tokens) for a in found] == expected
    # It has been looked at: other tokens give other answers.
    other = asked(pruned, family, [replace(ONE, k=K - 1)])
    assert other[0].tokens != found[0].tokens


@pytest.mark.parametrize("family", ["llava", "qwen25", "qwen3"])
def test_chunked_prefill_and_prefix_cache(
    engine: Callable[..., Engine], transformers_of: Callable[[str], Transformers], family: str
) -> None:
    """Prompts are computed 13 tokens a step, and their beginnings come from a cache of blocks."""
    chunked = engine(
        family,
        {"k": BLOCK, "max_k": ALL},
        limit_mm_per_prompt=limits(family),
        enable_chunked_prefill=True,
        long_prefill_token_threshold=13,
        max_num_batched_tokens=260,
        enable_prefix_caching=True,
        block_size=BLOCK,
    )

    def check(*requests: Request) -> list[int]:
        """The answers are those of transformers; tokens that came from the cache, of each."""
        found = asked(chunked, family, list(requests))
        expected = transformers_of(family)(requests, BLOCK)
        assert [(len(a.prompt), a.tokens) for a in found] == expected
        return [answer.cached for answer in found]

    requests = [ONE, TWO, OTHER]
    if family.startswith("qwen"):
        requests.append(replace(BOTH, k=5))
    assert set(check(*requests)) == {0}
    assert all(check(*requests))
    # The first block ends within the image: its last tokens are computed anew, at their places.
    assert check(replace(ONE, text="USER: {image}describe the picture in detail")) == [BLOCK]
    # The same image pruned in another way is another image.
    assert check(replace(ONE, k=BLOCK + 1)) == [0]


@pytest.mark.parametrize("family", ["llava", "qwen25", "qwen3"])
def test_tensor_parallel(
    engine: Callable[..., Engine], transformers_of: Callable[[str], Transformers], family: str
) -> None:
    requests = [ONE, TWO, replace(OTHER, k=20)]
    if family.startswith("qwen"):
        requests.append(BOTH)
    parallel = engine(
        family,
        {"k": K, "max_k": ALL},
        limit_mm_per_prompt=limits(family),
        tensor_parallel_size=2,
    )
    found = asked(parallel, family, requests)
    expected = transformers_of(family)(requests, K)
    assert [(len(a.prompt), a.tokens) for a in found] == expected


def test_ratio(
    engine: Callable[..., Engine], transformers_of: Callable[[str], Transformers]
) -> None:
    """A share of each image, whatever its size."""
    pruned = engine(
        "qwen25",
        {"ratio": 0.25, "important_ratio": 0.75, "step": 4},
        limit_mm_per_prompt=limits("qwen25"),
    )
    found = asked(pruned, "qwen25", [ONE, TWO, BOTH])
    expected = transformers_of("qwen25")(
        [ONE, TWO, BOTH], None, ratio=0.25, important_ratio=0.75, step=4
    )
    assert [(len(a.prompt), a.tokens) for a in found] == expected


def test_many_images_at_once(
    engine: Callable[..., Engine], transformers_of: Callable[[str], Transformers]
) -> None:
    """More images in a step than the encoder takes: it gets them in batches, with mixed k."""
    requests = [
        Request("USER: {image} {image}" + " what" * n, [n, n + 9], k=3 + n) for n in range(8)
    ]
    pruned = engine(
        "llava", {"k": K, "max_k": ALL}, limit_mm_per_prompt=limits("llava"),
        max_num_batched_tokens=256, max_num_seqs=8,
    )  # fmt: skip
    found = asked(pruned, "llava", requests)
    expected = transformers_of("llava")(requests, None)
    assert [(len(a.prompt), a.tokens) for a in found] == expected


def test_engine_in_a_process_of_its_own(
    engine: Callable[..., Engine], transformers_of: Callable[[str], Transformers]
) -> None:
    """The positions are written in another process than the prompt is laid out in."""
    apart = engine("qwen25", {"k": K}, limit_mm_per_prompt=limits("qwen25"), apart=True)
    found = asked(apart, "qwen25", [ONE, TWO])
    expected = transformers_of("qwen25")([ONE, TWO], K)
    assert [(len(a.prompt), a.tokens) for a in found] == expected
