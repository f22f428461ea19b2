"""Results of the functions: named tuples, so that they unpack, trace and compile."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TopkResult(NamedTuple):
    """Tokens with the highest scores.

    Attributes:
        scores: (B, min(k, N)) float32, highest first: heads *summed*, NaN as -inf.
        indices: (B, min(k, N)) int64 token indices in the same order.
    """

    scores: Tensor
    indices: Tensor


class PruneResult(NamedTuple):
    """Retained tokens of a batch of images with equally many tokens.

    Attributes:
        feats: (B, min(k, N), C) retained features, in the dtype of the input.
        indices: (B, min(k, N)) int64, ascending: `feats[b] == input[b, indices[b]]`.
    """

    feats: Tensor
    indices: Tensor


class PruneVarlenResult(NamedTuple):
    """Retained tokens of packed images.

    Attributes:
        feats: (T', C) retained features, in the dtype of the input.
        indices: (T',) int64 rows of the packed input, ascending: `feats == input[indices]`.
        cu_seqlens: image i is `feats[cu_seqlens[i]:cu_seqlens[i + 1]]`.
    """

    feats: Tensor
    indices: Tensor
    cu_seqlens: tuple[int, ...]
