"""The backends of this machine: the reference, each instruction set of the CPU, each GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

import vispruner_cuda

from .. import _library, plans, reference
from .cases import OPERATORS, Operators
from .checking import Backend


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors on the device, with their strides and alignment; named tuples field by field."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(v, device) for v in value))
    if not isinstance(value, Tensor) or value.device == device or not value.numel():
        return value.to(device) if isinstance(value, Tensor) else value
    # .to() keeps dense strides only; views with gaps and odd alignment must be preserved as well.
    span = 1 + sum((s - 1) * t for s, t in zip(value.shape, value.stride(), strict=True))
    offset = value.storage_offset() % 8
    memory = torch.empty(span + offset, dtype=value.dtype, device=device)
    return memory.as_strided(value.shape, value.stride(), offset).copy_(value)


def _on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **keywords: Any) -> Any:
        moved = {name: _moved(value, device) for name, value in keywords.items()}
        return _moved(function(*(_moved(a, device) for a in args), **moved), torch.device("cpu"))

    return call


def operators(device: str) -> Operators:
    """The installed operators on a device: CPU tensors in, CPU tensors out."""
    on = torch.device(device)
    functions = {name: _on(on, getattr(vispruner_cuda, name)) for name in OPERATORS}
    return cast(Operators, SimpleNamespace(**functions))


def device_names(report: Mapping[str, Any]) -> list[str]:
    """The devices of `report()` that can be verified: "cpu", "cuda:0"...

    A GPU counts if the library has kernels for it, even if they do not work there.
    """
    ready = report["build"]["cuda_runtime_state"] == _library.READY
    gpus = [d["index"] for d in report["devices"] if ready and d["covered_by"] != "none"]
    return ["cpu", *(f"cuda:{index}" for index in gpus)]


def backends(devices: Iterable[str], report: Mapping[str, Any]) -> list[Backend]:
    """Backends of devices that `device_names` lists; the CPU has one per instruction set."""
    choices = plans.choices()
    auto = dict.fromkeys(choices, "auto")
    found = []
    for device in devices:
        if device == "cpu":
            found += [
                Backend(f"cpu {isa}", operators("cpu"), plans, {**auto, "cpu": isa})
                for isa in choices["cpu"]
                if isa != "auto"
            ]
        else:
            (gpu,) = (d for d in report["devices"] if f"cuda:{d['index']}" == device)
            dependent = int(gpu["capability"].split(".")[0]) >= 9
            found.append(Backend(device, operators(device), plans, {"cpu": "auto"}, dependent))
    return found


def wrong_instruction_set(backend: Backend) -> str | None:
    """An error message if the library does not use the instruction set that a backend selects."""
    wanted = backend.fixed.get("cpu", "auto")
    with backend.plans.use(**backend.fixed):
        used = json.loads(torch.ops.vispruner.build_info())["cpu_isa"]
    if wanted in ("auto", used):
        return None
    return f"the instruction set {wanted} was forced, {used} is in use"


def reference_backend() -> Backend:
    """The reference itself, for the known answers."""
    return Backend("reference", reference)
