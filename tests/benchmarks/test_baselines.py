"""The eager baselines of the methods select the reference's tokens where rounding cannot matter."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import vispruner_cuda

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("operators.baselines"), importlib.import_module(
        "operators.workloads"
    )


@pytest.mark.parametrize("method", ["topk", "maxmin", "scope", "mmr"])
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_baselines_select_the_references_tokens(method: str, kind: str, operators: Any) -> None:
    baselines, workloads = operators
    feats = workloads.make_feats(kind, 2, 144, 128)
    attn = workloads.make_attention(2, 144, heads=4)
    want = vispruner_cuda.reference.prune(feats, attn, 24, method=method)
    for prune in (baselines.prune_each, baselines.prune):
        got, indices = prune(feats.double(), attn.double(), 24, method=method)
        assert torch.equal(indices, want.indices)
        assert torch.equal(got, want.feats.double())


@pytest.mark.parametrize("name", ["prune_each", "prune"])
def test_the_random_baseline_retains_k_different_tokens(name: str, operators: Any) -> None:
    baselines, workloads = operators
    feats, attn = workloads.make_feats("random", 3, 36, 8), workloads.make_attention(3, 36)
    _, indices = getattr(baselines, name)(feats, attn, 9, method="random")
    assert indices.shape == (3, 9)
    assert (indices.diff(dim=1) > 0).all()
