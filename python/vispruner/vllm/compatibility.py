"""The supported versions of vLLM, and the behaviour on others.

The modules of this package subclass vLLM's model and processor classes. These interfaces are not
stable between minor releases, and a moved method can cause wrong answers without an error. So a
version is supported once the engine tests have passed on it, and rejected before that. Only engines
with the pruning option are rejected: others use vLLM's own classes.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from .config import KEY, Pruning

#: Minor releases that the engine tests have passed on, as docs/serving.md lists them.
SUPPORTED = ("0.32", "0.33")

_MODELS = "vllm.model_executor.models"

#: architecture to its class in vLLM, which mostly has the same name
STOCK = {
    **{
        architecture: f"{_MODELS}.{module}:{architecture}"
        for module, architecture in (
            ("llava", "LlavaForConditionalGeneration"),
            ("llava_next", "LlavaNextForConditionalGeneration"),
            ("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
            ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
            ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
            ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
            ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
            ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
            ("qwen3_5", "Qwen3_5MoeForConditionalGeneration"),
        )
    },
    "InternVLForConditionalGeneration": f"{_MODELS}.interns1:InternS1ForConditionalGeneration",
}

_PROCESSOR = "vllm.multimodal.processing:BaseMultiModalProcessor"
_INFO = "vllm.multimodal.processing:BaseProcessingInfo"
_QWEN_VISION = {
    f"{_MODELS}.qwen2_vl:Qwen2VisionTransformer",
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VisionTransformer",
    f"{_MODELS}.qwen3_vl:Qwen3_VisionTransformer",
}
_ENCODER_ATTENTION = "vllm.model_executor.layers.attention.mm_encoder_attention:MMEncoderAttention"
_POSITIONS = ("input_ids", "multimodal_embeddings", "mrope_positions", "num_computed_tokens")

#: Internals that are overridden, called or read, with the parameters, fields or attributes that are
#: used. Attributes that only instances have, such as the layers of a tower, are checked by the
#: engine tests.
INTERNALS: dict[str, tuple[str, ...]] = {
    f"{_PROCESSOR}._get_mm_hashes": ("inputs",),
    f"{_PROCESSOR}._apply_hf_processor_main": ("mm_items", "hf_kwargs"),
    f"{_PROCESSOR}._get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
    f"{_PROCESSOR}._get_prompt_updates": (
        "mm_items",
        "hf_processor_mm_kwargs",
        "out_mm_kwargs",
    ),
    f"{_PROCESSOR}.apply": ("inputs", "timing_ctx"),
    f"{_PROCESSOR}._maybe_apply_prompt_updates": ("mm_items", "mm_res"),
    "vllm.multimodal.processing.processor:ResolvedPromptUpdate": ("content",),
    "vllm.multimodal.processing.processor:MultiModalProcessingResult": ("prompt_updates",),
    **{
        f"vllm.multimodal.cache:BaseMultiModalProcessorCache.{method}": ("mm_hash",)
        for method in ("invalidate", "is_cached_item")
    },
    "vllm.multimodal.processing:PromptUpdateDetails": ("full", "is_embed"),
    "vllm.v1.engine.async_llm:AsyncLLM.add_request": ("request_id", "prompt"),
    f"{_INFO}.get_supported_mm_limits": (),
    f"{_INFO}.get_hf_processor": ("kwargs",),
    f"{_MODELS}.adapters:as_embedding_model": ("cls",),
    f"{_MODELS}.adapters:as_seq_cls_model": ("cls",),
    "vllm:ModelRegistry.inspect_model_cls": ("architectures", "model_config"),
    "vllm.entrypoints.pooling.base.serving:PoolingBaseServing._init_ctx": ("request",),
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": ("params",),
    "vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat": ("request",),
    "vllm.renderers.online_renderer:OnlineRenderer.preprocess_cmpl": ("request",),
    "vllm.renderers.base:BaseRenderer": ("config",),
    "vllm.renderers.base:BaseRenderer._process_tokens": ("prompt",),
    "vllm.renderers.base:BaseRenderer._process_tokens_async": ("prompt",),
    f"{_INFO}.get_mm_max_tokens_per_item": ("seq_len", "mm_counts"),
    "vllm.multimodal.inputs:MultiModalFieldConfig.batched": ("modality", "keep_on_cpu"),
    "vllm.multimodal.processing:ProcessorInputs": ("hf_processor_mm_kwargs", "cache"),
    "vllm.multimodal.processing:PromptReplacement": ("modality", "target", "replacement"),
    "vllm.multimodal.processing:PromptUpdateDetails.select_token_id": ("seq", "embed_token_id"),
    "vllm.config:MultiModalConfig.is_multimodal_pruning_enabled": (),
    # The image data that a cached prefix may drop; data for positions must stay.
    "vllm.multimodal.utils:strip_covered_mm_data": ("mm_features", "uses_mrope"),
    # Its `forward` passes all arguments to one of these.
    **{
        f"{_ENCODER_ATTENTION}.{forward}": ("query", "key")
        for forward in ("forward_native", "forward_cuda")
    },
    f"{_MODELS}.clip:CLIPAttention.forward": ("hidden_states",),
    f"{_MODELS}.llava:LlavaForConditionalGeneration._image_pixels_to_features": (
        "vision_tower",
        "pixel_values",
    ),
    f"{_MODELS}.llava_next:LlavaNextForConditionalGeneration._image_pixels_to_features": (
        "vision_tower",
        "pixel_values",
    ),
    f"{_MODELS}.llava_next:LlavaNextForConditionalGeneration._merge_image_patch_embeddings": (
        "image_size",
        "patch_embeddings",
        "strategy",
    ),
    f"{_MODELS}.qwen2_5_vl:Qwen2_5_VisionTransformer.get_window_index_thw": (
        "grid_t",
        "grid_h",
        "grid_w",
    ),
    **{
        f"{place}.{name}": parts
        for place in STOCK.values()
        for name, parts in {
            "_processor_factory": ("info", "processor", "dummy_inputs"),
            "_parse_and_validate_image_input": ("kwargs",),
        }.items()
    },
    **{
        f"{model}.{method}": parameters
        for architecture, model in STOCK.items()
        if architecture.startswith("Qwen")
        for method, parameters in {
            "_parse_and_validate_multimodal_inputs": ("kwargs",),
            "_process_image_input": ("image_input",),
            "_process_video_input": ("video_input",),
            "get_mrope_input_positions": ("input_tokens", "mm_features"),
        }.items()
    },
    **{f"{vision}.forward": ("x", "grid_thw") for vision in _QWEN_VISION},
    **{
        f"{STOCK[architecture]}.recompute_mrope_positions": _POSITIONS
        for architecture in (
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen3VLForConditionalGeneration",
        )
    },
    f"{_MODELS}.vision:run_dp_sharded_mrope_vision_model": (
        "vision_model",
        "pixel_values",
        "grid_thw_list",
        "rope_type",
    ),
    "vllm.utils.gpu_sync_debug:gpu_sync_allowed": (),
    "vllm.utils.torch_utils:async_tensor_h2d": ("data", "device"),
}


class UnsupportedVersionError(RuntimeError):
    """This version of vLLM is not supported; the message is one line."""


def moved(internals: dict[str, tuple[str, ...]] = INTERNALS) -> list[str]:
    """Internals that are missing or take other parameters, as "module:name".

    Importing them initializes no device.
    """
    found = []
    for place, parameters in internals.items():
        module, _, name = place.partition(":")
        try:
            target: Any = importlib.import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
            there = inspect.signature(target).parameters if callable(target) else dir(target)
            missing = set(parameters) - set(there)
        except (ImportError, AttributeError):
            found.append(place)
            continue
        if missing:
            found.append(f"{place} (no {', '.join(sorted(missing))})")
    return found


def version_problem() -> str | None:
    """Why the installed version of vLLM is not supported; None if it is."""
    from vllm import __version__

    if ".".join(__version__.split(".")[:2]) in SUPPORTED:
        return None
    return (
        f"{KEY}: vLLM {__version__} is not supported (supported: {', '.join(SUPPORTED)}); install "
        "one that is, or leave the option out to serve unpruned"
    )


def refuse_unsupported() -> None:
    """Raises UnsupportedVersionError for an unsupported version or a build that differs from the
    release."""
    problem = version_problem()
    if problem is None and (gone := moved()):
        problem = f"{KEY}: this build of vLLM differs from the release in {gone[0]}"
    if problem is not None:
        raise UnsupportedVersionError(problem)


def _stand_in(architecture: str) -> type[Any]:
    module, _, name = STOCK[architecture].partition(":")
    stock: type[Any] = getattr(importlib.import_module(module), name)

    class StandIn(stock):
        """vLLM's own model; rejects an engine with the pruning option."""

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            if Pruning.of(vllm_config.model_config.hf_config) is not None:
                raise UnsupportedVersionError(version_problem())
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    StandIn.__name__ = stock.__name__
    return StandIn


def __getattr__(name: str) -> Any:
    """Stand-ins for the architectures, created when vLLM loads one."""
    if name in STOCK:
        return _stand_in(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
