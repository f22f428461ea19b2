"""The functions that prune a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..models import unwrapped
from ..selection import Budget
from .pruner import MODEL_ATTRIBUTE, Pruner


def apply(
    model: Any,
    k: int | Budget | None = None,
    *,
    ratio: float | None = None,
    important_ratio: float = 0.5,
    step: int = 8,
    logits: str | None = None,
    check: bool = False,
    **options: str,
) -> Pruner:
    """Makes a transformers model prune its images, until `remove()` or the end of a `with` block.

    The signatures and inputs of the model's `forward` and `generate` do not change. `generate`
    returns sequences that begin with the full prompt.

    Args:
        model: a `...ForConditionalGeneration` model of a supported family, or one in PEFT's
            wrapper.
        k: tokens to retain per image (per tile of a tiled image, per frame of a video), or a
            Budget instead of k, ratio, important_ratio and step.
        ratio: or the share of tokens to retain, in (0, 1], where images differ in size.
        important_ratio: share of the retained tokens selected by attention, in [0, 1].
        step: tokens that the deduplication drops per round.
        logits: columns of the logits of `forward`: "kept" for the shortened prompt (B, W, V), or
            "prompt" for the columns of input_ids (B, L, V), where a dropped column repeats the
            last retained column before it. None means "prompt" in evaluation with labels in the
            call, otherwise "kept"; training without labels in the call is then an error.
        check: first compare the scores of a random picture with eager attention.
        **options: of the family, such as `tiles="all"` for LLaVA-NeXT.

    Raises:
        TypeError, ValueError: an invalid argument, or the model is already pruned.
        UnsupportedModelError: (a ValueError) the model cannot be pruned, or its scores do not match
            its attention.

    If an error is raised, the model is unchanged.
    """
    if not isinstance(k, Budget):
        budget = Budget(k, ratio, important_ratio, step)
    elif ratio is not None or important_ratio != 0.5 or step != 8:
        raise ValueError("pass only the Budget: ratio, important_ratio and step are fields of it")
    else:
        budget = k
    return Pruner(model, budget, logits=logits, check=check, **options)


def prepare(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Pruned inputs of the language model, for callers who run it directly.

    Args:
        model: a model with a pruner applied.
        inputs: from the processor: input_ids (B, L), attention_mask, pixel_values, labels...

    Returns:
        Arguments of `model.model.language_model`: `inputs_embeds` (B, W, C), `attention_mask` and,
        if the family has them, `position_ids` and deepstack features; and shortened `labels` if
        labels were passed.

    Raises:
        ValueError: the model has no pruner, or the inputs are inconsistent.
    """
    pruner = getattr(unwrapped(model), MODEL_ATTRIBUTE, None)
    if pruner is None:
        raise ValueError("this model is not pruned: call vispruner.apply(model, k=...) first")
    return pruner.prepare(inputs)


__all__ = ["apply", "prepare"]
