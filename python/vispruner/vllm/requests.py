"""The k of a request in `vllm_xargs`, a field that gives clients no other option.

vLLM accepts `mm_processor_kwargs` of requests only with `--trust-request-mm-kwargs`, which gives
clients all options of the image processor. `vllm_xargs` is passed through for extensions such as
this one. Its fields become the same options of the same request, bounded by the engine's cap.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any

from .config import KEY, meant, nested_names

#: field of `vllm_xargs` to the option of the request
FIELDS = {f"{KEY}_k": "k", f"{KEY}_ratio": "ratio"}

_asked: ContextVar[Mapping[str, Any] | None] = ContextVar("vispruner_asked", default=None)


def taken_from(request: Any) -> dict[str, Any]:
    """The options of a request in `vllm_xargs`, which are removed from it.

    Raises:
        ValueError: a field is unknown, the request has one outside of `vllm_xargs`, or it sets the
            option in another place as well.
    """
    others = dict(getattr(request, "model_extra", None) or {})
    others.pop("vllm_xargs", None)  # an extra field of requests that do not declare it
    for field in ("chat_template_kwargs", "media_io_kwargs"):
        others[field] = getattr(request, field, None)
    for name in meant(nested_names(others)):
        raise ValueError(
            f"{KEY}: the request has {name!r}, which nothing reads: put {' or '.join(FIELDS)} into "
            "vllm_xargs"
        )
    fields = getattr(request, "vllm_xargs", None) or {}
    if not isinstance(fields, Mapping):  # some requests of vLLM do not declare the field
        raise ValueError(f"{KEY}: vllm_xargs must be an object, got {fields!r}")
    own = {name: fields[name] for name in meant(fields)}
    if not own:
        return {}
    for name in own:
        if name not in FIELDS:
            raise ValueError(
                f"{KEY}: vllm_xargs has {name!r}, which nothing reads: use {' or '.join(FIELDS)}"
            )
    if KEY in (getattr(request, "mm_processor_kwargs", None) or {}):
        raise ValueError(f"{KEY}: give k in vllm_xargs or in mm_processor_kwargs, not in both")
    rest = {name: value for name, value in fields.items() if name not in own}
    request.vllm_xargs = rest or None
    return {FIELDS[name]: value for name, value in own.items()}


def add_asked(prompt: MutableMapping[str, Any]) -> None:
    """Adds the options of the current request to one of its prompts."""
    asked = _asked.get()
    if asked:
        prompt["mm_processor_kwargs"] = {**(prompt.get("mm_processor_kwargs") or {}), KEY: asked}


def reads_fields(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a method (self, request, ...) of the server's renderer that makes prompts of the
    request."""

    @functools.wraps(preprocess)
    async def wrapped(renderer: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        token = _asked.set(taken_from(request))
        try:
            return await preprocess(renderer, request, *args, **kwargs)
        finally:
            _asked.reset(token)

    return wrapped


def reads_fields_of_pooling(make_context: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a method (self, io_processor, request, ...) of the server that makes the context of a
    pooling request, whose prompts other threads make."""

    @functools.wraps(make_context)
    async def wrapped(
        serving: Any, io_processor: Any, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        asked = taken_from(request)
        context = await make_context(serving, io_processor, request, *args, **kwargs)
        if asked:
            context.prompt_extras = dict(context.prompt_extras or {})
            given = context.prompt_extras.get("mm_processor_kwargs") or {}
            context.prompt_extras["mm_processor_kwargs"] = {**given, KEY: asked}
        return context

    return wrapped


def forget(cache: Any, items: Iterable[str | None]) -> None:
    """Forgets the images of a refused request.

    vLLM has noted them as sent to the engine, and would not send them with the next request.

    Args:
        cache: vLLM's, of the front end, or None; items: hashes.
    """
    for item in items if cache is not None else ():
        cache.invalidate(item)


__all__ = ["FIELDS", "add_asked", "forget", "reads_fields", "reads_fields_of_pooling", "taken_from"]
