"""Engines that cannot prune fail with the reason in one line; engines without pruning are not
affected."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import transformers
from support import engine_models
from support.engine_process import TESTS, Engine

from vispruner.models import UnsupportedModelError
from vispruner.vllm import architectures
from vispruner.vllm.internvl import PrunedInternVL
from vispruner.vllm.llava import PrunedLlava
from vispruner.vllm.llava_next import PrunedLlavaNext
from vispruner.vllm.llava_onevision import PrunedLlavaOnevision
from vispruner.vllm.qwen_vl import (
    PrunedQwen2VL,
    PrunedQwen3VL,
    PrunedQwen3VLMoe,
    PrunedQwen25VL,
    PrunedQwen35,
    PrunedQwen35Moe,
)

pytestmark = pytest.mark.engine

QWENS = (
    PrunedQwen2VL, PrunedQwen25VL, PrunedQwen3VL, PrunedQwen3VLMoe, PrunedQwen35, PrunedQwen35Moe,
)  # fmt: skip


def engine_config(**changes: Any) -> Any:
    """The options that a pruned Qwen-VL checks, with one of them changed."""
    options = {
        "mm_encoder_tp_mode": "weights", "video_pruning_rate": None, "speculative_config": None,
        "pipeline_parallel_size": 1, "compile_mm_encoder": False, "lora_config": None,
        "mm_processor_kwargs": None, "cudagraph_mm_encoder": False, "enable_prompt_embeds": False,
        "use_v2_model_runner": False, **changes,
    }  # fmt: skip
    own = SimpleNamespace(**options)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            multimodal_config=own, enable_prompt_embeds=own.enable_prompt_embeds
        ),
        use_v2_model_runner=own.use_v2_model_runner,
        parallel_config=own,
        compilation_config=own,
        lora_config=own.lora_config,
        speculative_config=own.speculative_config,
    )


@pytest.mark.parametrize("model", QWENS, ids=lambda model: model.__name__)
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "speculative decoding other"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"compile_mm_encoder": True}, "compile_mm_encoder"),
        ({"cudagraph_mm_encoder": True}, "cudagraph_mm_encoder"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"lora_config": SimpleNamespace(enable_tower_connector_lora=True)}, "connector-lora"),
    ],
)
def test_options_that_qwen_cannot_be_pruned_with(
    model: Any, changes: dict[str, Any], named: str
) -> None:
    model.check_engine(engine_config(mm_encoder_tp_mode="data"))
    model.check_engine(engine_config(speculative_config=SimpleNamespace(method="ngram")))
    message = f"^vispruner: .*{named}.* cannot be used with {model.stock.__name__}: [^\n]+$"
    with pytest.raises(ValueError, match=message):
        model.check_engine(engine_config(**changes))


@pytest.mark.parametrize(
    "model", [PrunedQwen3VLMoe, PrunedQwen35Moe, PrunedLlavaOnevision], ids=lambda m: m.__name__
)
def test_models_without_adapters(model: Any) -> None:
    lora = SimpleNamespace(enable_tower_connector_lora=False)
    with pytest.raises(ValueError, match=r"^vispruner: LoRA cannot be used with [^\n]*$"):
        model.check_engine(engine_config(lora_config=lora))


def test_options_that_llava_cannot_be_pruned_with() -> None:
    PrunedLlava.check_engine(engine_config(enable_prompt_embeds=True, pipeline_parallel_size=2))
    with pytest.raises(ValueError, match=r"^vispruner: cudagraph_mm_encoder cannot be used[^\n]*$"):
        PrunedLlava.check_engine(engine_config(cudagraph_mm_encoder=True))


@pytest.mark.parametrize("method", ["eagle3", "mtp", "draft_model", "medusa", "suffix"])
@pytest.mark.parametrize(
    "model", [PrunedLlava, PrunedLlavaNext, PrunedLlavaOnevision], ids=lambda m: m.__name__
)
def test_drafts_that_llava_cannot_be_pruned_with(model: Any, method: str) -> None:
    model.check_engine(engine_config(speculative_config=SimpleNamespace(method="eagle")))
    message = "^vispruner: speculative decoding other than ngram and eagle cannot be .*[^\n]+$"
    with pytest.raises(ValueError, match=message):
        model.check_engine(engine_config(speculative_config=SimpleNamespace(method=method)))


def test_internvl_has_no_draft_models() -> None:
    for method in ("eagle", "eagle3", "mtp", "draft_model"):
        with pytest.raises(ValueError, match=r"^vispruner: speculative [^\n]*: vLLM has none for"):
            PrunedInternVL.check_engine(
                engine_config(speculative_config=SimpleNamespace(method=method))
            )


def test_the_table_of_the_documentation() -> None:
    """Its rows are the architectures, and a cell is "refused" exactly if the model of its row
    refuses."""
    text = (TESTS.parent / "docs" / "serving.md").read_text()
    lines = text[text.index("| architecture | tensor parallel |") :].split("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    table = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    assert set(table) == set(architectures())
    options = {
        "tensor parallel": {"tensor_parallel_size": 2},
        "pipeline parallel": {"pipeline_parallel_size": 2},
        "n-gram drafts": {"speculative_config": SimpleNamespace(method="ngram")},
        "EAGLE drafts": {"speculative_config": SimpleNamespace(method="eagle")},
        "chunked prefill": {}, "prefix cache": {}, "LoRA": {"lora_config": SimpleNamespace(
            enable_tower_connector_lora=False)},
    }  # fmt: skip
    for architecture, cells in table.items():
        module, _, name = architectures()[architecture].partition(":")
        model = getattr(importlib.import_module(f"vispruner.vllm.{module}"), name)
        for feature, changes in options.items():
            refused = False
            try:
                model.check_engine(engine_config(**changes))
            except ValueError:
                refused = True
            assert (cells[feature] == "refused") == refused, (architecture, feature)


def test_a_runner_that_does_not_update_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    monkeypatch.setattr(CPUModelRunner, "load_model", lambda self: None)
    with pytest.raises(ValueError, match="runner V1 on this vLLM's CPU backend cannot be used"):
        PrunedQwen3VL.check_engine(engine_config())
    PrunedQwen3VL.check_engine(engine_config(use_v2_model_runner=True))


def llava_config(**changes: Any) -> Any:
    plain = {"vision_config": engine_models.clip(), "vision_feature_layer": -2,
             "vision_feature_select_strategy": "default"}  # fmt: skip
    return transformers.LlavaConfig(**{**plain, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision_config": engine_models.siglip()},
            "select_strategy='full' with .*siglip.*'default'",
        ),
        (
            {"vision_config": transformers.PixtralVisionConfig()},
            "needs a CLIP or SigLIP vision tower.*pixtral",
        ),
        (
            {"vision_feature_select_strategy": "full"},
            "select_strategy='default' with .*, got 'full'",
        ),
        ({"vision_feature_layer": [-2, -3]}, "must be one encoder layer"),
        ({"vision_feature_layer": 0}, "must be one encoder layer"),
        ({"vision_feature_layer": 5}, "must be one encoder layer, got 5 with 4 layers"),
    ],
)
def test_unsupported_towers(changes: dict[str, Any], message: str) -> None:
    PrunedLlava.check(llava_config())
    PrunedLlava.check(
        llava_config(vision_config=engine_models.siglip(), vision_feature_select_strategy="full")
    )
    with pytest.raises(UnsupportedModelError, match=f"^vispruner: .*{message}[^\n]*$"):
        PrunedLlava.check(llava_config(**changes))


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (PrunedLlavaOnevision, {"vision_aspect_ratio": "anyres_max_2"}, "'anyres_max_9'.*max_2'"),
        (PrunedInternVL, {"vision_feature_layer": -2}, "vision_feature_layer=-1, got -2"),
        (PrunedInternVL, {"vision_feature_select_strategy": "full"}, "'default', got 'full'"),
    ],
)
def test_settings_that_vllm_would_ignore(model: Any, changes: dict[str, Any], message: str) -> None:
    plain = {
        PrunedInternVL: {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"},
        PrunedLlavaOnevision: {
            "vision_config": engine_models.siglip(), "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
        },
    }[model]  # fmt: skip
    model.check(SimpleNamespace(**plain))
    with pytest.raises(UnsupportedModelError, match=f"^vispruner: needs [^\n]*{message}[^\n]*$"):
        model.check(SimpleNamespace(**{**plain, **changes}))


def test_qwen_needs_full_attention_somewhere() -> None:
    vision = SimpleNamespace(fullatt_block_indexes=[])
    with pytest.raises(UnsupportedModelError, match="no block with full attention"):
        PrunedQwen25VL.check(SimpleNamespace(vision_config=vision))


@pytest.mark.parametrize(
    ("family", "pruning", "options", "message"),
    [
        ("llava", {"k": 0}, {}, "vispruner: k must be at least 1"),
        (
            "llava",
            {"k": 8},
            {"mm_processor_kwargs": {"vispruner": {"k": 4}}},
            "--mm-processor-kwargs has 'vispruner', which nothing reads",
        ),
        ("qwen25", {"k": 8}, {"video_pruning_rate": 0.5}, "vispruner: --video-pruning-rate"),
        ("qwen25", {"k": 8}, {"enable_prompt_embeds": True}, "vispruner: --enable-prompt-embeds"),
        (
            "qwen3",
            {"k": 8},
            {"compilation_config": {"cudagraph_mm_encoder": True}},
            "vispruner: cudagraph_mm_encoder",
        ),
    ],
)
def test_an_engine_does_not_start(
    checkpoint: Callable[[str], Path],
    family: str,
    pruning: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        Engine(checkpoint(family), pruning, **options)
