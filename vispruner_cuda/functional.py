"""The public functions: argument checks, then one operator call each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import _checks, methods
from ._results import PruneResult, PruneVarlenResult, TopkResult
from .reference import gather_tokens

# Looking up an operator takes a noticeable part of a small call.
_topk = torch.ops.vispruner.topk.default
_pairwise_cosine = torch.ops.vispruner.pairwise_cosine.default
_dedup = torch.ops.vispruner.dedup.default
_prune = torch.ops.vispruner.prune.default
_prune_varlen = torch.ops.vispruner.prune_varlen.default
_prune_by = torch.ops.vispruner.prune_by.default
_prune_varlen_by = torch.ops.vispruner.prune_varlen_by.default
_cls_attention = torch.ops.vispruner.cls_attention.default
_received_attention = torch.ops.vispruner.received_attention.default


# The name is private. Without it every call counts as transformed, which is slower and also right.
_innermost_transform = getattr(
    getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: True
)


def _transformed() -> bool:
    """Whether a transform of torch.func runs, whose tensors may hide requires_grad."""
    return _innermost_transform() is not None


def differentiated(feats: Tensor) -> bool:
    """Whether a derivative may pass through feats, in reverse or forward mode.

    The operators have no derivatives: rows of feats must then be taken by torch's own gather.
    """
    return (
        (feats.requires_grad and torch.is_grad_enabled())
        # The level and not the tangent: inside nested transforms feats hides that of an outer one.
        # The name is private: without it every call gathers.
        or getattr(forward_ad, "_current_level", 0) >= 0
        # A traced torch.func.grad or jvp does not show in feats.
        or is_compiling()
        # Nor does the requires_grad of a tensor outside of vmap.
        or _transformed()
    )


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad or _transformed() else tensor


def _plain(tensors: tuple[Tensor, ...], numbers: tuple[Any, ...]) -> bool:
    """Whether the operator rejects all invalid arguments of these types.

    The operators of fake and meta tensors check nothing.
    """
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.requires_grad or tensor.is_meta:
            return False
    for number in numbers:
        if type(number) is not int and type(number) is not float:
            return False
    return not is_compiling() and not _transformed()


def _call(
    operator: Callable[..., Any],
    check: Callable[..., tuple[Any, ...]],
    tensors: tuple[Tensor, ...],
    numbers: tuple[Any, ...],
) -> Any:
    """Calls an operator with arguments that pass `check`.

    With plain arguments the check runs only if the operator rejects them, for a clearer message.
    """
    if _plain(tensors, numbers):
        try:
            return operator(*tensors, *numbers)
        except Exception:
            check(*tensors, *numbers)
            raise
    numbers = check(*tensors, *numbers)
    return operator(*map(_detached, tensors), *numbers)


def topk(cls_attn: Tensor, k: int) -> TopkResult:
    """The k tokens with the highest [CLS] attention, in ranking order.

    The score of a token is its attention summed over heads (the method averages them, which
    ranks the same); ties go to the lower token index and NaN ranks last.

    Args:
        cls_attn: (B, N) or (B, H, N), float16, bfloat16 or float32, any strides; N <= 32768.
        k: tokens to return, at least 1; all N if k >= N.

    Returns:
        TopkResult: `scores` (B, min(k, N)) float32 head sums and `indices` (B, min(k, N)) int64.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value.

    Source: VisPruner (arXiv 2412.01818), section 3.2; docs/numerics.md, "Score".
    """
    return TopkResult(*_call(_topk, _checks.topk, (cls_attn,), (k,)))


def pairwise_cosine(feats: Tensor) -> Tensor:
    """Cosine similarity of every pair of tokens, from exact 12-bit integer inner products.

    Row i holds the similarities that the dedup loop uses when token i is in A, so the matrix
    is symmetric up to the last bit only. A token that is all zeros, or holds a NaN or Inf, has
    cosine 0 with everything.

    Args:
        feats: (B, N, C), float16, bfloat16 or float32; N <= 32768.

    Returns:
        (B, N, N) float32, bitwise the same on every device.

    Raises:
        TypeError, ValueError: as for `topk`.

    Source: docs/numerics.md, "Gram" and "Redundancy".
    """
    return _call(_pairwise_cosine, _checks.pairwise_cosine, (feats,), ())


def dedup(feats: Tensor, k: int, *, step: int = 8) -> Tensor:
    """Drops near-duplicates until k tokens are left: the diverse half of the method only.

    Every round splits the list into even and odd positions (A and B), ranks A by its largest
    cosine similarity to B, drops the `step` most redundant tokens and continues with the rest of A,
    in that order, followed by B.

    Args:
        feats: (B, N, C) tokens *in ranking order*, most important first; dtypes as for
            `prune`.
        k: tokens to keep, at least 1; all N if k >= N.
        step: tokens to drop per round, at least 1.

    Returns:
        (B, min(k, N)) int64 positions in `feats`, ascending.

    Raises:
        TypeError, ValueError: as for `topk`.

    Source: VisPruner (arXiv 2412.01818), section 3.3; docs/numerics.md, "The loop".
    """
    return _call(_dedup, _checks.dedup, (feats,), (k, step))


def _check_vispruner(
    feats: Tensor, cls_attn: Tensor, k: object, important_ratio: object, step: object
) -> tuple[int, float, float]:
    ratio, rounds = methods.IMPORTANT_RATIO.check(important_ratio), methods.STEP.check(step)
    return *_checks.prune(feats, cls_attn, k), ratio, rounds


def _parameter(values: Mapping[str, float]) -> float:
    """The single parameter of a method as the operators take it; 0 for methods without one."""
    return float(next(iter(values.values()), 0.0))


def prune(
    feats: Tensor,
    cls_attn: Tensor,
    k: int,
    *,
    method: str = methods.DEFAULT,
    important_ratio: float | None = None,
    step: int | None = None,
    seed: int | None = None,
    scope_alpha: float | None = None,
    mmr_lambda: float | None = None,
) -> PruneResult:
    """Keeps the k most useful visual tokens, chosen from visual information only.

    With the default method, VisPruner, `int(k * important_ratio)` tokens are kept for their [CLS]
    attention; the others are deduplicated by cosine similarity until k are kept in total. The
    result is the same on every device, in every batch and with every compiler (docs/numerics.md).

    Args:
        feats: (B, N, C) patch features of the encoder layer, float16, bfloat16 or float32; N <=
            32768. Strided batches and tokens (`hidden[:, 1:]`) are read in place.
        cls_attn: (B, N) scores or (B, H, N) [CLS] attention of each head, on the same device; the
            dtype may differ from that of feats.
        k: visual tokens to keep per image, at least 1; all N if k >= N.
        method: "vispruner", "topk", "random", "maxmin", "scope" or "mmr" (`methods.METHODS` and
            docs/choosing-k.md describe them). Each parameter below belongs to one method; None
            selects its default.
        important_ratio: of vispruner: share of k kept by score, in [0, 1]; default 0.5.
        step: of vispruner: tokens the dedup loop drops per round, at least 1; default 8.
        seed: of random: an int in [0, 2**32); default 0. With the same seed an image loses the same
            tokens at any place in a batch.
        scope_alpha: of scope: exponent of the importance, a multiple of 0.25 in [0, 4]; default 1.
        mmr_lambda: of mmr: weight of the redundancy, in [0, 100]; default 1.

    Returns:
        PruneResult: `feats` (B, min(k, N), C) in the dtype of the input and `indices`
        (B, min(k, N)) int64, ascending. The returned features are differentiable in feats (an
        ordinary gather), in reverse and in forward mode; the choice of tokens is not.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device, or belongs to another method.

    Source: VisPruner (arXiv 2412.01818), section 3; for the other methods `methods.METHODS`;
    docs/numerics.md.
    """
    if method == methods.DEFAULT and seed is scope_alpha is mmr_lambda is None:
        ratio = methods.IMPORTANT_RATIO.default if important_ratio is None else important_ratio
        rounds = methods.STEP.default if step is None else step
        kept, indices = _call(_prune, _check_vispruner, (feats, cls_attn), (k, ratio, rounds))
    else:
        values = methods.resolve(
            method,
            important_ratio=important_ratio,
            step=step,
            seed=seed,
            scope_alpha=scope_alpha,
            mmr_lambda=mmr_lambda,
        )
        (k,) = _checks.prune(feats, cls_attn, k)
        kept, indices = _prune_by(
            _detached(feats), _detached(cls_attn), k, method, _parameter(values)
        )
    if differentiated(feats):
        kept = gather_tokens(feats, indices)
    return PruneResult(kept, indices)


def prune_varlen(
    feats: Tensor,
    cls_attn: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    k: int | Sequence[int] | Tensor,
    *,
    method: str = methods.DEFAULT,
    important_ratio: float | None = None,
    step: int | None = None,
    seed: int | None = None,
    scope_alpha: float | None = None,
    mmr_lambda: float | None = None,
) -> PruneVarlenResult:
    """`prune` for images of different size, packed one after the other.

    Args:
        feats: (T, C) packed patch features; dtypes as in `prune`.
        cls_attn: (T,) or (H, T), packed in the same way.
        cu_seqlens: image i is rows cu_seqlens[i] to cu_seqlens[i + 1]; ints, or an integer tensor
            on the CPU (with a tensor on the GPU the host would wait for the device).
        k: tokens to keep, one int for all images or one per image, on the host, at least 1.
        method: of all images, with its parameters, as in `prune`.

    Returns:
        PruneVarlenResult: `feats` (T', C), `indices` (T',) int64 rows of the packed input, and the
        new `cu_seqlens` as a tuple of ints.

    Raises:
        TypeError, ValueError: as for `prune`.
    """
    values = methods.resolve(
        method,
        important_ratio=important_ratio,
        step=step,
        seed=seed,
        scope_alpha=scope_alpha,
        mmr_lambda=mmr_lambda,
    )
    bounds, ks = _checks.prune_varlen(feats, cls_attn, cu_seqlens, k)
    packed = (_detached(feats), _detached(cls_attn), bounds, ks)
    if method == methods.DEFAULT:
        kept, indices = _prune_varlen(*packed, values["important_ratio"], values["step"])
    else:
        kept, indices = _prune_varlen_by(*packed, method, _parameter(values))
    if differentiated(feats):
        kept = feats[indices]
    kept_bounds = [0]
    for start, end, k_image in zip(bounds[:-1], bounds[1:], ks, strict=True):
        kept_bounds.append(kept_bounds[-1] + min(k_image, end - start))
    return PruneVarlenResult(kept, indices, tuple(kept_bounds))


def cls_attention(q_cls: Tensor, k: Tensor, scale: float) -> Tensor:
    """[CLS]-to-patch attention, without materializing the attention matrix.

    The softmax runs over all keys, [CLS] included; its own column is dropped and the heads are
    averaged. The encoder can keep using FlashAttention or SDPA.

    Args:
        q_cls: (B, H, D) the query of [CLS], float16, bfloat16 or float32.
        k: (B, H, 1 + N, D) keys of the same layer, [CLS] first, in the same dtype; any strides
            (`k.view(B, T, H, D).transpose(1, 2)` needs no copy).
        scale: factor of the logits, usually D ** -0.5.

    Returns:
        (B, N) float32, from float32 arithmetic; the same for an image alone and in any batch. Pass
        it to `prune` as `cls_attn`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, value or device.

    Source: VisPruner (arXiv 2412.01818), section 3.2.
    """
    return _call(_cls_attention, _checks.cls_attention, (q_cls, k), (scale,))


def received_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """The attention that each token receives, averaged over queries and heads: the score for
    encoders without [CLS] (SigLIP, Qwen2-VL and later).

    Column means of softmax(q k^T * scale) in memory linear in the tokens.

    Args:
        q: (T, H, D) packed queries after any rotary embedding, float16, bfloat16 or float32; at
            most 32768 tokens per image, and D <= 256.
        k: (T, H, D) keys of the same layout and dtype.
        scale: factor of the logits, usually D ** -0.5.
        cu_seqlens: image i is rows cu_seqlens[i] to cu_seqlens[i + 1], on the host; None: all
            rows are one image.
        lse: (H, T) float32 log-sum-exp of each query's logits, as a flash forward returns it. It
            saves one of two passes over q k^T.

    Returns:
        (T,) float32, from float32 arithmetic; the scores of each image sum to 1.

    Raises:
        TypeError, ValueError: as for `cls_attention`.

    Source: VisPruner (arXiv 2412.01818), the authors' recipe for encoders without [CLS].
    """
    scale, bounds = _checks.received_attention(q, k, scale, cu_seqlens, lse)
    return _received_attention(
        _detached(q), _detached(k), scale, bounds, None if lse is None else _detached(lse)
    )
