"""Prune images of different sizes in one call, with a k per image.

python examples/batch_with_different_k.py
"""

import torch

import vispruner_cuda

device = "cuda" if torch.cuda.is_available() else "cpu"
generator = torch.Generator().manual_seed(0)
lengths = [576, 1024, 196]  # patches of each image
ks = [64, 128, 16]  # visual tokens to retain of each

feats = torch.randn(sum(lengths), 1024, generator=generator).to(device)  # (T, C), packed
scores = torch.rand(sum(lengths), generator=generator).to(
    device
)  # (T,): [CLS] or received attention
bounds = [0]
for length in lengths:
    bounds.append(bounds[-1] + length)

kept = vispruner_cuda.prune_varlen(feats, scores, bounds, ks)
for i, (start, end) in enumerate(zip(kept.cu_seqlens[:-1], kept.cu_seqlens[1:], strict=True)):
    patches = kept.indices[start:end] - bounds[i]
    print(f"image {i}: {lengths[i]} -> {end - start} tokens, first patches {patches[:5].tolist()}")

# Each image retains the same tokens as in a separate call.
alone = vispruner_cuda.prune(feats[:576].unsqueeze(0), scores[:576].unsqueeze(0), k=64)
assert torch.equal(alone.indices[0], kept.indices[:64])
