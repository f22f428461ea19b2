"""The visual tokens of a request in the headers of its answer.

    vllm serve ... --middleware vispruner.vllm.headers.TokenHeaders

The headers also have the budget of the request, as JSON. All of this is known when the prompt is
built, before the first token, so streamed answers have them as well.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

from .config import KEY
from .metrics import Pruned

_INSTALLED = "_vispruner_headers"

_seen: ContextVar[list[Pruned] | None] = ContextVar("vispruner_seen", default=None)

_Message = MutableMapping[str, Any]
_Send = Callable[[_Message], Awaitable[None]]


def _remembering(process: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Wraps BaseRenderer._process_tokens_async, which builds a prompt of the current request."""

    @functools.wraps(process)
    async def remembered(*args: Any, **kwargs: Any) -> Any:
        prompt = await process(*args, **kwargs)
        seen = _seen.get()
        if seen is not None:
            seen.extend(prompt.get(KEY, ()))
        return prompt

    return remembered


class TokenHeaders:
    """ASGI middleware: headers `vispruner-tokens-before`, `vispruner-tokens-kept` and
    `vispruner-budget`.

    Answers to requests without images or videos do not have them.

    Args:
        app: the server.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        from vllm.renderers.base import BaseRenderer

        self._app = app
        if not hasattr(BaseRenderer, _INSTALLED):
            BaseRenderer._process_tokens_async = _remembering(BaseRenderer._process_tokens_async)
            setattr(BaseRenderer, _INSTALLED, True)

    async def __call__(self, scope: _Message, receive: Any, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen: list[Pruned] = []

        async def send_with_counts(message: _Message) -> None:
            if message["type"] == "http.response.start" and seen:
                counts = {
                    "before": sum(pruned.before for pruned in seen),
                    "kept": sum(pruned.kept for pruned in seen),
                }
                own = [(f"{KEY}-tokens-{n}".encode(), str(c).encode()) for n, c in counts.items()]
                own.append(
                    (f"{KEY}-budget".encode(), json.dumps(seen[0].budget.arguments).encode())
                )
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        token = _seen.set(seen)
        try:
            await self._app(scope, receive, send_with_counts)
        finally:
            _seen.reset(token)


__all__ = ["TokenHeaders"]
