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
    parameters = inspect.signature(function).parameters.values()
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [one.name for one in parameters if one.name != "self" and one.kind in places]
    if len(args) > len(names):
        if any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters):
            raise TypeError(
                f"{len(args)} positional arguments were given to a function whose signature names "
                f"{len(names)}: pass them by name, so that images can be pruned"
            )
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


def in_rows(call: Mapping[str, Any], ids: Tensor, *, grid: bool) -> dict[str, Any]:
    """The call with one row of masks and positions for each row of the prompt.

    Args:
        call: the arguments; ids: (B, L) input_ids; grid: whether the model has positions of time,
            height and width (`Family.has_grid_positions`).

    Raises:
        ValueError: the numbers of rows differ, or the shape of input_ids or position_ids is wrong.
    """
    if ids.dim() != 2 or not ids.shape[1]:
        raise ValueError(f"input_ids must have shape (B, L), L > 0, got {tuple(ids.shape)}")
    batch, length = ids.shape
    expanded = dict(call)
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) != batch:
        if len(mask) != 1:
            raise ValueError(
                f"attention_mask has {len(mask)} rows, input_ids {batch}: pass one for each prompt"
            )
        expanded["attention_mask"] = mask.expand(batch, -1)
    given: Tensor | None = call.get("position_ids")
    if given is None:
        return expanded
    fits = given.dim() == 2 or (grid and given.dim() == 3 and len(given) in (3, 4))
    if not fits or given.shape[-2] not in (1, batch) or given.shape[-1] != length:
        of_grid = f" or (3, {batch}, {length})" if grid else ""
        raise ValueError(
            f"position_ids must have shape ({batch}, {length}){of_grid}, as input_ids, got "
            f"{tuple(given.shape)}"
        )
    return expanded | {"position_ids": given.expand(*given.shape[:-2], batch, -1)}


_PACKED_LENGTHS = (
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
)  # fmt: skip


def check_packed_lengths(call: Mapping[str, Any]) -> None:
    """Raises ValueError if the call has the lengths of packed prompts that pruning shortens."""
    for name in _PACKED_LENGTHS:
        if call.get(name) is not None:
            raise ValueError(
                f"{name} describes the prompt before images are pruned: omit it (position_ids that "
                "begin at 0 separate packed prompts), or pass the prompts as rows of a batch"
            )


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
