"""Argument checks, with the same messages for every backend.

TypeError for types and dtypes, ValueError for shapes and values. Each message names the
argument, what it was and what was expected. Checks read metadata only, never a tensor's values, so
the host does not wait for the device (NaN and Inf inside tensors are defined behaviour,
docs/numerics.md).

The check of a function returns its numbers as Python's int and float, because NumPy's small
integers wrap around and its small floats round.
"""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Tokens of one image: token positions are 16-bit integers inside the kernels.
MAX_TOKENS = 32768

#: Channels of a token: sums of digit products are 32-bit integers inside the kernels.
MAX_CHANNELS = 2**18 - 1

#: Heads of an attention: they are a dimension of the kernels' grid.
MAX_HEADS = 65535

#: Channels of an attention head: a tile of them must fit shared memory.
MAX_HEAD_DIM = 256

#: The largest int of the operators.
MAX_INT = 2**63 - 1

_MAX_FLOAT = torch.finfo(torch.float32).max  # of the kernels
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_DTYPE_NAMES = "torch.float16, torch.bfloat16 or torch.float32"


def shown(value: object, form: Callable[[object], str] = str) -> str:
    """A value in one short line."""
    try:
        text = " ".join(form(value).split())
    except ValueError:  # Python does not print ints of thousands of digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= 100 else text[:97] + "..."


def describe(value: object) -> str:
    """A value and its type in one short line."""
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"a tensor of shape {tuple(value.shape)}"
    kind, shape = type(value), getattr(value, "shape", ())
    if shape:  # an array, whose elements say little
        return f"{kind.__module__}.{kind.__name__} of shape {shape}"
    return f"{shown(value, repr)} ({kind.__name__})"


def _dense(name: str, value: Tensor) -> None:
    if value.is_nested:
        raise TypeError(f"{name} must be a dense (strided) tensor, got a nested one")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")


def _tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}")
    _dense(name, value)
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name} must have dtype {_DTYPE_NAMES}, got {value.dtype}")


def _as_int(value: Any) -> int:
    return value if isinstance(value, torch.SymInt) else int(value)  # type: ignore[return-value]


def integer(name: str, value: object, minimum: int, maximum: int = MAX_INT) -> int:
    # The usual type first: abstract base classes are slow.
    integral = type(value) is int or isinstance(value, (numbers.Integral, torch.SymInt))
    if not integral or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if value < minimum:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least {minimum}, got {shown(value)}")
    if value > maximum:  # type: ignore[operator]
        raise ValueError(f"{name} must be at most {maximum}, got {shown(value)}")
    return _as_int(value)


def number(name: str, value: object, low: float, high: float, step: float | None = None) -> float:
    real = type(value) is float or isinstance(value, (numbers.Real, torch.SymFloat))
    if not real or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {describe(value)}")
    if not low <= value <= high:  # type: ignore[operator]  # also false for NaN
        raise ValueError(f"{name} must be in [{low}, {high}], got {shown(value)}")
    if step is not None and value % step != 0:  # type: ignore[operator]
        raise ValueError(f"{name} must be a multiple of {step}, got {shown(value)}")
    return float(value)  # type: ignore[arg-type]


def _heads(name: str, heads: int) -> None:
    if heads < 1:
        raise ValueError(f"{name} must have at least one head")
    if heads > MAX_HEADS:
        raise ValueError(f"{name} has {heads} heads, at most {MAX_HEADS} are supported")


def _tokens(name: str, n: int) -> None:
    if n > MAX_TOKENS:
        raise ValueError(
            f"{name} has {shown(n)} tokens per image, at most {MAX_TOKENS} are supported"
        )


def _feats(feats: object) -> None:
    _tensor("feats", feats)
    if feats.dim() != 3:  # type: ignore[attr-defined]
        raise ValueError(f"feats must have shape (B, N, C), got {describe(feats)}")
    _batched_feats(feats)  # type: ignore[arg-type]


def _batched_feats(feats: Tensor) -> None:
    _tokens("feats", feats.shape[1])
    _channels(feats)


def _channels(feats: Tensor) -> None:
    if feats.shape[-1] < 1:
        raise ValueError(f"feats must have at least one channel, got {describe(feats)}")
    if feats.shape[-1] > MAX_CHANNELS:
        raise ValueError(
            f"feats has {feats.shape[-1]} channels, at most {MAX_CHANNELS} are supported"
        )


def _cls_attn(cls_attn: object) -> None:
    _tensor("cls_attn", cls_attn)
    if cls_attn.dim() not in (2, 3):  # type: ignore[attr-defined]
        raise ValueError(f"cls_attn must have shape (B, N) or (B, H, N), got {describe(cls_attn)}")
    if cls_attn.dim() == 3:  # type: ignore[attr-defined]
        _heads("cls_attn", cls_attn.shape[1])  # type: ignore[attr-defined]
    _tokens("cls_attn", cls_attn.shape[-1])  # type: ignore[attr-defined]


def _same_device(feats: Tensor, cls_attn: Tensor) -> None:
    if feats.device != cls_attn.device:
        raise ValueError(
            "cls_attn must be on the device of feats, "
            f"got feats on {feats.device} and cls_attn on {cls_attn.device}"
        )


def topk(cls_attn: object, k: object) -> tuple[int]:
    _cls_attn(cls_attn)
    return (integer("k", k, 1),)


def pairwise_cosine(feats: object) -> tuple[()]:
    _feats(feats)
    return ()


def dedup(feats: object, k: object, step: object) -> tuple[int, int]:
    _feats(feats)
    return integer("k", k, 1), integer("step", step, 1)


def prune(feats: Tensor, cls_attn: Tensor, k: object) -> tuple[int]:
    _feats(feats)
    _cls_attn(cls_attn)
    expected = (feats.shape[0], feats.shape[1])
    if (cls_attn.shape[0], cls_attn.shape[-1]) != expected:
        raise ValueError(
            f"cls_attn must have shape ({expected[0]}, {expected[1]}) or "
            f"({expected[0]}, H, {expected[1]}) to match feats of shape {tuple(feats.shape)}, "
            f"got {describe(cls_attn)}"
        )
    _same_device(feats, cls_attn)
    return (integer("k", k, 1),)


def _host_ints(name: str, value: object) -> list[int]:
    """A list of ints from a sequence or a CPU integer tensor."""
    if isinstance(value, Tensor):
        _dense(name, value)
        kind = value.dtype
        if value.dim() != 1 or kind.is_floating_point or kind.is_complex or kind == torch.bool:
            raise TypeError(
                f"{name} must be a sequence of ints or a 1-D integer tensor on the CPU, "
                f"got {describe(value)} of dtype {value.dtype}"
            )
        if value.device.type != "cpu":
            raise ValueError(
                f"{name} must be on the host, got a tensor on {value.device}: reading it would "
                "make the host wait for the device (keep the lengths as a list, or call .tolist())"
            )
        return value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be a sequence of ints, got {describe(value)}")
    for item in value:
        if not isinstance(item, (numbers.Integral, torch.SymInt)) or isinstance(item, bool):
            raise TypeError(f"{name} must hold ints, got {describe(item)}")
    return [_as_int(item) for item in value]


def _bounds(cu_seqlens: object, packed: str, rows: int) -> list[int]:
    """cu_seqlens as a list, for `rows` packed rows of the argument `packed`."""
    bounds = _host_ints("cu_seqlens", cu_seqlens)
    if not bounds or bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(
            f"cu_seqlens must begin with 0 and end with {rows}, the number of rows of {packed}, "
            f"got {shown(bounds)}"
        )
    for start, end in itertools.pairwise(bounds):
        if end < start:
            raise ValueError(f"cu_seqlens must not decrease, got {shown(bounds)}")
        _tokens(packed, end - start)
    return bounds


def prune_varlen(
    feats: Tensor,
    cls_attn: Tensor,
    cu_seqlens: object,
    k: object,
) -> tuple[list[int], list[int]]:
    """Checks the arguments and returns (bounds of the images, k of each image)."""
    _tensor("feats", feats)
    if feats.dim() != 2:
        raise ValueError(f"feats must have shape (T, C), got {describe(feats)}")
    _channels(feats)
    _tensor("cls_attn", cls_attn)
    if cls_attn.dim() not in (1, 2) or cls_attn.shape[-1] != feats.shape[0]:
        raise ValueError(
            f"cls_attn must have shape ({feats.shape[0]},) or (H, {feats.shape[0]}) to match "
            f"feats of shape {tuple(feats.shape)}, got {describe(cls_attn)}"
        )
    if cls_attn.dim() == 2:
        _heads("cls_attn", cls_attn.shape[0])
    _same_device(feats, cls_attn)

    bounds = _bounds(cu_seqlens, "feats", feats.shape[0])

    images = len(bounds) - 1
    if isinstance(k, (Sequence, Tensor)) and not isinstance(k, (str, bytes)):
        ks = _host_ints("k", k)
        if len(ks) != images:
            raise ValueError(f"k must be one int or one per image ({images}), got {len(ks)} values")
        for value in ks:
            integer("k", value, 1)
    else:
        ks = [integer("k", k, 1)] * images
    return bounds, ks


def _scale(scale: object) -> float:
    real = type(scale) is float or isinstance(scale, (numbers.Real, torch.SymFloat))
    if not real or isinstance(scale, bool):
        raise TypeError(f"scale must be a float, got {describe(scale)}")
    try:
        finite = abs(float(scale)) <= _MAX_FLOAT  # type: ignore[arg-type]  # false for NaN
    except OverflowError:  # of an int or a fraction
        finite = False
    if not finite:
        raise ValueError(f"scale must be finite in float32, got {shown(scale)}")
    return float(scale)  # type: ignore[arg-type]


def _same_kind(name: str, tensor: Tensor, other: str, like: Tensor) -> None:
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {other}, {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {other}, {like.device}, got {tensor.device}"
        )


def cls_attention(q_cls: Tensor, k: Tensor, scale: object) -> tuple[float]:
    _tensor("q_cls", q_cls)
    if q_cls.dim() != 3 or 0 in q_cls.shape[1:]:
        raise ValueError(f"q_cls must have shape (B, H, D), got {describe(q_cls)}")
    _heads("q_cls", q_cls.shape[1])
    _tensor("k", k)
    expected = (q_cls.shape[0], q_cls.shape[1], q_cls.shape[2])
    if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != expected or k.shape[2] < 1:
        raise ValueError(
            f"k must have shape ({expected[0]}, {expected[1]}, 1 + N, {expected[2]}) to match "
            f"q_cls of shape {tuple(q_cls.shape)}, got {describe(k)}"
        )
    _tokens("k", k.shape[2] - 1)
    _same_kind("k", k, "q_cls", q_cls)
    return (_scale(scale),)


def received_attention(
    q: Tensor, k: Tensor, scale: object, cu_seqlens: object, lse: object
) -> tuple[float, list[int]]:
    """Checks the arguments and returns (scale, bounds of the images)."""
    _tensor("q", q)
    if q.dim() != 3 or 0 in q.shape[1:]:
        raise ValueError(f"q must have shape (T, H, D), got {describe(q)}")
    _heads("q", q.shape[1])
    if q.shape[2] > MAX_HEAD_DIM:
        raise ValueError(f"q must have at most {MAX_HEAD_DIM} channels per head, got {describe(q)}")
    _tensor("k", k)
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {tuple(q.shape)}, got {describe(k)}")
    _same_kind("k", k, "q", q)
    factor = _scale(scale)
    bounds = [0, q.shape[0]] if cu_seqlens is None else _bounds(cu_seqlens, "q", q.shape[0])
    if lse is not None:
        if not isinstance(lse, Tensor):
            raise TypeError(f"lse must be a torch.Tensor or None, got {describe(lse)}")
        _dense("lse", lse)
        if lse.dtype != torch.float32:
            raise TypeError(f"lse must have dtype torch.float32, got {lse.dtype}")
        if tuple(lse.shape) != (q.shape[1], q.shape[0]):
            raise ValueError(
                f"lse must have shape (H, T) = ({q.shape[1]}, {q.shape[0]}), got {describe(lse)}"
            )
        if lse.device != q.device:
            raise ValueError(f"lse must be on the device of q, {q.device}, got {lse.device}")
    return factor, bounds
