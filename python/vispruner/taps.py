"""Hooks that read one layer's queries and keys while the encoder runs as it always does.

Asking transformers for attention weights puts a whole encoder on eager attention. A tap keeps the
outputs of one layer's query and key projections instead, which are computed anyway. It is on the
layer only while pictures are being encoded.
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

#: an attention module, whether [CLS] scores its patches, and the scores that a tap read off it
Observation = tuple[Any, bool, Tensor]
_OBSERVED: ContextVar[list[Observation] | None] = ContextVar("vispruner_observed", default=None)


@contextmanager
def observed() -> Iterator[list[Observation]]:
    """While open, notes what taps read, as they read it."""
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
    """A hook that sees calls of the thread that made it only: others may use the module, too."""
    owner = get_ident()

    def guarded(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if get_ident() == owner else None

    return guarded


class _Kept:
    """A forward hook that keeps a module's output, or its first token only."""

    def __init__(self, module: nn.Module, what: str, *, first_only: bool = False) -> None:
        self._what, self._first_only = what, first_only
        self._output: Tensor | None = None
        self.handle = module.register_forward_hook(in_this_thread(self))

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> None:
        # A copy of the one token: a view would keep the whole query alive.
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
        # Where queries and keys are normalized, it is these that attend.
        q, k = (getattr(attention, f"{x}_norm", getattr(attention, f"{x}_proj")) for x in "qk")
        self._q = _Kept(q, "query projection", first_only=True)
        self._k = _Kept(k, "key projection")
        for kept in (self._q, self._k):
            stack.callback(kept.handle.remove)

    def scores(self) -> Tensor:
        q = _heads(self._q.take(), self._attention)[:, 0]
        k = _heads(self._k.take(), self._attention).transpose(1, 2)
        scores = selection.cls_attention(q, k, float(self._attention.scale))
        return _noted(self._attention, scores, has_cls=True)


class ReceivedTap:
    """Attention the patches receive, in a SigLIP layer."""

    has_cls = False

    def __init__(self, attention: Any, stack: ExitStack) -> None:
        self._attention = attention
        self._q = _Kept(attention.q_proj, "query projection")
        self._k = _Kept(attention.k_proj, "key projection")
        for kept in (self._q, self._k):
            stack.callback(kept.handle.remove)

    def scores(self) -> Tensor:
        q, k = (_heads(kept.take(), self._attention) for kept in (self._q, self._k))
        batch, tokens = q.shape[:2]
        bounds = list(range(0, (batch + 1) * tokens, tokens)) if tokens else [0]
        received = selection.received_attention(
            q.flatten(0, 1), k.flatten(0, 1), float(self._attention.scale), bounds
        )
        return _noted(self._attention, received.view(batch, tokens), has_cls=False)


class RotaryTap:
    """Attention the patches receive, in a Qwen vision block (packed pictures, rotary embedding).

    Args:
        attention: the block's attention, with a joint `qkv` projection.
        rotary: the model's own function that embeds positions in q and k.
        stack: takes the hooks off.
    """

    def __init__(self, attention: Any, rotary: Any, stack: ExitStack) -> None:
        self._attention, self._rotary = attention, rotary
        self._embeddings: tuple[Tensor, Tensor] | None = None
        self._qkv = _Kept(attention.qkv, "qkv projection")
        stack.callback(self._qkv.handle.remove)
        before = attention.register_forward_pre_hook(in_this_thread(self._before), with_kwargs=True)
        stack.callback(before.remove)

    def _before(self, module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        self._embeddings = kwargs["position_embeddings"]

    def scores(self, lengths: Sequence[int]) -> Tensor:
        """(T,) float32 for packed pictures of these lengths, in the block's own order."""
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
