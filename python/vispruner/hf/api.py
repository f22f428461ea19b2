"""The functions that prune a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vispruner_cuda import methods

from ..models import unwrapped
from ..selection import Budget
from .pruner import MODEL_ATTRIBUTE, Pruner


def apply(
    model: Any,
    k: int | str | Budget | None = None,
    *,
    ratio: float | None = None,
    method: str | None = None,
    important_ratio: float | None = None,
    step: int | None = None,
    seed: int | None = None,
    scope_alpha: float | None = None,
    mmr_lambda: float | None = None,
    mass: float | None = None,
    max_k: int | None = None,
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
            Budget instead of k, ratio, the method and its parameters. "auto": the number depends on
            the picture (docs/choosing-k.md); the host then waits for the scores in every call.
        ratio: or the share of tokens to retain, in (0, 1], where images differ in size.
        method: which tokens: "vispruner" (the default), "topk", "random", "maxmin", "scope" or
            "mmr" (docs/choosing-k.md).
        important_ratio: of vispruner: share of the retained tokens selected by attention, in
            [0, 1]; default 0.5.
        step: of vispruner: tokens that the deduplication drops per round; default 8.
        seed: of random; default 0.
        scope_alpha: of scope: exponent of the importance, a multiple of 0.25 in [0, 4]; default 1.
        mmr_lambda: of mmr: weight of the redundancy, in [0, 100]; default 1.
        mass: of k="auto": share of the attention that the retained tokens must hold if they were
            those with the highest scores, in (0, 1]; default 0.8.
        max_k: of k="auto": the largest k.
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
    given: dict[str, Any] = {
        "ratio": ratio,
        "important_ratio": important_ratio,
        "step": step,
        "seed": seed,
        "scope_alpha": scope_alpha,
        "mmr_lambda": mmr_lambda,
        "mass": mass,
        "max_k": max_k,
    }
    if not isinstance(k, Budget):
        budget = Budget(k, method=methods.DEFAULT if method is None else method, **given)
    elif method is not None or any(value is not None for value in given.values()):
        raise ValueError(f"pass only the Budget: method, {', '.join(given)} are fields of it")
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
