"""Checks of the arguments of a call with images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import releases
from ..models import Family


def bound(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A call's arguments under the names of `releases.canonical`, without None values."""
    if not args:
        return releases.canonical(kwargs)
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    if len(args) > len(names):
        raise TypeError(f"forward takes {len(names)} positional arguments, got {len(args)}")
    return releases.canonical(dict(zip(names, args, strict=False)) | dict(kwargs))


def mask_of(call: Mapping[str, Any]) -> Tensor | None:
    """(B, M) bool of the attention mask, None if there is none.

    Raises:
        ValueError: it is not two-dimensional, or has values other than 0 and 1.
    """
    mask = call.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(
            "attention_mask must be one tensor of shape (B, L) to be pruned, got a "
            f"{type(mask).__name__}: pass the mask that the processor made"
        )
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask must have shape (B, L) to be pruned, got {tuple(mask.shape)}"
        )
    attended = mask != 0
    if mask.is_floating_point() and not torch.equal(attended.to(mask), mask):
        raise ValueError(
            "attention_mask of shape (B, L) must hold 0 (padding) and 1, got other values of "
            f"{mask.dtype}: pass the mask that the processor made"
        )
    return attended


def check_pixels(family: Family, modality: str, inputs: Mapping[str, Any]) -> None:
    """Raises ValueError if the pixels are not a tensor."""
    name = str(family.pixels_name(modality, inputs))
    if not isinstance(inputs[name], Tensor):
        raise ValueError(
            f"{name} must be one tensor to be pruned, got a {type(inputs[name]).__name__}: pass "
            "what the processor returns with return_tensors='pt'"
        )


def visual_inputs(family: Family, call: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Modality to the arguments of its encoder, for modalities with pixels in the call.

    Raises:
        ValueError: pixels are not a tensor, or come with inputs_embeds.
    """
    visual = {}
    for modality in family.encoders:
        inputs = family.inputs_of(modality, call)
        if inputs is not None:
            check_pixels(family, modality, inputs)
            visual[modality] = inputs
    if visual and call.get("inputs_embeds") is not None:
        raise ValueError(
            "pruning needs input_ids with the pixels, got inputs_embeds: call vispruner.prepare, "
            "or omit the pixels"
        )
    return visual


def check_no_placeholders(family: Family, ids: Tensor) -> None:
    """Raises ValueError if a new prompt without pixels has placeholders."""
    if torch.compiler.is_compiling():  # reading values would break the graph
        return
    for modality in family.encoders:
        slots = int((ids == family.token_id(modality)).sum())
        if slots:
            raise ValueError(
                f"the prompt has {slots} {modality} placeholders but no {modality}s were passed"
            )
