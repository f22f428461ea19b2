"""cvt in all the forms that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ptx.programs import Output, aligned

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
FLOATS = {"f32": np.float32, "f64": np.float64}


def bits(kind: str) -> int:
    return int(kind[1:])


def limits(kind: str) -> tuple[int, int]:
    if kind[0] == "u":
        return 0, (1 << bits(kind)) - 1
    return -(1 << bits(kind) - 1), (1 << bits(kind) - 1) - 1


def number(value: int, kind: str) -> int:
    value &= (1 << bits(kind)) - 1
    return value - (1 << bits(kind)) if kind[0] == "s" and value >> (bits(kind) - 1) else value


def storage(kind: str) -> type:
    return {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[bits(kind)]


def interesting(kind: str) -> np.ndarray:
    top = 1 << bits(kind) - 1
    raw = {0, 1, 5, 0x7F, 0x80, 0xFF, top - 1, top, top + 1, 2 * top - 1}
    raw |= {1 << 15, 1 << 16, (1 << 24) + 1, (1 << 25) + 3, 1 << 31, (1 << 53) + 1, (1 << 62) + 1}
    return np.array(sorted(x for x in raw if x < 2 * top), dtype=storage(kind))


# Registers have 16 bits at least: an 8-bit result is extended by its sign.
def extended(value: int, kind: str) -> int:
    return number(value, kind) & ((1 << max(bits(kind), 16)) - 1)


def register(kind: str) -> type:
    return np.uint16 if bits(kind) == 8 else storage(kind)


@pytest.mark.parametrize("saturate", ["", ".sat"])
@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("result", INTEGERS)
def test_integer_to_integer(runner, source, result, saturate):
    a = interesting(source)
    (low, high), (lowest, highest) = limits(result), limits(source)
    if low <= lowest and highest <= high:
        saturate = ""  # PTX has .sat only where it makes a difference
    got = runner.compute(f"cvt{saturate}.{result}.{source} d, a;", register(result), a)
    for x, value in zip(a, got, strict=True):
        exact = number(int(x), source)
        want = min(max(exact, low), high) if saturate else exact
        assert int(value) == extended(want, result), f"{exact}: {value}"


@pytest.mark.parametrize("source", ["u8", "s8", "u16", "s16", "u32", "s32"])
@pytest.mark.parametrize("result", ["u32", "s64", "f32"])
def test_source_register_may_be_wider(runner, source, result):
    a = np.array([0x0123456789ABCDEF, 0xFEDCBA9876543210, 0xFF80], dtype=np.uint64)
    rounding = ".rn" if result == "f32" else ""
    storage_type = np.uint32 if bits(result) == 32 else np.uint64
    got = runner.compute(f"cvt{rounding}.{result}.{source} d, a;", storage_type, a)
    for x, value in zip(a, got, strict=True):
        exact = number(int(x), source)
        if result == "f32":
            assert int(value) == int(np.float32(exact).view(np.uint32))
        else:
            assert int(value) == exact & ((1 << bits(result)) - 1)


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("result", FLOATS)
def test_integer_to_float(runner, source, result):
    a = interesting(source)
    got = runner.compute(f"cvt.rn.{result}.{source} d, a;", storage(result), a)
    exact = [number(int(x), source) for x in a]
    if result == "f64":
        want = np.array([float(x) for x in exact])  # Python rounds correctly
    else:
        want = torch.tensor(exact, dtype=torch.float64).numpy().astype(np.float32)
        exact_in_double = [int(float(x)) == x for x in exact]
        # The others have more than 53 bits: here rounding twice makes no difference.
        assert all(exact_in_double) or bits(source) == 64
    np.testing.assert_array_equal(got.view(FLOATS[result]), want)


FLOAT_VALUES = [0.0, 0.4, 0.5, 0.6, 1.5, 2.5, 126.5, 127.5, 128.5, 255.5, 32767.5, 65535.5]
FLOAT_VALUES += [2.0**31 - 0.5, 2.0**31, 2.0**32 - 0.5, 2.0**32, 2.0**62, 2.0**63, 2.0**64, 1e30]
FLOAT_VALUES += [math.inf, *(-x for x in FLOAT_VALUES), -math.inf, math.nan]


def whole(x: float, mode: str) -> int:
    return {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode](x)


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("result", INTEGERS)
def test_float_to_integer(runner, source, result, mode):
    a = np.array(FLOAT_VALUES, dtype=FLOATS[source])
    got = runner.compute(f"cvt.{mode}.{result}.{source} d, a;", register(result), a)
    low, high = limits(result)
    for x, value in zip(a.astype(np.float64), got, strict=True):
        if math.isnan(x):
            want = 0
        elif math.isinf(x):
            want = high if x > 0 else low
        else:
            want = min(max(whole(float(x), mode), low), high)
        assert int(value) == extended(want, result), f"{x}: {value}"


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("kind", FLOATS)
def test_round_to_integral(runner, kind, mode):
    a = np.array(FLOAT_VALUES, dtype=FLOATS[kind])
    got = runner.compute(f"cvt.{mode}.{kind}.{kind} d, a;", storage(kind), a).view(FLOATS[kind])
    want = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](a)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(
        np.signbit(got), np.signbit(want) & ~np.isnan(want) | (np.isnan(want) & (kind == "f64"))
    )


def test_between_floats(runner):
    a = np.array(
        [*FLOAT_VALUES, 1 + 2**-24, 1 + 3 * 2**-24, 1e-40, 1e-46, 3.5e38], dtype=np.float64
    )
    got = runner.compute("cvt.rn.f32.f64 d, a;", np.uint32, a).view(np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, a.astype(np.float32))
    b = np.array([*FLOAT_VALUES, 1e-40], dtype=np.float32)
    got = runner.compute("cvt.f64.f32 d, a;", np.uint64, b).view(np.float64)
    np.testing.assert_array_equal(got, b.astype(np.float64))


def test_saturate_float(runner):
    a = np.array([-1, -0.0, 0.0, 1e-40, 0.25, 1, 1.5, np.inf, -np.inf, np.nan], dtype=np.float32)
    got = runner.compute("cvt.sat.f32.f32 d, a;", np.uint32, a)
    want = np.nan_to_num(np.clip(a, 0, 1), nan=0.0) + np.float32(0)  # no -0
    np.testing.assert_array_equal(got, want.view(np.uint32))


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_16_bits(runner, kind, dtype):
    """All numbers of 16 bits, and floats around the middles between them."""
    raw = np.arange(1 << 16, dtype=np.uint16)
    exact = torch.from_numpy(raw.view(np.int16)).view(dtype).float().numpy()
    got = runner.compute(f"cvt.f32.{kind} d, a;", np.uint32, raw).view(np.float32)
    np.testing.assert_array_equal(got, exact)
    assert set(got[np.isnan(exact)].view(np.uint32)) == {0x7FFFFFFF}

    finite = np.sort(exact[np.isfinite(exact)])
    with np.errstate(all="ignore"):
        middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
        a = np.concatenate(
            [
                finite,
                middles,
                np.nextafter(middles, np.float32(np.inf)),
                np.nextafter(middles, np.float32(-np.inf)),
                np.array([65519.9, 65520, 1e38, 3.4e38, np.inf, -np.inf], np.float32),
            ]
        )
    want = torch.from_numpy(a).to(dtype).view(torch.int16).numpy().view(np.uint16)
    got = runner.compute(f"cvt.rn.{kind}.f32 d, a;", np.uint16, a)
    np.testing.assert_array_equal(got, want)
    nan = runner.compute(f"cvt.rn.{kind}.f32 d, a;", np.uint16, np.array([np.nan], np.float32))
    assert nan[0] == 0x7FFF


def test_addresses(runner):
    """cvta: a generic address of shared memory is one that loads know as such."""
    out = aligned(1)
    findings = runner.run(
        ".shared .align 4 .b32 s; mov.u64 %rd1, s; cvta.shared.u64 %rd2, %rd1;"
        "mov.u32 %r1, 7; st.u32 [%rd2], %r1; cvta.to.shared.u64 %rd3, %rd2;"
        "ld.shared.u32 %r2, [%rd3]; st.global.u32 [%arg0], %r2;",
        Output(out),
        block=1,
    )
    assert not findings
    assert out[0] == 7
