"""Kernels of a few instructions for the executor's tests.

A test writes the instructions; `Runner.run` puts a kernel around them:

    runner.run("ld.global.u32 %r1, [%at0]; add.u32 %r1, %r1, 1; st.global.u32 [%at1], %r1;",
               Input(x), Output(y), block=32)

Argument n is in register %arg<n> (a pointer to global memory, or a number), and for arrays %at<n>
points to the element of the thread. There are registers %p<10>, %h<20> (16 bits), %r<60>, %f<20>
and %rd<40>, and %tid.x is in %t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
REGISTERS = (
    ".reg .pred %p<10>; .reg .b16 %h<20>; .reg .b32 %r<60>; .reg .f32 %f<20>; .reg .b64 %rd<40>;"
)


@dataclass(frozen=True)
class Input:
    """An array that the kernel may only read."""

    array: np.ndarray


@dataclass(frozen=True)
class Buffer:
    """An array that is initialized and may be written."""

    array: np.ndarray


@dataclass(frozen=True)
class Output:
    """An array that must be written before it is read."""

    array: np.ndarray


Argument = Input | Buffer | Output | int | float


def aligned(shape: int | tuple[int, ...], dtype: type = np.uint32, fill: int = 0) -> np.ndarray:
    """An array that begins at a multiple of 256 bytes, as on a GPU."""
    bytes_ = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(bytes_ + 256, dtype=np.uint8)
    skip = -raw.ctypes.data % 256
    array = raw[skip : skip + bytes_].view(dtype).reshape(shape)
    array[...] = fill
    return array


def like_gpu(values: Sequence[int] | np.ndarray, dtype: type | None = None) -> np.ndarray:
    """A copy of these values that is aligned as on a GPU."""
    source = np.asarray(values, dtype=dtype)
    array = aligned(source.shape, source.dtype.type)
    array[...] = source
    return array


def kernel_text(
    body: str,
    parameters: Sequence[str] = (),
    *,
    declarations: str = "",
    directives: str = "",
    header: str = HEADER,
) -> str:
    """A kernel `k`. `parameters` are types: they are called arg0, arg1, ..."""
    listed = ", ".join(f".param .{kind} arg{n}" for n, kind in enumerate(parameters))
    return (
        f"{header}{declarations}\n.visible .entry k({listed}) {directives}\n"
        f"{{\n{REGISTERS}\n{body}\nret;\n}}\n"
    )


def _prologue(arguments: Sequence[Argument]) -> tuple[list[str], str]:
    kinds, lines = [], [".reg .b32 %t; mov.u32 %t, %tid.x;"]
    for n, argument in enumerate(arguments):
        if isinstance(argument, int):
            kinds.append("u32")
            lines.append(f".reg .b32 %arg{n}; ld.param.u32 %arg{n}, [arg{n}];")
        elif isinstance(argument, float):
            kinds.append("f32")
            lines.append(f".reg .f32 %arg{n}; ld.param.f32 %arg{n}, [arg{n}];")
        else:
            kinds.append("u64")
            lines.append(
                f".reg .b64 %arg{n}, %at{n}; ld.param.u64 %arg{n}, [arg{n}]; "
                f"cvta.to.global.u64 %arg{n}, %arg{n}; "
                f"mad.wide.u32 %at{n}, %t, {argument.array.itemsize}, %arg{n};"
            )
    return kinds, "\n".join(lines)


class Runner:
    """One executor. `run` returns the findings; `error` is the CUDA error of the last launch."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.error = ""

    def run(
        self,
        body: str,
        *arguments: Argument,
        grid: int | tuple[int, int, int] = 1,
        block: int | tuple[int, int, int] = 32,
        shared_bytes: int = 0,
        allowed_shared: int = -1,
        dependent: bool = False,
        declarations: str = "",
        directives: str = "",
        header: str = HEADER,
        **options: object,
    ) -> list[str]:
        kinds, prologue = _prologue(arguments)
        text = kernel_text(
            f"{prologue}\n{body}",
            kinds,
            declarations=declarations,
            directives=directives,
            header=header,
        )
        self.module.configure(**options)
        self.module.clear_memory()
        self.module.take_findings()
        self.module.load_ptx(text)
        values: list[int | float] = []
        for n, argument in enumerate(arguments):
            if isinstance(argument, int | float):
                values.append(argument)
                continue
            array = argument.array
            if isinstance(argument, Output):
                self.module.add_output(f"argument {n}", array.ctypes.data, array.nbytes)
            else:
                writable = isinstance(argument, Buffer)
                self.module.add_memory(f"argument {n}", array.ctypes.data, array.nbytes, writable)
            values.append(array.ctypes.data)
        self.error = ""
        try:
            self.module.launch(
                "k",
                grid if isinstance(grid, tuple) else (grid, 1, 1),
                block if isinstance(block, tuple) else (block, 1, 1),
                shared_bytes,
                values,
                dependent=dependent,
                allowed_shared=allowed_shared,
            )
            self.module.check_outputs()
        except RuntimeError as error:
            self.error = str(error)
        finally:
            self.module.clear_memory()
        return list(self.module.take_findings())

    def compute(self, instructions: str, result: type, *operands: np.ndarray) -> np.ndarray:
        """The result d of instructions for operands a, b, c, e, per element.

        The registers have the widths of the arrays, but at least 16 bits.
        """
        count = operands[0].size
        results = aligned(count, result)
        lines = []
        for name, array in zip("abce", operands, strict=False):
            bits = 8 * array.itemsize
            lines.append(f".reg .b{max(bits, 16)} {name}; ld.global.b{bits} {name}, [%{name}_at];")
        bits = 8 * results.itemsize
        lines.append(f".reg .b{max(bits, 16)} d;\n{instructions}\nst.global.b{bits} [%d_at], d;")
        # One thread per element, in blocks of 128.
        index = (
            ".reg .b32 %i; .reg .pred %outside; mov.u32 %i, %ctaid.x; mad.lo.u32 %i, %i, 128, %t; "
            f"setp.ge.u32 %outside, %i, {count}; @%outside ret;\n"
        )
        arguments: list[Argument] = [Output(results)]
        places = f".reg .b64 %d_at; mad.wide.u32 %d_at, %i, {results.itemsize}, %arg0;\n"
        for n, (name, array) in enumerate(zip("abce", operands, strict=False), 1):
            arguments.append(Input(like_gpu(array)))
            places += (
                f".reg .b64 %{name}_at; mad.wide.u32 %{name}_at, %i, {array.itemsize}, %arg{n};\n"
            )
        blocks = (count + 127) // 128
        findings = self.run(index + places + "\n".join(lines), *arguments, grid=blocks, block=128)
        assert not findings, findings
        assert not self.error
        return results


def kinds(findings: Sequence[str]) -> set[str]:
    """The checkers that reported: {"memcheck", ...}."""
    return {text[1 : text.index("]")] for text in findings}
