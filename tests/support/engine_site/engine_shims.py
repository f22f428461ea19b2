"""Workarounds for testing with vLLM's CPU build. Serving does not need them.

- The torchvision that it depends on is built for CUDA: with a CPU-only torch its operators cannot
  be registered and its import fails. They are declared here and never called.
- Its CPU model runner V1 overrides `load_model` without a step of the GPU runner: checking whether
  the model recomputes M-RoPE positions (this breaks vLLM's own video pruning as well).
- Its model runner V2 uses Triton kernels, and Triton has no CPU backend here. With
  TRITON_INTERPRET=1, Triton's interpreter needs none, so vLLM gets a dummy backend.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

_libraries: list[Any] = []  # operators are declared as long as their library exists


def _declare_torchvision_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


def _ask_on_cpu_as_on_gpu(module: ModuleType) -> None:
    runner = module.CPUModelRunner
    original = runner.load_model

    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.is_multimodal_pruning_enabled = (
            getattr(self.model, "supports_multimodal_pruning", False)
            and self.model_config.multimodal_config is not None
            and self.model_config.multimodal_config.is_multimodal_pruning_enabled()
        )

    runner.load_model = load_model


def _name_a_backend(module: ModuleType) -> None:
    module.backends.setdefault("cpu", SimpleNamespace(driver=SimpleNamespace(is_active=bool)))


class _Finder:
    """Runs a function when a module is imported, at no cost until then."""

    def __init__(
        self,
        name: str,
        before: Callable[[], None] | None = None,
        after: Callable[[ModuleType], None] | None = None,
    ) -> None:
        self._name, self._before, self._after = name, before, after

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        if self._before is not None:
            self._before()
        if self._after is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        run, after = spec.loader.exec_module, self._after

        def exec_module(module: ModuleType) -> None:
            run(module)
            after(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Installs the shims, before torchvision or vLLM is imported. A second call has no effect."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path) or _libraries:
        return
    finders = [
        _Finder("torchvision", before=_declare_torchvision_operators),
        _Finder("vllm.v1.worker.cpu_model_runner", after=_ask_on_cpu_as_on_gpu),
    ]
    if os.environ.get("TRITON_INTERPRET") == "1":
        finders.append(_Finder("triton.backends", after=_name_a_backend))
    sys.meta_path[:0] = finders  # type: ignore[list-item]
