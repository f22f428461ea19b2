"""Floating point instructions against exact rational arithmetic, rounded once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

FORMATS = {
    "f32": (np.float32, np.uint32, 24, -126, 127),
    "f64": (np.float64, np.uint64, 53, -1022, 1023),
}
NAN_BITS = {"f32": 0x7FFFFFFF, "f64": 0xFFF8000000000000}


def values(kind: str) -> np.ndarray:
    dtype, *_ = FORMATS[kind]
    info = np.finfo(dtype)
    magnitudes = [0.0, info.smallest_subnormal, info.tiny, 0.1, 0.75, 1.0, 1.0 + info.eps, 3.5]
    magnitudes += [1e10, info.max, math.inf]
    return np.array([*magnitudes, *(-m for m in magnitudes), math.nan], dtype=dtype)


def rounded(exact: Fraction, kind: str, mode: str = "rn", zero: float = 0.0) -> float:
    """The nearest number of the format in this direction. `zero` is the result for an exact
    zero."""
    dtype, _, digits, least, most = FORMATS[kind]
    if exact == 0:
        return zero
    sign = -1 if exact < 0 else 1
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, least) - digits + 1)
    steps, rest = divmod(magnitude, unit)
    up = {
        "rn": rest * 2 > unit or (rest * 2 == unit and steps % 2 == 1),
        "rz": False,
        "rm": sign < 0 and rest > 0,
        "rp": sign > 0 and rest > 0,
    }[mode]
    result = (steps + up) * unit
    if result >= Fraction(2) ** (most + 1):
        away = mode == "rn" or (mode == "rp" and sign > 0) or (mode == "rm" and sign < 0)
        return sign * (math.inf if away else float(np.finfo(dtype).max))
    return math.copysign(float(result), sign)


def bits_of(x: float, kind: str) -> int:
    dtype, integer, *_ = FORMATS[kind]
    if math.isnan(x):
        return NAN_BITS[kind]
    return int(np.array(x, dtype=dtype).view(integer))


def check(runner, instruction: str, kind: str, count: int, expected: Callable[..., float]) -> None:
    dtype, integer, *_ = FORMATS[kind]
    rows = list(itertools.product(values(kind), repeat=count))
    arrays = [np.array([row[n] for row in rows], dtype=dtype) for n in range(count)]
    got = runner.compute(instruction, integer, *arrays)
    for row, value in zip(rows, got, strict=True):
        want = bits_of(expected(*map(float, row)), kind)
        assert int(value) == want, f"{instruction} of {row}: {int(value):#x}, not {want:#x}"


def with_specials(operation: Callable[..., float], exact: Callable[..., float]):
    """`exact` for finite operands; otherwise the result of Python's IEEE arithmetic."""

    def result(*operands: float) -> float:
        if all(map(math.isfinite, operands)):
            return exact(*operands)
        try:
            return operation(*operands)
        except (ValueError, ZeroDivisionError, OverflowError):
            return math.nan

    return result


def add(kind: str, mode: str):
    def exact(a: float, b: float) -> float:
        zero = a if a == b == 0 and bits_of(a, kind) == bits_of(b, kind) else 0.0
        if mode == "rm" and zero == 0 and bits_of(zero, kind) == 0:
            zero = 0.0 if a == b == 0 and math.copysign(1, a) == math.copysign(1, b) == 1 else -0.0
        return rounded(Fraction(a) + Fraction(b), kind, mode, zero)

    return with_specials(lambda a, b: a + b, exact)


def multiply(kind: str, mode: str):
    def exact(a: float, b: float) -> float:
        zero = math.copysign(0.0, math.copysign(1, a) * math.copysign(1, b))
        return rounded(Fraction(a) * Fraction(b), kind, mode, zero)

    return with_specials(lambda a, b: a * b, exact)


def fused(kind: str, mode: str):
    def exact(a: float, b: float, c: float) -> float:
        product_zero = math.copysign(0.0, math.copysign(1, a) * math.copysign(1, b))
        total = Fraction(a) * Fraction(b) + Fraction(c)
        zero = -0.0 if mode == "rm" else 0.0
        if a * b == 0 and c == 0 and Fraction(a) * Fraction(b) == 0:
            same = math.copysign(1, product_zero) == math.copysign(1, c)
            zero = c if same else zero
        return rounded(total, kind, mode, zero)

    def special(a: float, b: float, c: float) -> float:
        if math.isinf(c) and math.isfinite(a) and math.isfinite(b):
            return c  # any product is finite
        return a * b + c

    return with_specials(special, exact)


def divide(kind: str, mode: str):
    def exact(a: float, b: float) -> float:
        sign = math.copysign(1, a) * math.copysign(1, b)
        if b == 0:
            return math.nan if a == 0 else sign * math.inf
        return rounded(Fraction(a) / Fraction(b), kind, mode, math.copysign(0.0, sign))

    return with_specials(lambda a, b: a / b if b else math.copysign(math.inf, b) * a, exact)


MODES = ["rn", "rz", "rm", "rp"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", FORMATS)
def test_sums_products_quotients(runner, kind, mode):
    check(runner, f"add.{mode}.{kind} d, a, b;", kind, 2, add(kind, mode))
    subtract = add(kind, mode)
    check(runner, f"sub.{mode}.{kind} d, a, b;", kind, 2, lambda a, b: subtract(a, -b))
    check(runner, f"mul.{mode}.{kind} d, a, b;", kind, 2, multiply(kind, mode))
    check(runner, f"div.{mode}.{kind} d, a, b;", kind, 2, divide(kind, mode))
    reciprocal = divide(kind, mode)
    check(runner, f"rcp.{mode}.{kind} d, a;", kind, 1, lambda a: reciprocal(1.0, a))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", FORMATS)
def test_fused_multiply_add(runner, kind, mode):
    check(runner, f"fma.{mode}.{kind} d, a, b, c;", kind, 3, fused(kind, mode))


@pytest.mark.parametrize("kind", FORMATS)
def test_square_root(runner, kind):
    dtype = FORMATS[kind][0]

    def root(a: float) -> float:
        with np.errstate(invalid="ignore"):
            return float(np.sqrt(dtype(a)))

    check(runner, f"sqrt.rn.{kind} d, a;", kind, 1, root)


@pytest.mark.parametrize("kind", FORMATS)
def test_sign(runner, kind):
    check(runner, f"neg.{kind} d, a;", kind, 1, lambda a: -a)
    check(runner, f"abs.{kind} d, a;", kind, 1, abs)


@pytest.mark.parametrize("kind", FORMATS)
def test_extremes(runner, kind):
    """The number if the other one is NaN, and -0 below +0."""

    def extreme(pick):
        def result(a: float, b: float) -> float:
            if math.isnan(a) or math.isnan(b):
                return b if math.isnan(a) else a
            return pick([a, b], key=lambda x: (x, math.copysign(1, x)))

        return result

    check(runner, f"min.{kind} d, a, b;", kind, 2, extreme(min))
    check(runner, f"max.{kind} d, a, b;", kind, 2, extreme(max))


ORDERED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", [*ORDERED, *(f"{n}u" for n in ORDERED), "num", "nan"])
def test_comparisons(runner, kind, name):
    def expected(a: float, b: float) -> bool:
        unordered = math.isnan(a) or math.isnan(b)
        if name in ("num", "nan"):
            return unordered == (name == "nan")
        return name.endswith("u") if unordered else ORDERED[name.removesuffix("u")](a, b)

    rows = list(itertools.product(values(kind), repeat=2))
    arrays = [np.array([row[n] for row in rows], dtype=FORMATS[kind][0]) for n in range(2)]
    text = f".reg .pred p; setp.{name}.{kind} p, a, b; selp.b32 d, 1, 0, p;"
    got = runner.compute(text, np.uint32, *arrays)
    for row, value in zip(rows, got, strict=True):
        assert bool(value) == expected(*map(float, row)), f"{name} of {row}"


def test_approximations(runner):
    """The exact value, rounded: within the hardware's error bound in the manual."""
    a = np.array(
        [0, -0.0, 1, -1, 0.5, 3.7, -140, -126.5, 127.5, 128, np.inf, -np.inf, np.nan], "f4"
    )
    with np.errstate(all="ignore"):
        want = np.exp2(a.astype(np.float64)).astype(np.float32)
    want[np.abs(want) < np.finfo(np.float32).tiny] = 0  # .ftz
    got = runner.compute("ex2.approx.ftz.f32 d, a;", np.uint32, a).view(np.float32)
    np.testing.assert_array_equal(got, want)
    a = np.array([0, 1, 2, 0.1, 1e30, 2e-38, -1, np.inf, np.nan, 1e-40], dtype=np.float32)
    with np.errstate(all="ignore"):
        want = np.log2(a.astype(np.float64)).astype(np.float32)
    got = runner.compute("lg2.approx.f32 d, a;", np.uint32, a).view(np.float32)
    np.testing.assert_array_equal(got, want)
    want[-1] = -np.inf  # a subnormal number is zero
    got = runner.compute("lg2.approx.ftz.f32 d, a;", np.uint32, a).view(np.float32)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("lanes", [1, 3, 7, 31])
def test_idle_lanes_keep_their_values(runner, lanes):
    """Arithmetic runs over whole registers; inactive lanes must not change."""
    from ptx.programs import Output, aligned

    out = aligned(32, np.float32)
    findings = runner.run(
        f"setp.lt.u32 %p1, %t, {lanes}; mov.f32 %f1, 0f40000000; cvt.rn.f32.u32 %f2, %t;"
        "@%p1 add.rn.f32 %f2, %f2, %f1; @%p1 mul.rn.f32 %f2, %f2, %f2; st.global.f32 [%at0], %f2;",
        Output(out),
    )
    assert not findings
    t = np.arange(32, dtype=np.float32)
    np.testing.assert_array_equal(out, np.where(t < lanes, (t + 2) ** 2, t))
