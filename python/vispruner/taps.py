"""Hooks that read the queries and keys of one layer without changing how the encoder runs.

Requesting attention weights from transformers switches the whole encoder to eager attention. A tap
instead records the outputs of one layer's query and key projections, which are computed anyway. It
is attached to the layer only while pictures are encoded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from . import selection

#: an attention module, whether [CLS] scores its patches, and the scores from a tap
Observation = tuple[Any, bool, Tensor]
_OBSERVED: ContextVar[list[Observation] | None] = ContextVar("vispruner_observed", default=None)


@contextmanager
def observed() -> Iterator[list[Observation]]:
    """Records the scores of all taps inside the block."""
    seen: list[Observation] = []
    token = _OBSERVED.set(seen)
    try:
        yield seen
    finally:
        _OBSERVED.reset(token)


def _noted(attention: Any, scores: Tensor, *, has_cls: bool) -> Tensor:
    seen = _OBSERVED.get()
    if seen is not None:
        seen.append((attention, has_cls, scores))
    return scores


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook for calls from the current thread only; other threads may use the module as well."""
    owner = get_ident()

    def guarded(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if get_ident() == owner else None

    return guarded


class _OutputHook:
    """A forward hook that records a module's output, or only its first token."""

    def __init__(self, module: nn.Module, what: str, *, first_only: bool = False) -> None:
        self._what, self._first_only = what, first_only
        self._output: Tensor | None = None
        self.handle = module.register_forward_hook(in_this_thread(self))

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> None:
        # A copy of the token, because a view would hold the whole query in memory.
        self._output = output[:, :1].clone() if self._first_only else output

    def take(self) -> Tensor:
        output, self._output = self._output, None
        if output is None:
            raise RuntimeError(
                f"the vision tower ran without calling the {self._what} that pruning reads: a "
                "compiled tower skips its hooks (compile the language model instead)"
            )
        return output


def _heads(x: Tensor, attention: Any) -> Tensor:
    """(B, T, H * D) to (B, T, H, D)."""
    return x.unflatten(-1, (int(attention.num_heads), -1))


class ClsTap:
    """Attention of [CLS] to the patches, in a CLIP layer."""

    has_cls = True

    def __init__(self, attention: Any, stack: ExitStack) -> None:
        self._attention = attention
        # If queries and keys are normalized, the attention uses the normalized ones.
        q, k = (getattr(attention, f"{x}_norm", getattr(attention, f"{x}_proj")) for x in "qk")
        self._q = _OutputHook(q, "query projection", first_only=True)
        self._k = _OutputHook(k, "key projection")
        for hook in (self._q, self._k):
            stack.callback(hook.handle.remove)

    def scores(self) -> Tensor:
        q = _heads(self._q.take(), self._attention)[:, 0]
        k = _heads(self._k.take(), self._attention).transpose(1, 2)
        scores = selection.cls_attention(q, k, float(self._attention.scale))
        return _noted(self._attention, scores, has_cls=True)


class ReceivedTap:
    """Attention that the patches receive, in a SigLIP layer."""

    has_cls = False

    def __init__(self, attention: Any, stack: ExitStack) -> None:
        self._attention = attention
        self._q = _OutputHook(attention.q_proj, "query projection")
        self._k = _OutputHook(attention.k_proj, "key projection")
        for hook in (self._q, self._k):
            stack.callback(hook.handle.remove)

    def scores(self) -> Tensor:
        q, k = (_heads(hook.take(), self._attention) for hook in (self._q, self._k))
        batch, tokens = q.shape[:2]
        bounds = list(range(0, (batch + 1) * tokens, tokens)) if tokens else [0]
        received = selection.received_attention(
            q.flatten(0, 1), k.flatten(0, 1), float(self._attention.scale), bounds
        )
        return _noted(self._attention, received.view(batch, tokens), has_cls=False)


class RotaryTap:
    """Attention that the patches receive, in a Qwen vision block (packed, rotary embedding).

    Args:
        attention: the block's attention, with a joint `qkv` projection.
        rotary: the model's function that applies the rotary embedding to q and k.
        stack: removes the hooks.
    """

    def __init__(self, attention: Any, rotary: Any, stack: ExitStack) -> None:
        self._attention, self._rotary = attention, rotary
        self._embeddings: tuple[Tensor, Tensor] | None = None
        self._qkv = _OutputHook(attention.qkv, "qkv projection")
        stack.callback(self._qkv.handle.remove)
        before = attention.register_forward_pre_hook(in_this_thread(self._before), with_kwargs=True)
        stack.callback(before.remove)

    def _before(self, module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        self._embeddings = kwargs["position_embeddings"]

    def scores(self, lengths: Sequence[int]) -> Tensor:
        """(T,) float32 for packed pictures of these lengths, in the block's order."""
        qkv = self._qkv.take().detach()
        assert self._embeddings is not None
        q, k, _ = qkv.view(qkv.shape[0], 3, int(self._attention.num_heads), -1).unbind(1)
        if hasattr(self._attention, "q_norm"):
            q, k = self._attention.q_norm(q), self._attention.k_norm(k)
        q, k = self._rotary(q, k, *self._embeddings)
        self._embeddings = None
        bounds = [0, *itertools.accumulate(lengths)]
        scores = selection.received_attention(q, k, float(self._attention.scaling), bounds)
        return _noted(self._attention, scores, has_cls=False)


@contextmanager
def tower_tap(attention: Any, *, has_cls: bool) -> Iterator[ClsTap | ReceivedTap]:
    """A tap on one layer of a CLIP or SigLIP tower, for the duration of the block."""
    with ExitStack() as stack:
        yield (ClsTap if has_cls else ReceivedTap)(attention, stack)
