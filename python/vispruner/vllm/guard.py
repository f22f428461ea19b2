"""Errors for requested pruning that vLLM would ignore.

vLLM passes unknown options to the model's configuration and to the image processor, which may not
read them. These checks run when an engine looks up its model and when a request is tokenized. They
accept engines and requests without pruning options.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from .config import KEY, Pruning, meant, nested_names
from .requests import FIELDS, add_asked, forget, reads_fields, reads_fields_of_pooling

_INSTALLED = "_vispruner_guard"


class UnsupportedEngineError(RuntimeError):
    """The pruning option of an engine would be ignored; the message is one line."""


def _refuse_unread(option: str, given: object, read: str = KEY) -> None:
    """Raises UnsupportedEngineError if an option has a name, other than `read`, that means
    pruning."""
    for name in meant(nested_names(given)):
        if name != read:
            raise UnsupportedEngineError(
                f"{KEY}: {option} has {name!r}, which nothing reads: give all options in "
                f"--hf-overrides, under the key {KEY!r}"
            )


def check_other_options(vllm_config: Any) -> None:
    """Checks that no other option of an engine asks for pruning.

    Args:
        vllm_config: vLLM's `VllmConfig`.

    Raises:
        UnsupportedEngineError: one does.
    """
    multimodal = vllm_config.model_config.multimodal_config
    for option in ("mm_processor_kwargs", "media_io_kwargs"):
        given = getattr(multimodal, option, None)
        _refuse_unread(f"--{option.replace('_', '-')}", given, read="")
    _refuse_unread("--additional-config", vllm_config.additional_config, read="")


def check_engine(model_config: Any, architecture: str, supported: Mapping[str, Any]) -> None:
    """Checks that the requested pruning will be applied.

    Args:
        model_config: vLLM's `ModelConfig`, with `hf_overrides` applied.
        architecture: the one that vLLM chose.
        supported: the architectures that can be pruned.

    Raises:
        UnsupportedEngineError: the architecture or the implementation has no pruned class, or the
            option is misspelt.
    """
    _refuse_unread("--hf-overrides", getattr(model_config, "hf_overrides", None))
    if getattr(model_config.hf_config, KEY, None) is None or architecture in supported:
        return
    if str(getattr(model_config, "model_impl", "auto")).endswith("transformers"):
        raise UnsupportedEngineError(
            f"{KEY}: --model-impl transformers cannot be pruned: use --model-impl vllm, or leave "
            "the option out to serve unpruned"
        )
    raise UnsupportedEngineError(
        f"{KEY}: {architecture} cannot be pruned in vLLM (supported: "
        f"{', '.join(sorted(supported))}); leave the option out to serve unpruned"
    )


def check_request(hf_config: Any, prompt: Mapping[str, Any]) -> None:
    """Checks that the engine allows the pruning options of a request.

    Args:
        hf_config: of the engine's model; prompt: vLLM's, with `mm_processor_kwargs` if it has any.

    Raises:
        ValueError: it does not, or the engine does not prune; the server answers with HTTP 400.
    """
    kwargs = prompt.get("mm_processor_kwargs") or {}
    for name in meant(nested_names(kwargs)):
        if name != KEY:
            raise ValueError(
                f"{KEY}: mm_processor_kwargs has {name!r}, which nothing reads: use "
                f'{{"{KEY}": {{"k": 64}}}}'
            )
    if KEY not in kwargs:
        return
    pruning = Pruning.of(hf_config)
    if pruning is None:
        raise ValueError(
            f"{KEY}: this engine does not prune: start it with "
            f'--hf-overrides \'{{"{KEY}": {{"k": 64}}}}\''
        )
    pruning.for_request(kwargs)


def check_parameters(parameters: Any) -> None:
    """Checks that sampling or pooling parameters have no pruning option, which nothing would read.

    Raises:
        ValueError: they have one.
    """
    for field in ("extra_args", "extra_kwargs"):
        given = dict(getattr(parameters, field, None) or {})
        given.pop("mm_processor_kwargs", None)  # read by offline scoring
        for name in meant(nested_names(given)):
            raise ValueError(
                f"{KEY}: {field} of the parameters has {name!r}, which nothing reads: offline, use "
                f'mm_processor_kwargs={{"{KEY}": {{"k": 64}}}} of the prompt; in a request, '
                f"{' or '.join(FIELDS)} in vllm_xargs"
            )


def _before(owner: Any, name: str, check: Callable[..., None]) -> None:
    """Runs a check with the same arguments before a method."""
    method = getattr(owner, name)

    if inspect.iscoroutinefunction(method):

        @functools.wraps(method)
        async def checked(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return await method(*args, **kwargs)

    else:

        @functools.wraps(method)
        def checked(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return method(*args, **kwargs)

    setattr(owner, name, checked)


def install_engine_check(supported: Mapping[str, Any]) -> None:
    """Checks every model that vLLM looks up in this process, on any version.

    Args:
        supported: the architectures that have a class of this package, including stand-ins.
    """
    from vllm import ModelRegistry

    inspect_model = ModelRegistry.inspect_model_cls
    if hasattr(inspect_model, _INSTALLED):
        return

    @functools.wraps(inspect_model)
    def inspected(architectures: str | list[str], model_config: Any) -> Any:
        info, architecture = inspect_model(architectures, model_config)
        check_engine(model_config, architecture, supported)
        return info, architecture

    setattr(inspected, _INSTALLED, True)
    ModelRegistry.inspect_model_cls = inspected


def install_request_checks() -> None:
    """Checks every request of this process and reads its fields (`requests`)."""
    from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.v1.engine.input_processor import InputProcessor

    if hasattr(BaseRenderer, _INSTALLED):
        return

    def check(renderer: Any, prompt: MutableMapping[str, Any], **options: object) -> None:
        add_asked(prompt)
        check_request(renderer.model_config.hf_config, prompt)

    def check_params(
        processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **options: Any
    ) -> None:
        try:
            check_parameters(params)
        except ValueError:
            if isinstance(prompt, Mapping):
                hashes = prompt.get("mm_hashes") or {}
                forget(processor.renderer.mm_processor_cache, itertools.chain(*hashes.values()))
            raise

    def check_options(renderer: Any, config: Any, *args: Any, **options: Any) -> None:
        check_other_options(config)

    _before(BaseRenderer, "__init__", check_options)
    _before(InputProcessor, "process_inputs", check_params)
    _before(BaseRenderer, "_process_tokens", check)
    _before(BaseRenderer, "_process_tokens_async", check)
    for name in ("preprocess_chat", "preprocess_cmpl"):
        setattr(OnlineRenderer, name, reads_fields(getattr(OnlineRenderer, name)))
    PoolingBaseServing._init_ctx = reads_fields_of_pooling(PoolingBaseServing._init_ctx)
    setattr(BaseRenderer, _INSTALLED, True)


__all__ = [
    "UnsupportedEngineError",
    "check_engine",
    "check_other_options",
    "check_parameters",
    "check_request",
    "install_engine_check",
    "install_request_checks",
]
