"""The CUDA kernels run on the host, under the functional API of `vispruner_cuda`.

The module is compiled from csrc/cuda by CMake (option VISPRUNER_SIMT) the first time it is asked
for. `Kernels(csrc)` builds from another copy of the sources: the mutation tests change one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pybind11
import torch
from torch import Tensor

from vispruner_cuda import _checks
from vispruner_cuda._results import PruneResult, PruneVarlenResult, TopkResult

ROOT = Path(__file__).resolve().parents[2]
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

H200_SHARED = 227 * 1024  # bytes a block may ask for
ADA_SHARED = 99 * 1024
NO_LIMIT = 1 << 40


def build(csrc: Path, directory: Path) -> Path:
    """Compiles the module from `csrc` in `directory` and returns its path."""
    ninja = shutil.which("ninja")
    generator = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(directory), *generator,
        "-DVISPRUNER_LIBRARY=OFF", "-DVISPRUNER_SIMT=ON", f"-DVISPRUNER_CSRC_DIR={csrc}",
        f"-DPython3_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(directory), "--parallel"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return directory / f"vispruner_simt{sysconfig.get_config_var('EXT_SUFFIX')}"


def load(path: Path) -> ModuleType:
    # pybind11 returns the module it has for a name: every file gets a name of its own (the last
    # part is that of the init function).
    name = f"host_kernels_{abs(hash(path))}.vispruner_simt"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _argument(tensor: Tensor) -> tuple[int, int, list[int]]:
    return tensor.data_ptr(), _DTYPES[tensor.dtype], list(tensor.stride())


def _with_heads(cls_attn: Tensor, dim: int) -> Tensor:
    return cls_attn if cls_attn.dim() == dim else cls_attn.unsqueeze(dim - 2)


class Kernels:
    """The functional API on one compiled module.

    Attributes:
        schedule: order in which threads are resumed: 0 ascending, 1 descending, else a seed.
        shared_limit: bytes of shared memory of a block; small values force other launch plans.
        workspace_limit: bytes; small values force several waves.
    """

    def __init__(self, path: Path) -> None:
        self._module = load(path)
        self.schedule = 0
        self.shared_limit = H200_SHARED
        self.workspace_limit = NO_LIMIT

    def _configured(self) -> ModuleType:
        self._module.configure(self.schedule, self.shared_limit)
        return self._module

    def topk(self, cls_attn: Tensor, k: int) -> TopkResult:
        _checks.topk(cls_attn, k)
        attn = _with_heads(cls_attn, 3)
        batch, heads, n = attn.shape
        scores = torch.full((batch, min(k, n)), float("nan"))
        indices = torch.full((batch, min(k, n)), -1, dtype=torch.int64)
        self._configured().topk(
            _argument(attn), batch, heads, n, k, indices.data_ptr(), scores.data_ptr()
        )
        return TopkResult(scores, indices)

    def pairwise_cosine(self, feats: Tensor) -> Tensor:
        _checks.pairwise_cosine(feats)
        batch, n, channels = feats.shape
        feats = feats if feats.stride(2) == 1 else feats.contiguous()
        out = torch.full((batch, n, n), float("nan"))
        if out.numel():
            self._configured().pairwise_cosine(
                _argument(feats), batch, n, channels, out.data_ptr(), self.workspace_limit
            )
        return out

    def _prune(
        self, feats: Tensor, cls_attn: Tensor | None, k: int, ratio: float, step: int
    ) -> PruneResult:
        feats = feats if feats.stride(2) == 1 else feats.contiguous()
        batch, n, channels = feats.shape
        attn = None if cls_attn is None else _with_heads(cls_attn, 3)
        kept = torch.full((batch, min(k, n), channels), float("nan"), dtype=feats.dtype)
        indices = torch.full((batch, min(k, n)), -1, dtype=torch.int64)
        self._configured().prune(
            _argument(feats),
            None if attn is None else _argument(attn),
            batch,
            1 if attn is None else attn.shape[1],
            n,
            channels,
            k,
            ratio,
            min(step, n),
            indices.data_ptr(),
            kept.data_ptr(),
            self.workspace_limit,
        )
        return PruneResult(kept, indices)

    def dedup(self, feats: Tensor, k: int, *, step: int = 8) -> Tensor:
        _checks.dedup(feats, k, step)
        return self._prune(feats, None, k, 0.0, step).indices

    def prune(
        self,
        feats: Tensor,
        cls_attn: Tensor,
        k: int,
        *,
        important_ratio: float = 0.5,
        step: int = 8,
    ) -> PruneResult:
        _checks.prune(feats, cls_attn, k, important_ratio, step)
        return self._prune(feats, cls_attn, k, important_ratio, step)

    def prune_varlen(
        self,
        feats: Tensor,
        cls_attn: Tensor,
        cu_seqlens: Sequence[int] | Tensor,
        k: int | Sequence[int],
        *,
        important_ratio: float = 0.5,
        step: int = 8,
    ) -> PruneVarlenResult:
        bounds, ks = _checks.prune_varlen(feats, cls_attn, cu_seqlens, k, important_ratio, step)
        feats = feats if feats.stride(1) == 1 else feats.contiguous()
        attn = _with_heads(cls_attn, 2).unsqueeze(0)
        counts = [min(k_, e - s) for s, e, k_ in zip(bounds[:-1], bounds[1:], ks, strict=True)]
        kept = torch.full((sum(counts), feats.shape[1]), float("nan"), dtype=feats.dtype)
        indices = torch.full((sum(counts),), -1, dtype=torch.int64)
        self._configured().prune_varlen(
            _argument(feats.unsqueeze(0)),
            _argument(attn),
            attn.shape[1],
            feats.shape[1],
            bounds,
            ks,
            important_ratio,
            step,
            indices.data_ptr(),
            kept.data_ptr(),
            self.workspace_limit,
        )
        kept_bounds = [0]
        for count in counts:
            kept_bounds.append(kept_bounds[-1] + count)
        return PruneVarlenResult(kept, indices, tuple(kept_bounds))

    def cls_attention(self, q_cls: Tensor, k: Tensor, scale: float) -> Tensor:
        _checks.cls_attention(q_cls, k, scale)
        q_cls, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q_cls, k))
        batch, heads, tokens, dim = k.shape
        out = torch.full((batch, tokens - 1), float("nan"))
        if out.numel():
            self._configured().cls_attention(
                _argument(q_cls), _argument(k), batch, heads, tokens, dim, scale, out.data_ptr()
            )
        return out

    def received_attention(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor:
        bounds = _checks.received_attention(q, k, scale, cu_seqlens, lse)
        q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
        out = torch.full((q.shape[0],), float("nan"))
        if out.numel():
            self._configured().received_attention(
                _argument(q),
                _argument(k),
                q.shape[1],
                q.shape[2],
                scale,
                bounds,
                None if lse is None else _argument(lse),
                out.data_ptr(),
            )
        return out


def default_build_directory() -> Path:
    """Shared by test runs, so that only changed sources are compiled again."""
    return Path(os.environ.get("VISPRUNER_SIMT_BUILD", ROOT / "build" / "simt"))
