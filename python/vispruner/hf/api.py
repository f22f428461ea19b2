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

    The model's `forward` and `generate` keep their signatures and take the same inputs as before;
    `generate` returns sequences that begin with the prompt as it was passed.

    Args:
        model: a `...ForConditionalGeneration` model of a supported family, or one in PEFT's
            wrapper.
        k: tokens to keep of every image (of every tile of a tiled one, every frame of a video), or
            a Budget in place of k, ratio, important_ratio and step.
        ratio: or the share of tokens to keep, in (0, 1], where images differ in size.
        important_ratio: share of the kept tokens chosen by attention, in [0, 1].
        step: tokens that the deduplication drops a round.
        logits: where the logits of `forward` are: "kept", in the shortened prompt (B, W, V), or
            "prompt", in the columns of input_ids (B, L, V), a dropped column repeating the kept one
            before it. None is "prompt" in evaluation with labels in the call, otherwise "kept";
            training without labels in the call then raises.
        check: compare the scores of a random picture with those of eager attention first.
        **options: of the family, such as `tiles="all"` for LLaVA-NeXT.

    Raises:
        TypeError, ValueError: on a bad argument, or if the model is pruned already.
        UnsupportedModelError: (a ValueError) the model cannot be pruned, or its scores are not
            those of its attention.

    The model is as before if an error is raised.
    """
    if not isinstance(k, Budget):
        budget = Budget(k, ratio, important_ratio, step)
    elif ratio is not None or important_ratio != 0.5 or step != 8:
        raise ValueError("give a Budget alone: ratio, important_ratio and step are fields of it")
    else:
        budget = k
    return Pruner(model, budget, logits=logits, check=check, **options)


def prepare(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Pruned inputs of the language model, for callers who run it themselves.

    Args:
        model: a model with a pruner applied.
        inputs: what the processor made: input_ids (B, L), attention_mask, pixel_values, labels...

    Returns:
        Arguments of `model.model.language_model`: `inputs_embeds` (B, W, C), `attention_mask` and,
        where the family has them, `position_ids` and deepstack features. `labels`, where they were
        passed, come back shortened as well.

    Raises:
        ValueError: the model has no pruner, or the inputs do not fit together.
    """
    pruner = getattr(unwrapped(model), MODEL_ATTRIBUTE, None)
    if pruner is None:
        raise ValueError("this model is not pruned: call vispruner.apply(model, k=...) first")
    return pruner.prepare(inputs)


__all__ = ["apply", "prepare"]
