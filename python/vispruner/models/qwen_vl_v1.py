"""The first Qwen-VL: scores of its resampler's queries.

The model condenses the patches into 256 queries by one cross-attention. Its code is not part of
transformers, so it has no family: use this function for scores and `vispruner_cuda.prune` for the
selection.
"""

from __future__ import annotations

import torch
from torch import Tensor


def resampled_scores(patch_scores: Tensor, attention: Tensor) -> Tensor:
    """Scores of a resampler's queries, from the scores of the patches that they attend to.

    The score of a query is the mean score of the patches, weighted by its attention to them.

    Args:
        patch_scores: (B, N) scores of the encoder's patches.
        attention: (B, M, N) attention of the M queries to the patches, averaged over heads, or
            (B, H, M, N) per head; rows sum to 1.

    Returns:
        (B, M) float32, for `vispruner_cuda.prune(queries, scores, k)` on the resampler's output.

    Raises:
        ValueError: the shapes do not match.

    Example:
        >>> import vispruner_cuda
        >>> patches, queries = torch.rand(1, 1024), torch.randn(1, 256, 64)
        >>> attention = torch.rand(1, 256, 1024).softmax(-1)
        >>> kept = vispruner_cuda.prune(queries, resampled_scores(patches, attention), k=64)
        >>> kept.feats.shape
        torch.Size([1, 64, 64])
    """
    if attention.dim() == 4:
        attention = attention.float().mean(1)
    if attention.dim() != 3 or patch_scores.shape != (attention.shape[0], attention.shape[2]):
        raise ValueError(
            "attention must have shape (B, M, N) or (B, H, M, N) for patch_scores (B, N), got "
            f"{tuple(attention.shape)} and {tuple(patch_scores.shape)}"
        )
    return torch.einsum("bmn,bn->bm", attention.float(), patch_scores.float())
