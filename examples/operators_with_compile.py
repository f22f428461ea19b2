"""Use the operators in a compiled model, without graph breaks, and compare with the reference.

python examples/operators_with_compile.py
"""

import torch
from torch import Tensor, nn

import vispruner_cuda


class PrunedProjector(nn.Module):
    """Retains k patches of a vision encoder's features and projects them."""

    def __init__(self, channels: int, width: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.linear = nn.Linear(channels, width)

    def forward(self, feats: Tensor, q_cls: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """feats (B, N, C); q_cls (B, H, D), keys (B, H, 1 + N, D) of the feature layer."""
        scores = vispruner_cuda.cls_attention(q_cls, keys, q_cls.shape[-1] ** -0.5)
        kept, indices = vispruner_cuda.prune(feats, scores, k=self.k)
        return self.linear(kept), indices


device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
projector = PrunedProjector(1024, 256, k=64).to(device)
feats = torch.randn(2, 576, 1024, device=device)
q_cls, keys = torch.randn(2, 16, 64, device=device), torch.randn(2, 16, 577, 64, device=device)

compiled = torch.compile(projector, fullgraph=True)
output, indices = compiled(feats, q_cls, keys)
print("output", tuple(output.shape), "indices", tuple(indices.shape))

scores = vispruner_cuda.cls_attention(q_cls, keys, 64**-0.5)
want = vispruner_cuda.reference.prune(feats, scores, k=64)
assert torch.equal(indices, want.indices)
output.sum().backward()  # retained features have gradients
print("gradient of the projector:", tuple(projector.linear.weight.grad.shape))
