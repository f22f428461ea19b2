"""A GPU that does not exist: tensors with real values that say they are on it.

Operations compute on the CPU. They raise `MixedDevicesError` where a real GPU would, because
tensors are on different devices, and each place where the host would wait for the GPU, or copy to
it, is counted. Streams, overlap and kernels are not imagined.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

#: operators whose result depends on values, so that the host waits for them
WAITING = {
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::masked_select",
    "aten::nonzero", "aten::repeat_interleave.Tensor", "aten::_unique2", "aten::unique_dim",
}  # fmt: skip
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_COPYING = {"aten::copy_", "aten::_to_copy"}


class MixedDevicesError(RuntimeError):
    """An operation on tensors of different devices."""


class OnGpu(Tensor):
    """A tensor with the values of a CPU tensor, and another device."""

    values: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, values: Tensor, place: torch.device) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="meta",
        )
        made.values, made.place = values, place
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return ImaginedGpu.current().run(function, args, kwargs or {})

    device = property(lambda self: self.place)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return self.place.index

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        ImaginedGpu.current().note("wait: cpu")
        return self.values

    def tolist(self) -> Any:
        ImaginedGpu.current().note("wait: tolist")
        return self.values.tolist()

    def __repr__(self, **settings: Any) -> str:
        return f"OnGpu({self.values}, {self.place})"

    def __format__(self, settings: str) -> str:
        return repr(self)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class _Event:
    """An event of a GPU that is always done."""

    def __init__(self, **settings: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


class ImaginedGpu(TorchDispatchMode):
    """While it is entered, tensors can be put on its devices and operations on them are checked.

    Attributes:
        events: waits of the host for the GPU and copies to it, by kind.
    """

    _entered: ImaginedGpu | None = None

    def __init__(self) -> None:
        super().__init__()
        self.events: Counter[str] = Counter()
        self._stack = contextlib.ExitStack()

    @classmethod
    def current(cls) -> ImaginedGpu:
        assert cls._entered is not None, "a tensor is used after its imagined GPU is gone"
        return cls._entered

    def __enter__(self) -> ImaginedGpu:
        super().__enter__()
        replaced: dict[str, Any] = {
            "Event": _Event,
            "current_stream": lambda device=None: None,
            "synchronize": lambda device=None: None,
            "_lazy_init": lambda: None,
        }
        for name, value in replaced.items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, value))
        self._stack.enter_context(mock.patch.object(torch, "tensor", self._tensor(torch.tensor)))
        self._stack.enter_context(mock.patch.object(Tensor, "to", self._to(Tensor.to)))
        ImaginedGpu._entered = self
        return self

    def __exit__(self, *error: Any) -> None:
        ImaginedGpu._entered = None
        self._stack.close()
        super().__exit__(*error)

    # ------------------------------------------------------------------------------- the tensors
    @staticmethod
    def put(tensor: Tensor, device: str = "cuda:0") -> Tensor:
        """A copy of a CPU tensor on a device."""
        return OnGpu(tensor.detach().clone(), torch.device(device))

    def place(self, model: nn.Module, device_of: Callable[[str], str]) -> None:
        """Moves a model in place: device_of(name of a parameter or buffer)."""
        for prefix, module in model.named_modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    moved = self.put(parameter, device_of(f"{prefix}.{name}"))
                    module._parameters[name] = nn.Parameter(moved, requires_grad=False)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = self.put(buffer, device_of(f"{prefix}.{name}"))

    def note(self, kind: str) -> None:
        self.events[kind] += 1

    # ------------------------------------------------------------------------------ the operators
    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.run(function, args, kwargs or {})

    def run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = function._schema.name
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in leaves if isinstance(x, OnGpu)]
        target: torch.device | None = ours[0].place if ours else None
        kwargs = dict(kwargs)
        if kwargs.get("device") is not None:
            target = self._target(name, torch.device(kwargs["device"]), target)
            kwargs["device"] = torch.device("cpu")
        if name == "aten::copy_":
            target = self._copied(args[0], args[1])
        elif name in _INDEXING:
            self._check_index(function, args)
        elif name not in _COPYING:
            self._check(function, leaves)
        if ours and name in WAITING:
            self.note(f"wait: {name}")
        plain = [x.values if isinstance(x, OnGpu) else x for x in leaves]
        with _disable_current_modes():
            result = function(*tree_map(_values, args), **tree_map(_values, kwargs))
        known = {id(value): x for value, x in zip(plain, leaves, strict=True)}

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in known:  # written in place
                return known[id(x)]
            return OnGpu(x, target) if target is not None else x

        return tree_map(wrapped, result)

    def _target(
        self, name: str, asked: torch.device, current: torch.device | None
    ) -> torch.device | None:
        """The device of a result; "meta" is what torch's own code sees of ours."""
        if asked.type == "meta":
            return current or torch.device("cuda:0")
        if asked.type != "cuda":
            if name == "aten::_to_copy" and current is not None:
                self.note("wait: copy to the host")
            return None
        if name == "aten::_to_copy" and current is None:
            self.note("copy to the GPU")
        return torch.device("cuda", asked.index or 0)

    def _copied(self, to: Tensor, source: Tensor) -> torch.device | None:
        if isinstance(to, OnGpu):
            if not isinstance(source, OnGpu) and source.dim():
                self.note("copy to the GPU")
            return to.place
        if isinstance(source, OnGpu):
            self.note("wait: copy to the host")
        return None

    def _check_index(self, function: Any, args: Any) -> None:
        indices = [index for index in args[1] if index is not None]
        for index in indices:
            if isinstance(args[0], OnGpu) and not isinstance(index, OnGpu):
                self.note("copy to the GPU")
            elif not isinstance(args[0], OnGpu) and isinstance(index, OnGpu):
                raise MixedDevicesError(f"{function}: indices on {index.place}, values on the CPU")
            elif isinstance(index, OnGpu) and index.place != args[0].place:
                raise MixedDevicesError(
                    f"{function}: indices on {index.place}, not {args[0].place}"
                )
            if isinstance(index, OnGpu) and index.dtype == torch.bool:
                self.note("wait: boolean index")

    def _check(self, function: Any, leaves: list[Tensor]) -> None:
        places = {
            str(x.place) if isinstance(x, OnGpu) else "cpu"
            for x in leaves
            if x.dim() or (isinstance(x, OnGpu) and len(leaves) == 1)
        }
        if len(places) > 1:
            raise MixedDevicesError(f"{function}: tensors on {', '.join(sorted(places))}")

    # ------------------------------------------------------------- functions that bypass dispatch
    def _tensor(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            if any(isinstance(x, OnGpu) for x in tree_leaves(data)):
                self.note("wait: torch.tensor")
            made = original(tree_map(_values, data), *args, **kwargs)
            if device is None or torch.device(device).type != "cuda":
                return made
            self.note("copy to the GPU")
            return self.put(made, f"cuda:{torch.device(device).index or 0}")

        return tensor

    @staticmethod
    def _to(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            other = args[0] if args and isinstance(args[0], OnGpu) else kwargs.get("other")
            if isinstance(other, OnGpu):
                return original(self, other.device, other.dtype)
            return original(self, *args, **kwargs)

        return to


def _values(x: Any) -> Any:
    return x.values if isinstance(x, OnGpu) else x
