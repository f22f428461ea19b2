"""An image's tokens do not depend on the rest of the batch or on the number of runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.compiled_kernels import Kernels
from support.problems import FEATURE_KINDS, Problem

import vispruner_cuda
from vispruner_cuda import methods, reference


def images(count: int, tokens: int = 90, channels: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch in which every image has different features."""
    parts = [
        Problem(
            1, tokens, channels, 2, 12, features=FEATURE_KINDS[i % len(FEATURE_KINDS)], seed=i
        ).tensors()
        for i in range(count)
    ]
    return torch.cat([f for f, _ in parts]), torch.cat([a for _, a in parts])


@pytest.mark.parametrize("method", methods.METHODS)
def test_alone_in_a_batch_and_packed_are_the_same(
    method: str, implementations: dict[str, Any]
) -> None:
    feats, attn = images(12)
    for name, implementation in {"reference": reference, **implementations}.items():
        batch = implementation.prune(feats, attn, 12, method=method)
        packed = implementation.prune_varlen(
            feats.flatten(0, 1),
            attn.transpose(0, 1).flatten(1),
            list(range(0, 12 * 90 + 1, 90)),
            12,
            method=method,
        )
        for i in range(12):
            alone = implementation.prune(feats[i : i + 1], attn[i : i + 1], 12, method=method)
            assert torch.equal(alone.indices[0], batch.indices[i]), name
            rows = slice(packed.cu_seqlens[i], packed.cu_seqlens[i + 1])
            assert torch.equal(packed.indices[rows] - 90 * i, batch.indices[i]), name


def test_repeated_runs_are_the_same(implementations: dict[str, Any]) -> None:
    feats, attn = images(3)
    for name, implementation in implementations.items():
        first = implementation.prune(feats, attn, 12)
        for _ in range(3 if name.startswith("compiled") else 20):
            assert torch.equal(implementation.prune(feats, attn, 12).indices, first.indices), name


def test_images_of_very_different_size(implementations: dict[str, Any]) -> None:
    lengths = [1, 300, 0, 33, 2, 129, 64, 0]
    ks = [5, 40, 3, 33, 1, 1, 63, 9]
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    feats, attn = (t[0] for t in Problem(1, bounds[-1], 48, 3, 1, features="smooth").tensors())
    expected = reference.prune_varlen(feats, attn, bounds, ks)
    for name, implementation in implementations.items():
        got = implementation.prune_varlen(feats, attn, torch.tensor(bounds), ks)
        assert torch.equal(got.indices, expected.indices), name
        assert torch.equal(got.feats, expected.feats), name
        assert got.cu_seqlens == expected.cu_seqlens, name


def test_more_ragged_images_than_a_launch_parameter_holds(implementations: dict[str, Any]) -> None:
    count, tokens = 130, 5
    feats, attn = (t[0] for t in Problem(1, count * tokens, 8, None, 1).tensors())
    bounds = list(range(0, count * tokens + 1, tokens))
    expected = reference.prune_varlen(feats, attn, bounds, 3)
    for name, implementation in implementations.items():
        got = implementation.prune_varlen(feats, attn, bounds, 3)
        assert torch.equal(got.indices, expected.indices), name


@pytest.mark.parametrize("method", methods.METHODS)
def test_waves_of_methods(method: str, compiled: Kernels) -> None:
    compiled.workspace_limit = 100_000
    feats, attn = images(7)
    expected = reference.prune(feats, attn, 12, method=method)
    assert torch.equal(compiled.prune(feats, attn, 12, method=method).indices, expected.indices)


@pytest.mark.parametrize("workspace_limit", [1, 100_000, 300_000])
def test_waves(workspace_limit: int, compiled: Kernels) -> None:
    """A workspace too small for the batch only causes more launches."""
    compiled.workspace_limit = workspace_limit
    feats, attn = images(7)
    expected = reference.prune(feats, attn, 12)
    assert torch.equal(compiled.prune(feats, attn, 12).indices, expected.indices)
    bounds = [0, 90, 100, 300, 300, 500, 630]
    flat, flat_attn = feats.flatten(0, 1), attn.transpose(0, 1).flatten(1)
    packed = reference.prune_varlen(flat, flat_attn, bounds, 12)
    assert torch.equal(compiled.prune_varlen(flat, flat_attn, bounds, 12).indices, packed.indices)
    assert torch.equal(compiled.pairwise_cosine(feats), reference.pairwise_cosine(feats))


def test_stages_compose_to_prune() -> None:
    feats, attn = images(5)
    k, k_important = 12, 6
    ranking = vispruner_cuda.topk(attn, 90).indices
    important, residual = ranking[:, :k_important], ranking[:, k_important:]
    candidates = feats.gather(1, residual.unsqueeze(-1).expand(-1, -1, feats.shape[2]))
    diverse = residual.gather(1, vispruner_cuda.dedup(candidates, k - k_important))
    kept = torch.cat([important, diverse], dim=1).sort(dim=1).values
    assert torch.equal(kept, vispruner_cuda.prune(feats, attn, k).indices)


@pytest.mark.parametrize("shape", [(0, 10, 4), (2, 0, 4), (0, 0, 4)])
def test_empty(shape: tuple[int, int, int], implementations: dict[str, Any]) -> None:
    feats, attn = torch.randn(shape), torch.rand(shape[:2])
    for implementation in (reference, *implementations.values()):
        for method in methods.METHODS:
            kept = implementation.prune(feats, attn, 3, method=method)
            assert kept.indices.shape == (shape[0], min(3, shape[1]))
        kept = implementation.prune(feats, attn, 3)
        rows = min(3, shape[1])
        assert kept.feats.shape == (shape[0], rows, 4)
        assert kept.indices.shape == (shape[0], rows)
        assert implementation.topk(attn, 3).indices.shape == (shape[0], rows)
        assert implementation.dedup(feats, 3).shape == (shape[0], rows)
        assert implementation.pairwise_cosine(feats).shape == (shape[0], shape[1], shape[1])
    packed = vispruner_cuda.prune_varlen(torch.randn(0, 4), torch.rand(0), [0], 3)
    assert packed.cu_seqlens == (0,)
    assert packed.feats.shape == (0, 4)


@pytest.mark.parametrize("k", [575, 576, 577])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_k_near_n(k: int, ratio: float, implementations: dict[str, Any]) -> None:
    feats, attn = Problem(1, 576, 16, 2, k).tensors()
    expected = reference.prune(feats, attn, k, important_ratio=ratio)
    for name, implementation in implementations.items():
        got = implementation.prune(feats, attn, k, important_ratio=ratio)
        assert torch.equal(got.indices, expected.indices), name
        assert torch.equal(got.feats, expected.feats), name


@pytest.mark.slow
def test_sixteen_thousand_tokens(implementations: dict[str, Any]) -> None:
    problem = Problem(1, 16384, 8, None, 64, step=4096, features="clustered", dtype=torch.float16)
    feats, attn = problem.tensors()
    expected = reference.prune(feats, attn, 64, step=4096)
    for name, implementation in implementations.items():
        if not name.startswith("compiled"):  # hours
            got = implementation.prune(feats, attn, 64, step=4096)
            assert torch.equal(got.indices, expected.indices)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_more_than_two_to_the_31_elements() -> None:
    batch, tokens, channels = 640, 1024, 4096  # 2.7e9 elements, 5.4 GB
    feats = torch.randn(batch, tokens, channels, device="cuda", dtype=torch.float16)
    attn = torch.rand(batch, tokens, device="cuda")
    kept = vispruner_cuda.prune(feats, attn, 16, step=64)
    for image in (0, batch // 2, batch - 1):
        alone = reference.prune(feats[image : image + 1], attn[image : image + 1], 16, step=64)
        assert torch.equal(kept.indices[image], alone.indices[0])
        assert torch.equal(kept.feats[image], alone.feats[0])
