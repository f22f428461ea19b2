"""ldmatrix and mma against numpy: the layouts of the PTX manual."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx.programs import Input, Output, aligned, like_gpu

RNG = np.random.default_rng(2)
LANES = range(32)


def by_lane(matrix: np.ndarray, places) -> np.ndarray:
    """32-bit registers (register, lane) of a matrix; places(lane) -> rows of element indices."""
    registers = []
    for lane in LANES:
        words = [[matrix[at] for at in word] for word in places(lane)]
        registers.append([np.array(word, dtype=matrix.dtype).view(np.uint32)[0] for word in words])
    return np.array(registers, dtype=np.uint32).T


def a_places(width: int):
    """Of the 16-row operand; `width` elements are in a register."""
    half = 4 * width
    return lambda lane: [
        [(lane // 4 + 8 * (n % 2), lane % 4 * width + half * (n // 2) + e) for e in range(width)]
        for n in range(4)
    ]


def b_places(width: int):
    half = 4 * width
    return lambda lane: [
        [(lane % 4 * width + half * n + e, lane // 4) for e in range(width)] for n in range(2)
    ]


def c_places(lane: int):
    return [[(lane // 4 + 8 * (n // 2), lane % 4 * 2 + n % 2)] for n in range(4)]


def multiply(runner, instruction: str, a, b, c, accumulator: type, in_place: bool) -> np.ndarray:
    width = 4 // a.itemsize
    registers = np.concatenate(
        [by_lane(a, a_places(width)), by_lane(b, b_places(width)), by_lane(c, c_places)]
    )
    out = aligned((4, 32))
    text = "".join(f"ld.global.u32 %r{n}, [%at0+{128 * n}];" for n in range(10))
    d = [6, 7, 8, 9] if in_place else [20, 21, 22, 23]
    names = [", ".join(f"%r{n}" for n in part) for part in (d, range(4), (4, 5), range(6, 10))]
    text += f"{instruction} {{{names[0]}}}, {{{names[1]}}}, {{{names[2]}}}, {{{names[3]}}};"
    text += "".join(f"st.global.u32 [%at1+{128 * n}], %r{d[n]};" for n in range(4))
    assert not runner.run(text, Input(like_gpu(registers)), Output(out))
    product = np.zeros((16, 8), dtype=accumulator)
    for lane in LANES:
        for n, [place] in enumerate(c_places(lane)):
            product[place] = out[n, lane : lane + 1].view(accumulator)[0]
    return product


def tensor_core(row: torch.Tensor, column: torch.Tensor, accumulator: torch.Tensor) -> float:
    """A row times a column as tensor cores of compute capability 8.x add it."""
    total = Fraction(accumulator.item())
    for first in (0, 8):
        block = slice(first, first + 8)
        products = zip(row[block].tolist(), column[block].tolist(), strict=True)
        terms = [total, *(Fraction(x) * Fraction(y) for x, y in products)]
        top = max(math.frexp(term)[1] for term in map(float, terms) if term)
        unit = Fraction(2) ** (top - 25)  # 24 bits below the leading one
        total = sum(math.trunc(term / unit) for term in terms) * unit
        unit = Fraction(2) ** (math.frexp(float(total))[1] - 24)
        total = math.trunc(total / unit) * unit
    return float(total)


@pytest.mark.parametrize("in_place", [True, False])
def test_int8(runner, in_place):
    a = RNG.integers(-128, 128, (16, 32)).astype(np.int8)
    b = RNG.integers(-128, 128, (32, 8)).astype(np.int8)
    a[0], b[:, 0] = -128, -128  # the largest product
    c = RNG.integers(-(1 << 31), 1 << 31, (16, 8)).astype(np.int32)
    name = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
    got = multiply(runner, name, a, b, c, np.int32, in_place)
    want = a.astype(np.int64) @ b.astype(np.int64) + c
    np.testing.assert_array_equal(got, want.astype(np.int32))


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_16_bits(runner, kind, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((16, 16), (16, 8)))
    c = torch.randn((16, 8), generator=generator)
    name = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    raw = [x.view(torch.int16).numpy().view(np.uint16) for x in (a, b)]
    got = multiply(runner, name, *raw, c.numpy(), np.float32, True)
    want = [[tensor_core(a[i], b[:, j], c[i, j]) for j in range(8)] for i in range(16)]
    np.testing.assert_array_equal(got, np.array(want, dtype=np.float32))
    exact = (a.double() @ b.double() + c.double()).numpy()
    np.testing.assert_allclose(got, exact, rtol=0, atol=2e-6)
    assert not np.array_equal(got, exact.astype(np.float32))  # not rounded once


@pytest.mark.parametrize(
    ("terms", "accumulator", "want"),
    [
        # below the largest term by more than 24 bits: lost, though their sum is not
        ([2.0**-13] * 8 + [0.0] * 8, 2.0**12, 2.0**12),
        # the same in the second block: the first one is added without loss
        ([2.0**-13] * 16, 0.0, 2.0**-9),
        # cut off, not rounded, of both signs
        ([1.0, 0.75] + [0.0] * 14, 2.0**24, 2.0**24),
        ([-1.0, -0.75] + [0.0] * 14, -(2.0**24), -(2.0**24)),
        ([0.0] * 16, 0.0, 0.0),
        ([float("inf")] + [1.0] * 15, 1.0, float("inf")),
        ([float("inf"), float("-inf")] + [1.0] * 14, 1.0, float("nan")),
    ],
)
def test_sums_of_16_bit_products(runner, terms, accumulator, want):
    """Products with 1: the terms are added to the accumulator in two blocks of eight."""
    a, b = torch.zeros(16, 16, dtype=torch.bfloat16), torch.ones(16, 8, dtype=torch.bfloat16)
    a[3] = torch.tensor(terms)
    c = np.zeros((16, 8), dtype=np.float32)
    c[3] = accumulator
    name = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    raw = [x.view(torch.int16).numpy().view(np.uint16) for x in (a, b)]
    got = multiply(runner, name, *raw, c, np.float32, True)
    np.testing.assert_array_equal(got[3], np.full(8, want, dtype=np.float32))
    np.testing.assert_array_equal(got[4], np.zeros(8, dtype=np.float32))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(runner, count, transposed):
    rows = like_gpu(RNG.integers(0, 1 << 16, (8 * count, 8)).astype(np.uint16))
    out = aligned((count, 32))
    names = ", ".join(f"%r{n}" for n in range(10, 10 + count))
    text = f""".shared .align 16 .b8 rows[{rows.nbytes}]; mov.u32 %r1, rows;
        and.b32 %r2, %t, {8 * count - 1}; mul.lo.u32 %r2, %r2, 16; add.u32 %r1, %r1, %r2;
        setp.lt.u32 %p1, %t, {8 * count}; mul.wide.u32 %rd1, %r2, 1; add.s64 %rd1, %rd1, %arg0;
        ld.global.v4.u32 {{%r3, %r4, %r5, %r6}}, [%rd1];
        @%p1 st.shared.v4.u32 [%r1], {{%r3, %r4, %r5, %r6}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16
            {{{names}}}, [%r1];"""
    text += "".join(f"st.global.u32 [%at1+{128 * n}], %r{10 + n};" for n in range(count))
    assert not runner.run(text, Input(rows), Output(out))
    for n, matrix in enumerate(rows.reshape(count, 8, 8)):
        matrix = matrix.T if transposed else matrix
        want = np.ascontiguousarray(matrix).view(np.uint32)  # four words per row, one per lane
        np.testing.assert_array_equal(out[n], want.reshape(-1))
