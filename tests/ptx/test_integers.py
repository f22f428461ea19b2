"""Integer instructions against Python's integers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

VALUES = {
    8: [0, 1, 2, 7, 0x7F, 0x80, 0x81, 0xFF],
    16: [0, 1, 2, 7, 0x100, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF],
    32: [0, 1, 2, 31, 33, 0x8000, 0x10000, 0x12345678, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF],
    64: [0, 1, 3, 63, 1 << 31, 1 << 32, 0x123456789ABCDEF, (1 << 63) - 1, 1 << 63, (1 << 64) - 1],
}
ALL = ("u16", "s16", "u32", "s32", "u64", "s64")
SIGNED = ("s16", "s32", "s64")
BITS = ("b16", "b32", "b64")


def width(kind: str) -> int:
    return int(kind[1:])


def number(value: int, kind: str) -> int:
    """The bits as a number of this type."""
    bits = width(kind)
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def unsigned(bits: int) -> type:
    return {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]


def check(
    runner, instruction: str, kinds: Sequence[str], expected: Callable[..., int], result: int
) -> None:
    """All combinations of the interesting values of the operands' types."""
    rows = list(itertools.product(*(VALUES[width(kind)] for kind in kinds)))
    if instruction.startswith(("div", "rem")):
        rows = [row for row in rows if row[1]]
    arrays = [
        np.array([row[n] for row in rows], dtype=unsigned(width(kind)))
        for n, kind in enumerate(kinds)
    ]
    got = runner.compute(instruction, unsigned(result), *arrays)
    for row, value in zip(rows, got, strict=True):
        operands = [number(x, kind) for x, kind in zip(row, kinds, strict=True)]
        want = expected(*operands) & ((1 << result) - 1)
        assert int(value) == want, f"{instruction} of {operands}: {int(value):#x}, not {want:#x}"


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": (ALL, lambda a, b: a + b),
    "sub": (ALL, lambda a, b: a - b),
    "mul.lo": (ALL, lambda a, b: a * b),
    "min": (ALL, min),
    "max": (ALL, max),
    "div": (ALL, truncated),
    "rem": (ALL, lambda a, b: a - b * truncated(a, b)),
    "and": (BITS, lambda a, b: a & b),
    "or": (BITS, lambda a, b: a | b),
    "xor": (BITS, lambda a, b: a ^ b),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, (kinds, _) in BINARY.items() for kind in kinds]
)
def test_binary(runner, name, kind):
    check(runner, f"{name}.{kind} d, a, b;", [kind, kind], BINARY[name][1], width(kind))


@pytest.mark.parametrize("kind", ALL)
def test_high_half_of_products(runner, kind):
    bits = width(kind)
    check(runner, f"mul.hi.{kind} d, a, b;", [kind] * 2, lambda a, b: a * b >> bits, bits)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(runner, kind):
    bits, wide = width(kind), kind[0] + str(2 * width(kind))
    check(runner, f"mul.wide.{kind} d, a, b;", [kind] * 2, lambda a, b: a * b, 2 * bits)
    sum_ = [kind, kind, wide]
    check(runner, f"mad.wide.{kind} d, a, b, c;", sum_, lambda a, b, c: a * b + c, 2 * bits)


@pytest.mark.parametrize("kind", ALL)
def test_multiply_add(runner, kind):
    check(runner, f"mad.lo.{kind} d, a, b, c;", [kind] * 3, lambda a, b, c: a * b + c, width(kind))


@pytest.mark.parametrize("kind", SIGNED)
def test_sign(runner, kind):
    check(runner, f"neg.{kind} d, a;", [kind], lambda a: -a, width(kind))
    check(runner, f"abs.{kind} d, a;", [kind], abs, width(kind))


@pytest.mark.parametrize("kind", BITS)
def test_shifts_by_any_amount(runner, kind):
    bits = width(kind)

    def shifted(value: int, by: int) -> int:
        return value << min(by, 64)

    check(runner, f"shl.{kind} d, a, b;", [kind, "u32"], shifted, bits)
    for sort in "bus":
        operand = sort + kind[1:]
        right = [operand if sort == "s" else "u" + kind[1:], "u32"]
        check(runner, f"shr.{operand} d, a, b;", right, lambda a, by: a >> min(by, 64), bits)


def reversed_bits(value: int, bits: int) -> int:
    return int(f"{value:0{bits}b}"[::-1], 2)


@pytest.mark.parametrize("bits", [32, 64])
def test_bits(runner, bits):
    kind = f"b{bits}"
    check(runner, f"not.{kind} d, a;", [kind], lambda a: ~a, bits)
    check(runner, f"popc.{kind} d, a;", [kind], lambda a: bin(a).count("1"), 32)
    check(runner, f"clz.{kind} d, a;", [kind], lambda a: bits - a.bit_length(), 32)
    check(runner, f"brev.{kind} d, a;", [kind], lambda a: reversed_bits(a, bits), bits)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_highest_bit(runner, kind):
    def highest(a: int) -> int:
        return (~a if a < 0 else a).bit_length() - 1

    def amount(a: int) -> int:
        return width(kind) - 1 - highest(a) if highest(a) >= 0 else -1

    check(runner, f"bfind.{kind} d, a;", [kind], highest, 32)
    check(runner, f"bfind.shiftamt.{kind} d, a;", [kind], amount, 32)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("position", [0, 5, 31, 40, 63, 200])
@pytest.mark.parametrize("length", [0, 1, 8, 32, 64, 255])
def test_fields(runner, bits, position, length):
    def inserted(a: int, b: int) -> int:
        ones = (1 << length) - 1 << position
        return (b & ~ones) | ((a << position) & ones)

    def extracted(a: int) -> int:
        return (a >> position) & ((1 << length) - 1)

    def extracted_signed(a: int) -> int:
        if not length:
            return 0
        sign = (a >> min(position + length - 1, bits - 1)) & 1
        inside = [(a >> (position + n)) & 1 if position + n < bits else sign for n in range(bits)]
        return sum((inside[n] if n < length else sign) << n for n in range(bits))

    kind, where = f"b{bits}", f"{position}, {length}"
    unsigned_kind = f"u{bits}"
    check(runner, f"bfi.{kind} d, a, b, {where};", [kind, kind], inserted, bits)
    check(runner, f"bfe.u{bits} d, a, {where};", [unsigned_kind], extracted, bits)
    check(runner, f"bfe.s{bits} d, a, {where};", [unsigned_kind], extracted_signed, bits)


@pytest.mark.parametrize("selector", [0x3210, 0x7654, 0x0123, 0xFEDC, 0x8080, 0x4BA9])
def test_permuted_bytes(runner, selector):
    def permuted(a: int, b: int) -> int:
        source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        picked = []
        for n in range(4):
            choice = selector >> (4 * n) & 15
            byte = source[choice & 7]
            picked.append((0xFF if byte & 0x80 else 0) if choice & 8 else byte)
        return int.from_bytes(bytes(picked), "little")

    check(runner, f"prmt.b32 d, a, b, {selector};", ["u32", "u32"], permuted, 32)


@pytest.mark.parametrize("table", [0, 0x80, 0xE8, 0x96, 0xCA, 0x1B, 0xFF])
def test_logic_of_three(runner, table):
    def looked_up(a: int, b: int, c: int) -> int:
        index = [(a >> n & 1) << 2 | (b >> n & 1) << 1 | (c >> n & 1) for n in range(32)]
        return sum((table >> i & 1) << n for n, i in enumerate(index))

    check(runner, f"lop3.b32 d, a, b, c, {table};", ["u32"] * 3, looked_up, 32)


@pytest.mark.parametrize("direction", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(runner, direction, mode):
    def shifted(a: int, b: int, c: int) -> int:
        by = c & 31 if mode == "wrap" else min(c, 32)
        both = b << 32 | a
        return both >> by if direction == "r" else both << by >> 32

    check(runner, f"shf.{direction}.{mode}.b32 d, a, b, c;", ["u32"] * 3, shifted, 32)


@pytest.mark.parametrize("a_kind", ["u", "s"])
@pytest.mark.parametrize("b_kind", ["u", "s"])
def test_dot_of_bytes(runner, a_kind, b_kind):
    def dot(a: int, b: int, c: int) -> int:
        products = [
            number(a >> 8 * n, a_kind + "8") * number(b >> 8 * n, b_kind + "8") for n in range(4)
        ]
        return sum(products) + c

    check(runner, f"dp4a.{a_kind}32.{b_kind}32 d, a, b, c;", ["u32", "u32", "u32"], dot, 32)


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@pytest.mark.parametrize("name", [*COMPARISONS, *UNSIGNED_NAMES])
def test_comparisons(runner, name):
    compared = COMPARISONS[UNSIGNED_NAMES.get(name, name)]
    kinds = [k for k in (*ALL, *BITS) if k[0] == "u" or name not in UNSIGNED_NAMES]
    kinds = [k for k in kinds if k[0] != "b" or name in ("eq", "ne")]
    for kind in kinds:
        text = f".reg .pred p; setp.{name}.{kind} p, a, b; selp.b32 d, 1, 0, p;"
        check(runner, text, [kind, kind], lambda a, b: int(compared(a, b)), 32)


@pytest.mark.parametrize("joint", ["and", "or", "xor"])
@pytest.mark.parametrize("negated", [False, True])
def test_joined_comparisons(runner, joint, negated):
    """setp p|q, a, b, [!]c: p is (a < b) joined with c, q is !(a < b) joined with c."""

    def joined(x: bool, c: bool) -> bool:
        return {"and": x and c, "or": x or c, "xor": x != c}[joint]

    def expected(a: int, b: int, c: int) -> int:
        other = (c == 0) if negated else (c != 0)
        return joined(a < b, other) + 2 * joined(not a < b, other)

    text = (
        ".reg .pred p, q, o; .reg .b32 x; setp.ne.u32 o, c, 0;"
        f"setp.lt.{joint}.u32 p|q, a, b, {'!' if negated else ''}o;"
        "selp.b32 d, 1, 0, p; selp.b32 x, 2, 0, q; add.u32 d, d, x;"
    )
    check(runner, text, ["u32"] * 3, expected, 32)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_select(runner, bits):
    text = f".reg .pred p; setp.ne.u32 p, c, 0; selp.b{bits} d, a, b, p;"
    kinds = [f"u{bits}", f"u{bits}", "u32"]
    check(runner, text, kinds, lambda a, b, c: a if c else b, bits)


def test_predicate_logic(runner):
    text = """.reg .pred p, q, r, s; .reg .b32 x;
        setp.ne.u32 p, a, 0; setp.ne.u32 q, b, 0;
        and.pred r, p, q; selp.b32 d, 1, 0, r;
        or.pred r, p, q; selp.b32 x, 2, 0, r; add.u32 d, d, x;
        xor.pred r, p, q; selp.b32 x, 4, 0, r; add.u32 d, d, x;
        not.pred r, p; mov.pred s, r; selp.b32 x, 8, 0, s; add.u32 d, d, x;"""

    def expected(a: int, b: int) -> int:
        p, q = a != 0, b != 0
        return (p and q) + 2 * (p or q) + 4 * (p != q) + 8 * (not p)

    check(runner, text, ["u32", "u32"], expected, 32)


def test_guards(runner):
    text = ".reg .pred p; setp.lt.u32 p, a, b; mov.u32 d, 1; @p mov.u32 d, 2; @!p add.u32 d, d, 4;"
    check(runner, text, ["u32", "u32"], lambda a, b: 2 if a < b else 5, 32)


@pytest.mark.parametrize(
    ("text", "kinds", "expected", "bits"),
    [
        ("mov.b64 d, {a, b};", ["u32", "u32"], lambda a, b: b << 32 | a, 64),
        ("mov.b32 d, {a, b};", ["u16", "u16"], lambda a, b: b << 16 | a, 32),
        (".reg .b32 x; mov.b64 {x, d}, a;", ["u64"], lambda a: a >> 32, 32),
        (".reg .b16 x; mov.b32 {d, x}, a;", ["u32"], lambda a: a, 16),
        (
            ".reg .b16 x<4>; mov.b64 {x0, x1, x2, x3}, a; mov.b64 d, {x3, x2, x1, x0};",
            ["u64"],
            lambda a: sum((a >> 16 * n & 0xFFFF) << 48 - 16 * n for n in range(4)),
            64,
        ),
        ("mov.u32 d, -2;", ["u32"], lambda a: -2, 32),
        ("mov.u16 d, 0xFFFF;", ["u16"], lambda a: 0xFFFF, 16),
        ("mov.b32 d, 0f3F800000;", ["u32"], lambda a: 0x3F800000, 32),
        ("mov.b64 d, 0d3FF0000000000000;", ["u64"], lambda a: 0x3FF0000000000000, 64),
    ],
)
def test_moves(runner, text, kinds, expected, bits):
    check(runner, text, kinds, expected, bits)


SPECIAL = {
    "%tid.x": lambda b, t: t % 4,
    "%tid.y": lambda b, t: t // 4 % 3,
    "%tid.z": lambda b, t: t // 12,
    "%ntid.x": lambda b, t: 4,
    "%ntid.y": lambda b, t: 3,
    "%ntid.z": lambda b, t: 5,
    "%ctaid.x": lambda b, t: b % 2,
    "%ctaid.y": lambda b, t: b // 2 % 3,
    "%ctaid.z": lambda b, t: b // 6,
    "%nctaid.x": lambda b, t: 2,
    "%nctaid.y": lambda b, t: 3,
    "%nctaid.z": lambda b, t: 2,
    "%laneid": lambda b, t: t % 32,
    "%lanemask_eq": lambda b, t: 1 << t % 32,
    "%lanemask_lt": lambda b, t: (1 << t % 32) - 1,
    "%lanemask_le": lambda b, t: (2 << t % 32) - 1,
    "%lanemask_gt": lambda b, t: ~((2 << t % 32) - 1) & 0xFFFFFFFF,
    "%lanemask_ge": lambda b, t: ~((1 << t % 32) - 1) & 0xFFFFFFFF,
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_registers(runner, name):
    from ptx.programs import Output, aligned

    out = aligned((12, 60))
    place = """mov.u32 %r1, %tid.z; mov.u32 %r2, %tid.y; mad.lo.u32 %r1, %r1, 3, %r2;
        mad.lo.u32 %r1, %r1, 4, %t; mov.u32 %r2, %ctaid.z; mov.u32 %r3, %ctaid.y;
        mad.lo.u32 %r2, %r2, 3, %r3; mov.u32 %r3, %ctaid.x; mad.lo.u32 %r2, %r2, 2, %r3;
        mad.lo.u32 %r1, %r2, 60, %r1; mad.wide.u32 %rd1, %r1, 4, %arg0;"""
    findings = runner.run(
        f"{place} mov.u32 %r4, {name}; st.global.u32 [%rd1], %r4;",
        Output(out),
        grid=(2, 3, 2),
        block=(4, 3, 5),
    )
    assert not findings
    want = [[SPECIAL[name](b, t) for t in range(60)] for b in range(12)]
    np.testing.assert_array_equal(out, np.array(want, dtype=np.uint32))
