"""Loads, stores and atomics: widths, vectors, address spaces, values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ptx.programs import Buffer, Input, Output, aligned, like_gpu

RNG = np.random.default_rng(0)
DTYPES = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def random(count: int, bits: int) -> np.ndarray:
    return like_gpu(
        RNG.integers(0, 1 << min(bits, 63), count, dtype=np.uint64).astype(DTYPES[bits])
    )


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_widths(runner, bits):
    a, out = random(32, bits), aligned(32, DTYPES[bits])
    register = f"{'%h1' if bits <= 16 else '%r1' if bits == 32 else '%rd1'}"
    text = f"ld.global.u{bits} {register}, [%at0]; st.global.u{bits} [%at1], {register};"
    assert not runner.run(text, Input(a), Output(out))
    np.testing.assert_array_equal(out, a)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("register", ["%r1", "%rd1"])
def test_small_values_are_extended(runner, bits, register):
    """By their sign, to the width of the register."""
    a = random(32, bits)
    width = 32 if register == "%r1" else 64
    out = aligned((2, 32), DTYPES[width])
    store = f"st.global.u{width}"
    text = (
        f"ld.global.s{bits} {register}, [%at0]; {store} [%at1], {register};"
        f"ld.global.u{bits} {register}, [%at0]; {store} [%at1+{4 * width}], {register};"
    )
    assert not runner.run(text, Input(a), Output(out))
    signed = a.view({8: np.int8, 16: np.int16, 32: np.int32}[bits])
    np.testing.assert_array_equal(out[0], signed.astype(np.int64).astype(DTYPES[width]))
    np.testing.assert_array_equal(out[1], a)


@pytest.mark.parametrize(
    ("bits", "elements"), [(8, 2), (8, 4), (16, 2), (16, 4), (32, 2), (32, 4), (64, 2)]
)
def test_vectors(runner, bits, elements):
    """Read in order, written in the opposite order."""
    a, out = random(32 * elements, bits), aligned(32 * elements, DTYPES[bits])
    prefix = "%h" if bits <= 16 else "%r" if bits == 32 else "%rd"
    names = [f"{prefix}{n}" for n in range(10, 10 + elements)]
    stride = bits // 8 * elements
    text = (
        f"mad.wide.u32 %rd1, %t, {stride}, %arg0; mad.wide.u32 %rd2, %t, {stride}, %arg1;"
        f"ld.global.v{elements}.u{bits} {{{', '.join(names)}}}, [%rd1];"
        f"st.global.v{elements}.u{bits} [%rd2], {{{', '.join(reversed(names))}}};"
    )
    assert not runner.run(text, Input(a), Output(out))
    np.testing.assert_array_equal(out.reshape(32, -1), a.reshape(32, -1)[:, ::-1])


def test_offsets_and_constants(runner):
    a, out = random(8, 32), aligned(8)
    text = (
        "add.s64 %rd1, %arg0, 16; ld.global.u32 %r1, [%rd1+-4]; ld.global.u32 %r2, [%rd1+8];"
        "st.global.u32 [%arg1], %r1; st.global.u32 [%arg1+4], %r2;"
        "st.global.u32 [%arg1+8], 77; st.global.v2.u32 [%arg1+16], {1, 2};"
        "st.global.u64 [%arg1+24], -1; st.global.u32 [%arg1+12], 0;"
    )
    assert not runner.run(text, Input(a), Output(out), block=1)
    assert list(out) == [a[3], a[6], 77, 0, 1, 2, 0xFFFFFFFF, 0xFFFFFFFF]


def test_parameters(runner):
    """Numbers of the launch, as values and by address."""
    out = aligned(3)
    text = (
        "st.global.u32 [%arg0], %arg1; st.global.f32 [%arg0+4], %arg2;"
        "ld.param.b32 %r1, [arg2]; st.global.u32 [%arg0+8], %r1;"
    )
    assert not runner.run(text, Output(out), 41, 1.5, block=1)
    assert list(out) == [41, 0x3FC00000, 0x3FC00000]


def test_structure_as_parameter(executor):
    from ptx.programs import kernel_text

    out = aligned(2)
    text = kernel_text(
        "ld.param.u64 %rd1, [arg1]; ld.param.v2.u32 {%r1, %r2}, [arg0+8];"
        "st.global.v2.u32 [%rd1], {%r2, %r1};",
        [],
    ).replace("k()", "k(.param .align 8 .b8 arg0[20], .param .u64 arg1)")
    executor.set_device()
    executor.configure()
    executor.clear_memory()
    executor.load_ptx(text)
    executor.add_memory("out", out.ctypes.data, 8, True, False)
    structure = np.arange(5, dtype=np.uint32).tobytes()
    executor.launch("k", (1, 1, 1), (1, 1, 1), 0, [structure, out.ctypes.data])
    assert not executor.take_findings()
    assert list(out) == [3, 2]
    with pytest.raises(ValueError, match="another size"):
        executor.launch("k", (1, 1, 1), (1, 1, 1), 0, [structure[:8], out.ctypes.data])
    with pytest.raises(ValueError, match="2 parameters"):
        executor.launch("k", (1, 1, 1), (1, 1, 1), 0, [structure])
    executor.clear_memory()


def test_shared_variables(runner):
    """Static ones of any alignment, followed by the dynamic one."""
    out = aligned((3, 32))
    text = """.shared .align 1 .b8 odd[3]; .shared .align 4 .b32 words[32];
        mul.lo.u32 %r1, %t, 4; mov.u32 %r2, words; add.u32 %r2, %r2, %r1;
        mov.u32 %r3, dynamic; add.u32 %r3, %r3, %r1;
        add.u32 %r4, %t, 100; add.u32 %r5, %t, 200;
        st.shared.u32 [%r2], %r4; st.shared.u32 [%r3], %r5; st.shared.u8 [odd+2], %r4;
        bar.sync 0;
        xor.b32 %r1, %r1, 4; mov.u32 %r2, words; add.u32 %r2, %r2, %r1;
        mov.u32 %r3, dynamic; add.u32 %r3, %r3, %r1;
        ld.shared.u32 %r6, [%r2]; ld.shared.u32 %r7, [%r3]; ld.shared.u8 %r8, [odd+2];
        st.global.u32 [%at0], %r6; st.global.u32 [%at0+128], %r7; st.global.u32 [%at0+256], %r8;"""
    findings = runner.run(
        text,
        Output(out),
        shared_bytes=128,
        declarations=".extern .shared .align 16 .b8 dynamic[];",
        races=False,
    )
    assert not findings
    t = np.arange(32)
    np.testing.assert_array_equal(out[0], (t ^ 1) + 100)
    np.testing.assert_array_equal(out[1], (t ^ 1) + 200)
    assert set(out[2]) == {131}  # the last lane


@pytest.mark.parametrize("space", ["global", "generic"])
def test_generic_addresses(runner, space):
    """Lanes of one instruction in different spaces."""
    a, out = random(32, 32), aligned(32)
    text = """.shared .align 4 .b32 s[32]; mov.u64 %rd1, s; cvta.shared.u64 %rd1, %rd1;
        mad.wide.u32 %rd1, %t, 4, %rd1; setp.lt.u32 %p1, %t, 16;
        ld.u32 %r1, [%at0]; add.u32 %r1, %r1, 1; st.u32 [%rd1], %r1;
        selp.b64 %rd2, %rd1, %at0, %p1; ld.u32 %r2, [%rd2]; st.u32 [%at1], %r2;"""
    text = text.replace("ld.u32 %r1", "ld.global.u32 %r1") if space == "global" else text
    assert not runner.run(text, Input(a), Output(out))
    want = np.where(np.arange(32) < 16, a + 1, a)
    np.testing.assert_array_equal(out, want)


def test_read_only_loads(runner):
    a, out = random(32, 32), aligned(32)
    text = "ld.global.nc.u32 %r1, [%at0]; st.global.u32 [%at1], %r1;"
    assert not runner.run(text, Input(a), Output(out))
    np.testing.assert_array_equal(out, a)


# ---- atomics
OPERATIONS: dict[str, tuple[tuple[str, ...], Callable[[int, int], int]]] = {
    "add": (("u32", "s32", "u64"), lambda old, b: old + b),
    "min": (("u32", "s32", "u64", "s64"), min),
    "max": (("u32", "s32", "u64", "s64"), max),
    "and": (("b32", "b64"), lambda old, b: old & b),
    "or": (("b32", "b64"), lambda old, b: old | b),
    "xor": (("b32", "b64"), lambda old, b: old ^ b),
    "exch": (("b32", "b64"), lambda old, b: b),
    "inc": (("u32",), lambda old, b: 0 if old >= b else old + 1),
    "dec": (("u32",), lambda old, b: b if old == 0 or old > b else old - 1),
}


def number(value: int, kind: str) -> int:
    bits = int(kind[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(
    ("operation", "kind"),
    [(name, kind) for name, (kinds, _) in OPERATIONS.items() for kind in kinds],
)
def test_atomics(runner, operation, kind, space):
    """One thread each: the old value and the new one."""
    bits = int(kind[1:])
    dtype = DTYPES[bits]
    values = np.array([0, 1, 5, (1 << bits - 1) - 1, 1 << bits - 1, (1 << bits) - 1], dtype=dtype)
    start, b = (like_gpu(x.reshape(-1)) for x in np.meshgrid(values, values))
    old, new = aligned(36, dtype), aligned(36, dtype)
    x, y = ("%r1", "%r2") if bits == 32 else ("%rd1", "%rd2")
    work = "%rd9" if space == "global" else "%r9"
    text = f""".shared .align 8 .b{bits} s[36];
        mov.u32 %r9, s; mad.lo.u32 %r9, %t, {bits // 8}, %r9; mov.b64 %rd9, %at3;
        ld.global.b{bits} {x}, [%at0]; st.{space}.b{bits} [{work}], {x};
        ld.global.b{bits} {y}, [%at1];
        atom.{space}.{operation}.{kind} {x}, [{work}], {y};
        st.global.b{bits} [%at2], {x};
        ld.{space}.b{bits} {x}, [{work}]; st.global.b{bits} [%at3], {x};"""
    findings = runner.run(text, Input(start), Input(b), Output(old), Output(new), block=36)
    assert not findings
    np.testing.assert_array_equal(old, start)
    for before, operand, after in zip(start, b, new, strict=True):
        want = OPERATIONS[operation][1](number(int(before), kind), number(int(operand), kind))
        assert int(after) == want & ((1 << bits) - 1)


@pytest.mark.parametrize("bits", [32, 64])
def test_compare_and_swap(runner, bits):
    cells = like_gpu([7, 8], DTYPES[bits])
    old = aligned(2, DTYPES[bits])
    x = "%r1" if bits == 32 else "%rd1"
    text = f"atom.global.cas.b{bits} {x}, [%at0], 7, 9; st.global.b{bits} [%at1], {x};"
    assert not runner.run(text, Buffer(cells), Output(old), block=2)
    assert list(cells) == [9, 8]
    assert list(old) == [7, 8]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_atomics_of_all_threads(runner, seed):
    """Every thread of every block gets a different number, in an order that depends on the seed."""
    cells, order = like_gpu([0, 0], np.uint32), aligned(256)
    text = """atom.global.add.u32 %r1, [%arg0], 1; red.global.add.u32 [%arg0+4], 2;
        mov.u32 %r2, %ctaid.x; mad.lo.u32 %r2, %r2, 64, %t; mad.wide.u32 %rd1, %r2, 4, %arg1;
        st.global.u32 [%rd1], %r1;"""
    assert not runner.run(text, Buffer(cells), Output(order), grid=4, block=64, seed=seed)
    assert sorted(order) == list(range(256))
    assert list(cells) == [256, 512]
    assert (list(order) == list(range(256))) == (seed == 0)
    ascending_in_warps = bool(np.all(np.diff(order.reshape(-1, 32).astype(np.int64)) > 0))
    assert ascending_in_warps == (seed == 0)
