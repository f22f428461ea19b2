"""A pruned engine gives the answers of the pruned model in transformers; nothing else changes.

The pictures are noise, whose patches are not similar, so rounding errors of the features do not
change the tokens. In `test_smooth` they may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from support.engine_models import eagle
from support.engine_process import Engine
from support.engine_requests import (
    ALL,
    BOTH,
    LARGE,
    NONE,
    ONE,
    OTHER,
    TALL,
    THIN,
    TWO,
    WIDE,
    K,
    Request,
    Transformers,
    asked,
    limits,
    requests_of,
)

pytestmark = pytest.mark.engine

LLAVAS = ("llava", "llava_next", "llava_onevision", "internvl")  # without separate positions
QWENS = ("qwen2", "qwen25", "qwen3", "qwen3_moe", "qwen35", "qwen35_moe")
FAMILIES = (*LLAVAS, *QWENS)
BLOCK = 32  # tokens per block of the KV cache, the minimum of vLLM on a CPU
TOKEN = 2**10  # bytes per token in the KV cache, for all models here


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests without families run for all of them."""
    named = (mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not any("family" in names for names in named):
        metafunc.parametrize("family", FAMILIES)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen25", "qwen3"])
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
    if family != "llava_next":  # tiles="all" with every token is refused in transformers
        requests = [*requests, replace(ONE, k=ALL)]
    pruned = engine(family, {"k": K, "max_k": ALL}, limit_mm_per_prompt=limits(family))
    found = asked(pruned, family, requests)
    expected = transformers_of(family)(requests, K)
    assert [(len(a.prompt), a.tokens) for a in found] == expected
    # The test depends on the image: other tokens give other answers.
    other = asked(pruned, family, [replace(ONE, k=K - 1)])
    assert other[0].tokens != found[0].tokens


@pytest.mark.parametrize(
    ("family", "runner"),
    [*((family, "V1") for family in FAMILIES), *((f, "V2") for f in ("llava", *QWENS[1:3]))],
)
def test_chunked_prefill_prefix_cache_and_preemption(
    engine: Callable[..., Engine],
    transformers_of: Callable[[str], Transformers],
    family: str,
    runner: str,
) -> None:
    """Prompts are computed in steps of 13 tokens, and their prefixes come from a cache of few
    blocks."""
    tiles = 5 if family in ("llava_next", "llava_onevision") else 1  # of the picture in ONE
    k, less = (8, 5) if family == "internvl" else (BLOCK, 20)  # 7 tiles, each of 16 tokens
    cached = not family.startswith("qwen35")  # of which `test_linear_attention` has a cache
    chunked = engine(
        family,
        {"k": k, "max_k": ALL},
        runner=runner,
        limit_mm_per_prompt=limits(family),
        enable_chunked_prefill=True,
        long_prefill_token_threshold=13,
        max_num_batched_tokens=260,
        max_model_len=384,
        enable_prefix_caching=cached,
        block_size=BLOCK,
        **({"kv_cache_memory_bytes": (24 if tiles > 1 else 14) * BLOCK * TOKEN} if cached else {}),
        disable_log_stats=False,
    )

    def check(*requests: Request, length: int = 16) -> list[int]:
        """Checks the answers against transformers; returns the number of cached tokens of each."""
        found = asked(chunked, family, list(requests), length)
        expected = transformers_of(family)(requests, k, length)
        assert [(len(a.prompt), a.tokens) for a in found] == expected
        return [answer.cached for answer in found]

    requests = [ONE, replace(TWO, k=less), OTHER]
    if family.startswith("qwen"):
        requests.append(replace(BOTH, k=5))
    assert set(check(*requests)) == {0}
    assert all(check(*requests)) == cached
    # A block ends within the image: its last tokens are recomputed, at their positions.
    other = replace(ONE, text="USER: {image}describe the picture in detail")
    assert check(other) == [tiles * BLOCK if cached else 0]
    # A different pruning of the same image is not in the cache.
    assert check(replace(ONE, k=k + 1)) == [0]
    # More than the cache holds: requests are preempted while they are answered.
    assert chunked.count("vllm:num_preemptions") == 0
    check(*(Request("USER: {image}" + " what" * (n + 40), [n]) for n in range(4)), length=40)
    assert (chunked.count("vllm:num_preemptions") > 0) == cached


@pytest.mark.parametrize(
    ("family", "runner", "encoder"),
    [
        ("llava", "V2", "weights"),
        ("llava_next", "V1", "weights"),
        ("llava_onevision", "V1", "weights"),
        ("internvl", "V1", "weights"),
        *((f, "V2", "weights") for f in QWENS),
        ("qwen25", "V1", "data"),
        ("qwen3", "V1", "data"),
    ],
)
def test_tensor_parallel(
    engine: Callable[..., Engine],
    transformers_of: Callable[[str], Transformers],
    family: str,
    runner: str,
    encoder: str,
) -> None:
    """The encoder's heads (weights) or its pictures (data) are split between the ranks."""
    requests = [ONE, TWO, replace(OTHER, k=20)]
    if family.startswith("qwen"):
        requests.append(BOTH)
    parallel = engine(
        family,
        {"k": K, "max_k": ALL},
        runner=runner,
        limit_mm_per_prompt=limits(family),
        tensor_parallel_size=2,
        mm_encoder_tp_mode=encoder,
    )
    found = asked(parallel, family, requests)
    expected = transformers_of(family)(requests, K)
    assert [(len(a.prompt), a.tokens) for a in found] == expected


@pytest.mark.parametrize("family", LLAVAS)
def test_pipeline_parallel(
    engine: Callable[..., Engine], transformers_of: Callable[[str], Transformers], family: str
) -> None:
    """On runner V2: vLLM's V1 fails here on a CPU, pruned or not."""
    piped = engine(family, {"k": K, "max_k": ALL}, runner="V2", pipeline_parallel_size=2)
    requests = [ONE, TWO, replace(OTHER, k=20), NONE]
    found = asked(piped, family, requests)
    expected = transformers_of(family)(requests, K)
    assert [(len(a.prompt), a.tokens) for a in found] == expected


_NGRAMS = {
    "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1,
}  # fmt: skip
_LORA = {"enable_lora": True, "max_lora_rank": 8}


def test_lora_and_speculative_decoding(
    engine: Callable[..., Engine],
    transformers_of: Callable[..., Transformers],
    family: str,
    tmp_path: Path,
) -> None:
    """An adapter of the language model, and drafts from n-grams of the prompt and the answer."""
    requests = [ONE, TWO, NONE]
    common: dict[str, Any] = {"limit_mm_per_prompt": limits(family), "disable_log_stats": False}

    def check(run: Engine, length: int, **adapted: Any) -> list[list[int]]:
        found = asked(run, family, requests, length, **adapted)
        expected = transformers_of(family, adapted=bool(adapted))(requests, K, length)
        assert [(len(a.prompt), a.tokens) for a in found] == expected
        return [answer.tokens for answer in found]

    refused = family.endswith("moe") or family == "llava_onevision"  # adapters of these are
    drafting = engine(
        family, {"k": K}, speculative_config=_NGRAMS, **({} if refused else _LORA), **common
    )
    plain = check(drafting, 100)
    assert drafting.count("vllm:spec_decode_num_accepted_tokens") > 0
    if not refused:
        adapter = transformers_of(family).save_adapter(tmp_path)
        adapted = check(drafting, 16, adapter=adapter)
        assert all(a != b[:16] for a, b in zip(adapted, plain, strict=True))


@pytest.mark.parametrize("runner", ["V1", "V2"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_drafts_of_a_model(
    engine: Callable[..., Engine],
    checkpoint: Callable[[str], Path],
    transformers_of: Callable[[str], Transformers],
    family: str,
    runner: str,
    tmp_path: Path,
) -> None:
    """The drafts of an EAGLE model, accepted or not, do not change answers."""
    drafting = engine(
        family,
        {"k": K},
        runner=runner,
        speculative_config={
            "method": "eagle", "model": str(eagle(tmp_path, checkpoint(family))),
            "num_speculative_tokens": 2,
        },
        disable_log_stats=False,
    )  # fmt: skip
    requests = [ONE, TWO, NONE]
    found = asked(drafting, family, requests, 44)
    expected = transformers_of(family)(requests, K, 44)
    assert [(len(a.prompt), a.tokens) for a in found] == expected
    drafted = drafting.count("vllm:spec_decode_num_draft_tokens")
    accepted = drafting.count("vllm:spec_decode_num_accepted_tokens")
    assert 0 < accepted < drafted


def last_positions(record: Path) -> torch.Tensor:
    """(3, L) of the last prompt of an engine, after its last step."""
    positions: torch.Tensor = torch.load(max(record.glob("positions*.pt")))
    return positions


@pytest.mark.parametrize("family", ["qwen35_linear", "qwen35_moe_linear"])
def test_linear_attention(engine: Callable[..., Engine], family: str, tmp_path: Path) -> None:
    """A prefix cache with the states of linear attention, which need bfloat16 on a CPU.

    Features in 16 bits differ from those of transformers, so the engine is compared with itself.
    Answers hardly depend on the positions here, so these are compared as well.
    """
    # A block of the cache, 1152 tokens with their states, ends within the first image.
    request = Request("USER:" + " what" * 1120 + "{image}{image} ASSISTANT:", [1, 2], k=64)
    common: dict[str, Any] = {
        "dtype": "bfloat16", "max_model_len": 2048, "limit_mm_per_prompt": limits(family)
    }  # fmt: skip
    pruning = {"k": K, "max_k": ALL}
    plain, filled = tmp_path / "plain", tmp_path / "filled"
    (whole,) = asked(engine(family, pruning, record=plain, **common), family, [request], 8)
    cached = engine(
        family, pruning, record=filled, **common, enable_prefix_caching=True,
        long_prefill_token_threshold=500,
    )  # fmt: skip
    for again in (False, True):
        (found,) = asked(cached, family, [request], 8)
        assert found.tokens == whole.tokens
        assert (found.cached > 1000) == again
        computed = slice(found.cached, None)
        assert last_positions(filled)[:, computed].equal(last_positions(plain)[:, computed])
    (fewer,) = asked(cached, family, [replace(request, k=BLOCK)], 8)
    assert fewer.cached == 0  # another pruning of the first image is not cached
    assert len(whole.prompt) < 1120 + 2 * 64 + 50


def test_ratio(
    engine: Callable[..., Engine], transformers_of: Callable[[str], Transformers]
) -> None:
    """A share of each image, for any size."""
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


@pytest.mark.parametrize(
    "options", [{"method": "scope", "scope_alpha": 0.5}, {"method": "mmr", "mmr_lambda": 0.5}]
)
def test_another_method(
    engine: Callable[..., Engine],
    transformers_of: Callable[[str], Transformers],
    options: dict[str, Any],
) -> None:
    pruned = engine("llava", {"k": K, "max_k": ALL, **options})
    requests = [ONE, TWO, replace(OTHER, k=20)]
    found = asked(pruned, "llava", requests)
    expected = transformers_of("llava")(requests, K, **options)
    assert [(len(a.prompt), a.tokens) for a in found] == expected
    assert expected != transformers_of("llava")(requests, K)


@pytest.mark.parametrize("family", ["llava_siglip", "llava_next_siglip"])
def test_a_tower_without_cls(
    engine: Callable[..., Engine], transformers_of: Callable[[str], Transformers], family: str
) -> None:
    pruned = engine(family, {"k": K, "max_k": ALL})
    requests = [ONE, TWO, replace(OTHER, k=20)]
    found = asked(pruned, family, requests)
    expected = transformers_of(family)(requests, K)
    assert [(len(a.prompt), a.tokens) for a in found] == expected


def test_pooled_tiles(
    engine: Callable[..., Engine], transformers_of: Callable[[str], Transformers]
) -> None:
    """By scores only: averages of patches are similar to each other, as in smooth pictures."""
    family = "llava_onevision"
    pruned = engine(family, {"k": K, "max_k": ALL, "important_ratio": 1.0})
    requests = [replace(ONE, images=[LARGE]), replace(ONE, images=[LARGE], k=ALL)]
    found = asked(pruned, family, requests)
    expected = transformers_of(family)(requests, K, important_ratio=1.0)
    assert [(len(a.prompt), a.tokens) for a in found] == expected


def test_many_images_at_once(
    engine: Callable[..., Engine], transformers_of: Callable[[str], Transformers]
) -> None:
    """More images per step than the encoder takes: they are split into batches, with mixed k."""
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


def test_engine_in_a_separate_process(
    engine: Callable[..., Engine], transformers_of: Callable[[str], Transformers]
) -> None:
    """As in a server, and with two ranks: no process has what another one has imported or set, such
    as the positions, which are not set in the process that builds the prompt."""
    apart = engine(
        "qwen25", {"k": K}, limit_mm_per_prompt=limits("qwen25"), apart=True,
        tensor_parallel_size=2,
    )  # fmt: skip
    found = asked(apart, "qwen25", [ONE, TWO])
    expected = transformers_of("qwen25")([ONE, TWO], K)
    assert [(len(a.prompt), a.tokens) for a in found] == expected


def test_positions_beyond_the_rotary_embedding(
    engine: Callable[..., Engine], transformers_of: Callable[[str], Transformers]
) -> None:
    """Few tokens of a long strip span as many positions as the strip is long."""
    family = "qwen25_few_positions"
    few = engine(family, {"k": 4}, max_model_len=128, limit_mm_per_prompt={"image": 5})
    four, five = (Request("USER:" + "{image}" * n, [WIDE] * n) for n in (4, 5))
    found = asked(few, family, [four])
    assert [(len(a.prompt), a.tokens) for a in found] == transformers_of(family)([four], 4)
    with pytest.raises(ValueError, match=r"^vispruner: [^\n]* take 480 positions more[^\n]*$"):
        asked(few, family, [five])
    assert asked(few, family, [four]) == found


def test_thin_images(
    engine: Callable[..., Engine], transformers_of: Callable[[str], Transformers], family: str
) -> None:
    """Pictures of one pixel in one direction, of which a layout of tiles may have no tokens."""
    requests = [replace(ONE, images=[number]) for number in (THIN, TALL, 1)]
    pruned = engine(family, {"k": K, "max_k": ALL}, limit_mm_per_prompt=limits(family))
    found = asked(pruned, family, requests)
    assert [(len(a.prompt), a.tokens) for a in found] == transformers_of(family)(requests, K)


@pytest.mark.parametrize("family", ["qwen25", "qwen3"])
def test_a_text_with_a_placeholder(engine: Callable[..., Engine], family: str) -> None:
    """The text of a client may have the token of a picture, which has no place in a picture."""
    pruned = engine(family, {"k": K, "max_k": ALL}, limit_mm_per_prompt=limits(family))
    question = "USER: what is <|video_pad|> in {image}? ASSISTANT:"
    with pytest.raises(ValueError, match=r"^vispruner: [^\n]* token '<\|video_pad\|>'[^\n]*$"):
        asked(pruned, family, [Request(question, [1])])
    after = Request("USER: {image} what is <|video_pad|>? ASSISTANT:", [1])
    (plain,) = asked(pruned, family, [replace(after, text=after.text.replace("video_pad", "x"))])
    (found,) = asked(pruned, family, [after])
    assert len(found.prompt) < len(plain.prompt)  # answered: one token instead of "<|x|>"


@pytest.mark.parametrize(
    ("family", "convert"), [("llava", "embed"), ("qwen25", "embed"), ("qwen3", "classify")]
)
def test_pooling(checkpoint: Callable[[str], Path], family: str, convert: str) -> None:
    """Without the option, vLLM's adapters for pooling are on vLLM's own class."""
    requests = [request.for_engine(family) for request in (ONE, NONE)]
    options: dict[str, Any] = {"runner": "pooling", "convert": convert}
    with Engine(checkpoint(family), plugin=False, pooling=options) as plain:
        expected = plain(requests)
    with Engine(checkpoint(family), pooling=options) as idle:
        found = idle(requests)
    with Engine(checkpoint(family), {"k": K}, pooling=options) as pruned:
        fewer = pruned(requests)
    assert [answer.prompt for answer in found] == [answer.prompt for answer in expected]
    assert len(fewer[0].prompt) < len(expected[0].prompt)
    sizes = {len(answer.logprobs) for answer in (*expected, *found, *fewer)}
    assert len(sizes) == 1
    if convert == "embed":  # the weights of a classifier are random: the checkpoints have none
        assert found == expected
        assert fewer[1] == expected[1]


def test_embeddings_of_clients_are_not_pruned(engine: Callable[..., Engine]) -> None:
    """Also where the memory for pruned images would be too small for them."""
    small = engine("llava", {"k": K}, enable_mm_embeds=True, max_num_batched_tokens=32)
    values = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    (found,) = small([{"prompt": ONE.prompt("llava"), "multi_modal_data": {"image": values}}])
    (pruned,) = asked(small, "llava", [ONE])
    assert len(found.prompt) - len(pruned.prompt) == 64 - K
