"""Checks that a model can be pruned, and that its scores match its attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..clock import Clock
from ..releases import loaded
from ..taps import observed
from .base import Family, UnsupportedModelError

_NAME = "vispruner_check"
_SIDE = 448  # side of the test picture in pixels


def unwrapped(model: Any) -> Any:
    """The model inside PEFT's wrapper; other models are returned unchanged.

    Raises:
        UnsupportedModelError: the wrapper runs a copy, or a compiled program, of the model.
    """
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        model = model.get_base_model()
    inside = next((name for name in ("_orig_mod", "module") if name in dict(_modules(model))), None)
    if inside is not None and not hasattr(type(model), "generate"):
        raise UnsupportedModelError(
            f"cannot prune a {type(model).__name__}: apply to the model inside (model.{inside}), "
            "before wrapping it"
        )
    return model


def _modules(model: Any) -> Any:
    return getattr(model, "_modules", {}) or {}


def check_model(model: Any) -> None:
    """Raises UnsupportedModelError for a part of a model, or for one that packs requests."""
    if not callable(getattr(model, "generate", None)) or model.base_model is model:
        raise UnsupportedModelError(
            f"pass the whole ...ForConditionalGeneration model, not a {type(model).__name__}"
        )
    for part in (model.config, model.config.get_text_config()):
        attention = str(getattr(part, "_attn_implementation", None))
        if attention.startswith("paged"):
            raise UnsupportedModelError(
                f"attention implementation {attention!r} packs requests: use sdpa, "
                "eager or flash_attention_2"
            )


class _Eager:
    """An attention implementation that records the weights and calls SDPA for the output.

    Attributes:
        cls, received: per layer, the attention of the first token to the others, and the attention
            that each token receives; flattened over all pictures.
    """

    def __init__(self, sdpa: Any) -> None:
        self._sdpa = sdpa
        self.cls: dict[int, list[Tensor]] = {}
        self.received: dict[int, list[Tensor]] = {}

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        logits = query.double() @ key.double().transpose(2, 3) * scale
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attention_mask, -torch.inf)
        elif attention_mask is not None:
            logits = logits + attention_mask
        weights = logits.softmax(-1)
        self.cls.setdefault(id(module), []).append(weights[:, :, 0, 1:].mean(1).flatten())
        self.received.setdefault(id(module), []).append(weights.mean((1, 2)).flatten())
        return self._sdpa(module, query, key, value, attention_mask, **kwargs)


@contextmanager
def _attending_with(config: Any, implementation: _Eager) -> Iterator[None]:
    """Sets the attention implementation of an encoder inside the block."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_NAME] = implementation
    config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        del ALL_ATTENTION_FUNCTIONS[_NAME]


def check_scores(family: Family) -> None:
    """Compares the scores of a random picture with the weights of eager attention.

    This detects layers that scale or normalize queries in a way that the family does not handle,
    for example in a new release.

    Raises:
        UnsupportedModelError: they differ.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    inputs = family.sample(_SIDE, _SIDE)
    if any(value.is_meta for value in inputs.values()):
        raise UnsupportedModelError(
            "check=True computes scores, and the weights of this model are on the meta device: "
            "load the weights first, or omit check=True"
        )
    eager = _Eager(ALL_ATTENTION_FUNCTIONS["sdpa"])
    config = family.attention_config()
    with (
        torch.no_grad(),
        loaded(family.base),
        _attending_with(config, eager),
        observed() as seen,
    ):
        family.encode("image", inputs, Clock(torch.device("cpu")))
    if not seen:
        raise UnsupportedModelError(
            f"{type(family).__name__} reads no attention that could be checked"
        )
    for attention, has_cls, scores in seen:
        weights = (eager.cls if has_cls else eager.received).get(id(attention))
        if weights is None:
            raise UnsupportedModelError(
                f"{type(attention).__name__} does not use the configured attention function: its "
                "scores cannot be checked (omit check=True to prune anyway)"
            )
        want, found = torch.cat(weights), scores.detach().flatten().to(weights[0])
        spread = (want.max() - want.min()).item()
        tolerance = 1e-3 * spread + 1e-5 * want.mean().item()
        if found.shape != want.shape or (found - want).abs().max().item() > tolerance:
            raise UnsupportedModelError(
                f"the scores of {type(attention).__name__} do not match its attention in this "
                "release of transformers: use a tested release, and please report it"
            )
