"""The compiled CUDA kernels in the PTX executor (tests/ptx), with the API of `vispruner_cuda`.

The module contains the actual host code of csrc/cuda and nvcc's PTX of the kernels. It is built on
first use. `Kernels(path)` also loads modules built from modified copies of the sources, as in the
mutation tests.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vispruner_cuda import _checks, methods
from vispruner_cuda._results import PruneResult, PruneVarlenResult, TopkResult

ROOT = Path(__file__).resolve().parents[2]
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NO_LIMIT = 1 << 40

#: Known harmless findings, as regular expressions, with the reason.
ALLOWED: dict[str, str] = {}


@dataclass(frozen=True)
class Device:
    """A GPU as simulated by the fake CUDA runtime.

    Attributes:
        shared_bytes: shared memory available to a block.
        newest_ptx: ignores newer PTX of the module, as in a library built without it.
        driver: CUDA version of the driver, None for that of the runtime.
    """

    major: int
    minor: int
    shared_bytes: int
    newest_ptx: int | None = None
    driver: int | None = None


H100 = Device(9, 0, 227 * 1024)
A100 = Device(8, 0, 163 * 1024)
ADA = Device(8, 9, 99 * 1024)
BLACKWELL = Device(12, 0, 99 * 1024)
#: The PTX in the module; each device runs the newest that it supports.
TARGETS = (80, 90)


class FindingsError(AssertionError):
    """Unexpected findings of the checkers in a call.

    Attributes:
        findings: all findings; the message has the first few.
    """

    def __init__(self, findings: Sequence[str]) -> None:
        super().__init__("\n".join(findings[:5]))
        self.findings = tuple(findings)


def _build() -> ModuleType:
    """tests/ptx/build.py"""
    spec = importlib.util.spec_from_file_location("ptx_build", ROOT / "tests" / "ptx" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = functools.cache(_build)


def unexpected(findings: Sequence[str], *allowed: str) -> list[str]:
    return [f for f in findings if not any(re.search(p, f) for p in (*ALLOWED, *allowed))]


def _argument(tensor: Tensor) -> tuple[int, int, list[int]]:
    return tensor.data_ptr(), _DTYPES[tensor.dtype], list(tensor.stride())


def _with_heads(cls_attn: Tensor, dim: int) -> Tensor:
    return cls_attn if cls_attn.dim() == dim else cls_attn.unsqueeze(dim - 2)


def _method(method: str, parameters: Mapping[str, float | None]) -> tuple[str | float, float]:
    """As `selection_of` of src/operators.cpp takes it."""
    values = methods.resolve(method, **parameters)
    if method == methods.DEFAULT:
        return values["important_ratio"], values["step"]
    return method, next(iter(values.values()), 0.0)


@functools.cache
def _function_at(file: str, line: int) -> str:
    """The device function of csrc/cuda at a line, or the last one before it."""
    name = ""
    (path,) = (ROOT / "csrc" / "cuda").rglob(file)
    lines = path.read_text().splitlines()
    for text in lines[:line]:
        if match := re.match(r"__device__ __forceinline__ [\w:<>*& ]+?\b(\w+)\(", text):
            name = match[1]
    return name


class Plans:
    """The interface of `vispruner_cuda.plans` on a compiled module."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def choices(self) -> dict[str, tuple[str, ...]]:
        stages = json.loads(self._module.plans())
        return {name: tuple(s["names"]) for name, s in stages.items() if name != "cpu"}

    def current(self) -> dict[str, str]:
        return {name: s["current"] for name, s in json.loads(self._module.plans()).items()}

    def select(self, **stages: str) -> None:
        for stage, name in stages.items():
            wrong = self._module.set_plan(stage, name)
            if wrong:
                raise ValueError(wrong)

    @contextmanager
    def use(self, **stages: str) -> Iterator[None]:
        before = self.current()
        try:
            self.select(**stages)
            yield
        finally:
            self.select(**{stage: before[stage] for stage in stages if stage in before})


@dataclass
class Totals:
    """Totals of all calls of a session, for the summary."""

    calls: int = 0
    launches: int = 0
    kernels: set[str] = field(default_factory=set)
    targets: set[int] = field(default_factory=set)  # of the executed PTX
    failed: int = 0  # calls with findings


TOTALS = Totals()


class Kernels:
    """The functional API on one compiled module; every call fails on findings of the checkers.

    Attributes:
        device: the simulated GPU.
        options: of the executor (tests/ptx/README.md): seed, lockstep, quantum, ...
        workspace_limit: bytes; small values force several waves.
        plans: like `vispruner_cuda.plans`.
        allowed: further findings that a test provokes, as regular expressions.
        launches: the kernels that the latest call launched, with grid, block and shared memory.
    """

    def __init__(self, path: Path, counted: bool = True) -> None:
        self.module = build().load(path)
        self.counted = counted  # in the totals of the session
        self.plans = Plans(self.module)
        self.launches: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        self.device = H100
        self.options: dict[str, Any] = {}
        self.workspace_limit = NO_LIMIT
        self.allowed: tuple[str, ...] = ()
        self.plans.select(**dict.fromkeys(self.plans.choices(), "auto"))

    def functions_run(self, kernel: str) -> set[str]:
        """Functions of the .cu files that a kernel has executed since the counters were cleared."""
        spaced = kernel.replace(">>", "> >")
        executed = self.module.counters()[spaced]["executed"]
        ran = set()
        for place, times in zip(self.module.lines(spaced), executed, strict=True):
            if times:
                ran.update(re.findall(r"([\w.]+\.cu):(\d+)", place))
        return {_function_at(file, int(line)) for file, line in ran}

    def times_run(self, kernel: str, instruction: str) -> int:
        """Executions of an instruction by warps since the counters were cleared."""
        spaced = kernel.replace(">>", "> >")
        executed = self.module.counters()[spaced]["executed"]
        return sum(
            times
            for pc, times in enumerate(executed)
            if times and instruction in self.module.where(spaced, pc)
        )

    def kernel_names(self) -> list[str]:
        """The kernels of the latest call, in order: "rank_kernel<Half, 8>" and so on."""
        return [launch["kernel"] for launch in self.launches]

    def _call(self, function: str, *arguments: Any) -> None:
        properties: dict[str, Any] = {
            "major": self.device.major,
            "minor": self.device.minor,
            "shared_bytes": self.device.shared_bytes,
            "newest_ptx": self.device.newest_ptx,
            "driver": self.device.driver,
        }
        self.module.set_device(**properties)
        self.module.configure(**self.options)
        self.module.take_findings()
        self.module.take_launches()
        try:
            getattr(self.module, function)(*arguments)
        finally:
            self.launches = [
                {**launch, "kernel": launch["kernel"].replace("> >", ">>")}
                for launch in self.module.take_launches()
            ]
            if self.counted:
                TOTALS.calls += 1
                TOTALS.launches += len(self.launches)
                TOTALS.kernels.update(self.kernel_names())
                TOTALS.targets.update(launch["ptx"] for launch in self.launches)
            found = unexpected(self.module.take_findings(), *self.allowed)
            if found:
                TOTALS.failed += self.counted
                raise FindingsError(found)

    def topk(self, cls_attn: Tensor, k: int) -> TopkResult:
        _checks.topk(cls_attn, k)
        attn = _with_heads(cls_attn, 3)
        batch, heads, n = attn.shape
        scores = torch.full((batch, min(k, n)), float("nan"))
        indices = torch.full((batch, min(k, n)), -1, dtype=torch.int64)
        self._call(
            "topk", _argument(attn), batch, heads, n, k, indices.data_ptr(), scores.data_ptr()
        )
        return TopkResult(scores, indices)

    def pairwise_cosine(self, feats: Tensor) -> Tensor:
        _checks.pairwise_cosine(feats)
        batch, n, channels = feats.shape
        feats = feats if feats.stride(2) == 1 else feats.contiguous()
        out = torch.full((batch, n, n), float("nan"))
        if out.numel():
            self._call(
                "pairwise_cosine",
                _argument(feats),
                batch,
                n,
                channels,
                out.data_ptr(),
                self.workspace_limit,
            )
        return out

    def _prune(
        self, feats: Tensor, cls_attn: Tensor | None, k: int, method: tuple[str | float, float]
    ) -> PruneResult:
        feats = feats if feats.stride(2) == 1 else feats.contiguous()
        batch, n, channels = feats.shape
        attn = None if cls_attn is None else _with_heads(cls_attn, 3)
        kept = torch.full((batch, min(k, n), channels), float("nan"), dtype=feats.dtype)
        indices = torch.full((batch, min(k, n)), -1, dtype=torch.int64)
        self._call(
            "prune",
            _argument(feats),
            None if attn is None else _argument(attn),
            batch,
            1 if attn is None else attn.shape[1],
            n,
            channels,
            k,
            method,
            indices.data_ptr(),
            0 if attn is None else kept.data_ptr(),
            self.workspace_limit,
        )
        return PruneResult(kept, indices)

    def dedup(self, feats: Tensor, k: int, *, step: int = 8) -> Tensor:
        _checks.dedup(feats, k, step)
        return self._prune(feats, None, k, (0.0, step)).indices

    def prune(
        self,
        feats: Tensor,
        cls_attn: Tensor,
        k: int,
        *,
        method: str = methods.DEFAULT,
        **parameters: float | None,
    ) -> PruneResult:
        _checks.prune(feats, cls_attn, k)
        return self._prune(feats, cls_attn, k, _method(method, parameters))

    def prune_varlen(
        self,
        feats: Tensor,
        cls_attn: Tensor,
        cu_seqlens: Sequence[int] | Tensor,
        k: int | Sequence[int],
        *,
        method: str = methods.DEFAULT,
        **parameters: float | None,
    ) -> PruneVarlenResult:
        bounds, ks = _checks.prune_varlen(feats, cls_attn, cu_seqlens, k)
        feats = feats if feats.stride(1) == 1 else feats.contiguous()
        attn = _with_heads(cls_attn, 2).unsqueeze(0)
        counts = [min(k_, e - s) for s, e, k_ in zip(bounds[:-1], bounds[1:], ks, strict=True)]
        kept = torch.full((sum(counts), feats.shape[1]), float("nan"), dtype=feats.dtype)
        indices = torch.full((sum(counts),), -1, dtype=torch.int64)
        self._call(
            "prune_varlen",
            _argument(feats.unsqueeze(0)),
            _argument(attn),
            attn.shape[1],
            feats.shape[1],
            bounds,
            ks,
            _method(method, parameters),
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
            self._call(
                "cls_attention",
                _argument(q_cls),
                _argument(k),
                batch,
                heads,
                tokens,
                dim,
                scale,
                out.data_ptr(),
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
        scale, bounds = _checks.received_attention(q, k, scale, cu_seqlens, lse)
        q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
        out = torch.full((q.shape[0],), float("nan"))
        if out.numel():
            self._call(
                "received_attention",
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


def not_tested() -> str | None:
    """The reason for not testing the compiled kernels on the host, None if they are tested.

    VISPRUNER_TEST_COMPILED_KERNELS=1 or 0 decides. Otherwise they are skipped if there is a GPU,
    which runs them a thousand times faster.

    Raises:
        BuildError: in CI, where they must be tested.
    """
    wanted = os.environ.get("VISPRUNER_TEST_COMPILED_KERNELS")
    if wanted == "0":
        return "skipped by VISPRUNER_TEST_COMPILED_KERNELS=0"
    if torch.cuda.is_available() and wanted != "1":
        return "they run on the GPU (VISPRUNER_TEST_COMPILED_KERNELS=1 also runs them on the host)"
    builder = build()
    try:
        builder.find_nvcc()
    except builder.BuildError as error:
        if os.environ.get("CI"):
            raise
        return " ".join(str(error).split())
    return None


def build_directory() -> Path:
    """Shared by test runs, so that only changed sources are recompiled."""
    return Path(os.environ.get("VISPRUNER_PTX_BUILD", ROOT / "build" / "ptx"))


def build_module(csrc: Path | None = None) -> Path:
    """The module of this tree's kernels, or of another copy of csrc."""
    if csrc is None:
        return Path(build().build(ROOT / "csrc", build_directory(), targets=TARGETS))
    name = hashlib.sha256(str(csrc.resolve()).encode()).hexdigest()[:12]
    directory = build_directory() / name
    return Path(build().build(csrc, build_directory(), targets=TARGETS, directory=directory))
