"""Instructions that synchronize the lanes of a warp."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.programs import Input, Output, aligned, like_gpu

LANES = np.arange(32)
ALL = 0xFFFFFFFF
RNG = np.random.default_rng(1)


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The lane that is read, and whether it is in range, as in the PTX manual."""
    clamp, segment = c & 31, c >> 8 & 31
    most = (lane & segment) | (clamp & ~segment)
    least = lane & segment
    if mode == "up":
        source, inside = lane - b, lane - b >= most
    elif mode == "down":
        source, inside = lane + b, lane + b <= most
    elif mode == "bfly":
        source, inside = lane ^ b, lane ^ b <= most
    else:
        source = least | (b & ~segment)
        inside = source <= most
    return (source if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("b", [0, 1, 3, 8, 17, 31])
def test_shuffles(runner, mode, width, b):
    """c as CUDA's functions compute it from the width of a group."""
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    out = aligned((2, 32))
    text = (
        f"add.u32 %r1, %t, 100; shfl.sync.{mode}.b32 %r2|%p1, %r1, {b}, {c}, -1;"
        "selp.u32 %r3, 1, 0, %p1; st.global.u32 [%at0], %r2; st.global.u32 [%at0+128], %r3;"
    )
    assert not runner.run(text, Output(out))
    want = [shuffled(mode, int(lane), b, c) for lane in LANES]
    np.testing.assert_array_equal(out[0], [source + 100 for source, _ in want])
    np.testing.assert_array_equal(out[1], [inside for _, inside in want])


def test_shuffle_with_a_different_source_per_lane(runner):
    sources = like_gpu(RNG.permutation(32), np.uint32)
    out = aligned(32)
    text = (
        "ld.global.u32 %r1, [%at0]; mul.lo.u32 %r2, %t, 3;"
        "shfl.sync.idx.b32 %r2, %r2, %r1, 31, -1; st.global.u32 [%at1], %r2;"
    )
    assert not runner.run(text, Input(sources), Output(out))
    np.testing.assert_array_equal(out, sources * 3)


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("mask", [ALL, 0x0000FFFF, 0x80000001, 0x00F00000])
def test_votes(runner, mask, lockstep):
    """Only by the lanes of a mask; the others branch around it."""
    out = aligned((5, 32), fill=99)
    text = f"""
        mov.u32 %r9, %lanemask_eq; and.b32 %r9, %r9, {mask}; setp.eq.u32 %p9, %r9, 0;
        mov.u32 %r1, 77; mov.u32 %r2, 77; mov.u32 %r3, 77; mov.u32 %r4, 77; mov.u32 %r5, 77;
        @%p9 bra around;
        and.b32 %r8, %t, 4; setp.ne.u32 %p1, %r8, 0;
        vote.sync.ballot.b32 %r1, %p1, {mask};
        vote.sync.any.pred %p2, %p1, {mask}; selp.u32 %r2, 1, 0, %p2;
        vote.sync.all.pred %p2, %p1, {mask}; selp.u32 %r3, 1, 0, %p2;
        vote.sync.uni.pred %p2, %p1, {mask}; selp.u32 %r4, 1, 0, %p2;
        vote.sync.ballot.b32 %r5, !%p1, {mask};
        around:
        st.global.u32 [%at0], %r1; st.global.u32 [%at0+128], %r2; st.global.u32 [%at0+256], %r3;
        st.global.u32 [%at0+384], %r4; st.global.u32 [%at0+512], %r5;"""
    assert not runner.run(text, Output(out), lockstep=lockstep, seed=3)
    members = [lane for lane in range(32) if mask >> lane & 1]
    votes = [bool(lane & 4) for lane in members]
    ballot = sum(1 << lane for lane in members if lane & 4)
    results = [ballot, any(votes), all(votes), len(set(votes)) == 1, mask & ~ballot]
    for row, value in zip(out, results, strict=True):
        want = np.where([mask >> lane & 1 for lane in range(32)], int(value), 77)
        np.testing.assert_array_equal(row, want)


REDUCTIONS = {
    "add.u32": lambda x: int(x.astype(np.uint64).sum()) & ALL,
    "add.s32": lambda x: int(x.astype(np.uint64).sum()) & ALL,
    "min.u32": lambda x: int(x.min()),
    "max.u32": lambda x: int(x.max()),
    "min.s32": lambda x: int(x.view(np.int32).min()) & ALL,
    "max.s32": lambda x: int(x.view(np.int32).max()) & ALL,
    "and.b32": lambda x: int(np.bitwise_and.reduce(x)),
    "or.b32": lambda x: int(np.bitwise_or.reduce(x)),
    "xor.b32": lambda x: int(np.bitwise_xor.reduce(x)),
}


@pytest.mark.parametrize("operation", REDUCTIONS)
def test_reductions(runner, operation):
    a = like_gpu(RNG.integers(0, 1 << 32, 32, dtype=np.uint64).astype(np.uint32) | 0x10)
    out = aligned(32)
    text = (
        f"ld.global.u32 %r1, [%at0]; setp.lt.u32 %p1, %t, 20; mov.u32 %r2, 5;"
        f"@%p1 redux.sync.{operation} %r2, %r1, 0xfffff; st.global.u32 [%at1], %r2;"
    )
    assert not runner.run(text, Input(a), Output(out))
    assert set(out[:20]) == {REDUCTIONS[operation](a[:20])}
    assert set(out[20:]) == {5}


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("quantum", [0, 1, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_divergent_loops_reconverge(runner, lockstep, quantum, seed):
    """Lanes run different numbers of iterations; then all shuffle."""
    out = aligned((2, 64))
    text = """mov.u32 %r1, 0; mov.u32 %r2, 0;
        loop: setp.gt.u32 %p1, %r1, %t; @%p1 bra done;
        add.u32 %r2, %r2, %r1; add.u32 %r1, %r1, 1; bra loop;
        done: bar.warp.sync -1; shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
        st.global.u32 [%at0], %r2; st.global.u32 [%at0+256], %r3;"""
    options = {"lockstep": lockstep, "quantum": quantum, "seed": seed}
    assert not runner.run(text, Output(out), block=64, **options)
    t = np.arange(64)
    want = t * (t + 1) // 2
    np.testing.assert_array_equal(out[0], want)
    np.testing.assert_array_equal(out[1], want[t ^ 1])


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("bar.red.or.pred %p2, 0, %p1; selp.u32 %r2, 1, 0, %p2;", 1),
        ("bar.red.and.pred %p2, 0, %p1; selp.u32 %r2, 1, 0, %p2;", 0),
        ("bar.red.and.pred %p2, 0, !%p1; selp.u32 %r2, 1, 0, %p2;", 0),
        ("barrier.cta.red.popc.aligned.u32 %r2, 0, %p1;", 17),
        ("barrier.sync.aligned 0; mov.u32 %r2, 3;", 3),
        ("bar.cta.sync 0; mov.u32 %r2, 3;", 3),
    ],
)
def test_barriers(runner, instruction, expected):
    out = aligned(96)
    text = f"setp.gt.u32 %p1, %t, 78; {instruction} st.global.u32 [%at0], %r2;"
    assert not runner.run(text, Output(out), block=96)
    assert set(out) == {expected}


def test_part_of_a_warp(runner):
    """A block of 40 threads: the second warp has eight lanes."""
    out = aligned(40)
    text = "vote.sync.ballot.b32 %r1, 1, -1; st.global.u32 [%at0], %r1;"
    assert not runner.run(text, Output(out), block=40)
    assert set(out[:32]) == {ALL}
    assert set(out[32:]) == {0xFF}
