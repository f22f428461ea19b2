"""synccheck, asynchronous copies, dependent launches, and kernels that hang."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.programs import Buffer, Input, Output, aligned, kinds, like_gpu

HALF = "setp.lt.u32 %p1, %t, 16;"
OPTIONS = [{}, {"lockstep": False, "seed": 5}, {"quantum": 2, "seed": 6}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("text", "block", "finding"),
    [
        # block barriers
        (f"{HALF} @%p1 bra a; bar.sync 0; bra b; a: bar.sync 0; b:", 32, "divergent barrier"),
        (f"{HALF} @%p1 bra a; bar.sync 0; a: bar.sync 0;", 32, "divergent barrier"),
        (f"{HALF} @%p1 ret; bar.sync 0;", 32, "have ended"),
        ("setp.lt.u32 %p1, %t, 32; @%p1 bra a; bar.sync 0; bra b; a: bar.sync 0; b:", 64,
         "warps meet at different barriers"),
        ("setp.lt.u32 %p1, %t, 32; @%p1 bra a; bar.sync 0; bra b;"
         "a: bar.red.or.pred %p2, 0, %p1; b:", 64, "different kinds"),
        # warps
        ("bar.warp.sync 1;", 32, "not in its own member mask"),
        (f"{HALF} @%p1 bra a; bar.warp.sync -1; bra b; a: vote.sync.any.pred %p2, 1, -1; b:", 32,
         "different instructions"),
        (f"{HALF} selp.u32 %r1, -1, 0xfffeffff, %p1; setp.eq.u32 %p2, %t, 16;"
         "@%p2 mov.u32 %r1, -1; bar.warp.sync %r1;", 32, "different member masks"),
        (f"{HALF} @%p1 shfl.sync.idx.b32 %r1, %t, 20, 31, 0xffff;", 32, "does not take part"),
        (f"{HALF} @%p1 ret; mov.u32 %r1, 0; mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
         "{%r1, %r1, %r1, %r1}, {%r1, %r1, %r1, %r1}, {%r1, %r1}, {%r1, %r1, %r1, %r1};", 32,
         "without all 32 lanes"),
    ],
)  # fmt: skip
def test_synchronization_that_fails(runner, text, block, finding, options):
    found = runner.run(text, block=block, **options)
    assert kinds(found) == {"synccheck"}, found
    assert any(finding in text for text in found)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("text", "block"),
    [
        (f"{HALF} @%p1 bra a; add.u32 %r1, %t, 1; a: bar.sync 0;", 32),
        ("setp.lt.u32 %p1, %t, 32; @%p1 ret; bar.sync 0;", 64),  # a whole warp may end
        ("bar.sync 0;", 40),
        (f"{HALF} @%p1 bar.warp.sync 0xffff; @!%p1 bar.warp.sync 0xffff0000;", 32),
        # lanes may reach a warp barrier from different places
        (f"{HALF} @%p1 bra a; bar.warp.sync -1; bra b; a: bar.warp.sync -1; b:", 32),
        (f"{HALF} @%p1 shfl.sync.idx.b32 %r1, %t, 10, 31, 0xffff;", 32),
        (f"{HALF} @%p1 ret; bar.warp.sync 0xffff0000;", 32),
    ],
)
def test_synchronization_that_succeeds(runner, text, block, options):
    assert not runner.run(text, block=block, **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_deadlock(runner, options):
    """One warp waits at the barrier, the other for a lane that waits there as well."""
    text = f"{HALF} @%p1 bar.sync 0; @!%p1 bar.warp.sync -1;"
    found = runner.run(text, **options)
    assert kinds(found) == {"synccheck"}
    assert "deadlock" in found[0]
    assert "warp 0 lanes ffff0000 wait at" in found[0]
    assert runner.error.startswith("cudaErrorLaunchFailure")


def test_hang(runner):
    found = runner.run("loop: bra loop;", step_limit=1000)
    assert kinds(found) == {"hang"}
    assert runner.error.startswith("cudaErrorLaunchFailure")
    text = "mov.u32 %r1, 0; loop: add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 300; @%p1 bra loop;"
    assert not runner.run(text, step_limit=1000)
    assert not runner.error


# ---- asynchronous copies
# Thread t copies four words; then it reads the first of them.
COPY = """.shared .align 16 .b8 s[512]; mov.u32 %r1, s; mad.lo.u32 %r1, %t, 16, %r1;
    mad.wide.u32 %rd1, %t, 16, %arg0; cp.async.cg.shared.global [%r1], [%rd1], 16;"""
READ = "ld.shared.u32 %r2, [%r1]; st.global.u32 [%at1], %r2;"
COMMIT, WAIT = "cp.async.commit_group;", "cp.async.wait_group 0;"


@pytest.fixture
def source() -> np.ndarray:
    return like_gpu(np.arange(128) + 1000, np.uint32)


@pytest.mark.parametrize(
    ("steps", "finding"),
    [
        (COMMIT + WAIT + READ, None),
        ("cp.async.wait_all;" + READ, None),
        (READ + "cp.async.wait_all;", "has not brought yet"),
        (COMMIT + READ + WAIT, "has not brought yet"),
        # a copy that was not committed does not arrive
        (WAIT + READ + "cp.async.wait_all;", "has not brought yet"),
        (COMMIT + "cp.async.wait_group 1;" + READ + WAIT, "has not brought yet"),
        (COMMIT + COMMIT + "cp.async.wait_group 1;" + READ + WAIT, None),
        (COMMIT + "st.shared.u32 [%r1], 1;" + WAIT + READ, "writes bytes"),
        (COMMIT + READ.replace("ld", "atom").replace("shared.u32 %r2, [%r1]", "shared.add.u32 %r2, "
         "[%r1], 1") + WAIT, "has not brought yet"),
        ("st.global.u32 [%at1], 1;", "while its asynchronous copies are in flight"),
        (COMMIT + "st.global.u32 [%at1], 1;", "while its asynchronous copies are in flight"),
        (COMMIT + "setp.lt.u32 %p1, %t, 5; @%p1 ret;" + WAIT + READ, "in flight"),
    ],
)  # fmt: skip
def test_asynchronous_copies(runner, source, steps, finding):
    out = aligned(32)
    found = runner.run(COPY + steps, Input(source), Buffer(out))
    if finding is None:
        assert not found
        np.testing.assert_array_equal(out, source[::4])
    else:
        assert kinds(found) == {"async"}, found
        assert finding in found[0]


@pytest.mark.parametrize("size", [4, 8, 16])
def test_sizes_of_copies(runner, source, size):
    out = aligned((4, 32))
    text = f""".shared .align 16 .b8 s[512]; mov.u32 %r1, s; mad.lo.u32 %r1, %t, {size}, %r1;
        mad.wide.u32 %rd1, %t, {size}, %arg0; cp.async.ca.shared.global [%r1], [%rd1], {size};
        cp.async.commit_group; cp.async.wait_group 0; ld.shared.u32 %r2, [%r1+{size - 4}];
        st.global.u32 [%at1], %r2;"""
    assert not runner.run(text, Input(source), Buffer(out))
    np.testing.assert_array_equal(out[0], source[: 8 * size].reshape(32, -1)[:, -1])


def test_copies_hold_garbage_until_they_arrive(runner, source):
    out = aligned(32)
    text = COPY + COMMIT + READ + WAIT
    runner.run(text, Input(source), Buffer(out))
    assert not set(out) & set(source)
    runner.run(text, Input(source), Buffer(out), land_early=True)
    np.testing.assert_array_equal(out, source[::4])


def test_only_the_waiting_thread_has_the_data(runner, source):
    """Other threads need a barrier after the wait."""
    out = aligned(32)
    text = COPY + COMMIT + WAIT + "{between} xor.b32 %r3, %t, 1; mov.u32 %r1, s;"
    text += "mad.lo.u32 %r1, %r3, 16, %r1;" + READ
    found = runner.run(text.format(between=""), Input(source), Buffer(out))
    assert kinds(found) == {"racecheck"}
    assert not runner.run(text.format(between="bar.sync 0;"), Input(source), Buffer(out))


def test_a_barrier_before_the_wait_does_not_help(runner, source):
    """The data arrive at the wait, so that others need a barrier after it."""
    out = aligned(32)
    text = COPY + COMMIT + "bar.sync 0;" + WAIT + "xor.b32 %r3, %t, 1; mov.u32 %r1, s;"
    found = runner.run(text + "mad.lo.u32 %r1, %r3, 16, %r1;" + READ, Input(source), Buffer(out))
    assert kinds(found) == {"racecheck"}


def test_a_copy_over_bytes_that_others_read(runner, source):
    out = aligned(64)
    text = """.shared .align 16 .b8 s[512]; mov.u32 %r1, s; setp.eq.u32 %p1, %t, 0;
        @%p1 st.shared.u32 [%r1], 1; bar.sync 0; ld.shared.u32 %r2, [%r1]; {between}
        @%p1 cp.async.cg.shared.global [%r1], [%arg0], 16; cp.async.wait_all;
        st.global.u32 [%at1], %r2;"""
    found = runner.run(text.format(between=""), Input(source), Buffer(out), block=64)
    assert kinds(found) == {"racecheck"}
    assert not runner.run(text.format(between="bar.sync 0;"), Input(source), Buffer(out), block=64)


def test_sources_of_copies_are_checked(runner, source):
    found = runner.run(COPY + "cp.async.wait_all;", Input(source[:64]))
    assert kinds(found) == {"memcheck"}
    found = runner.run(COPY + "cp.async.wait_all;", Output(source), initialized=True)
    assert kinds(found) == {"initcheck", "output"}


# ---- dependent launches
NEW = ".version 8.0\n.target sm_90\n.address_size 64\n"
GRID_WAIT = "griddepcontrol.launch_dependents; griddepcontrol.wait;"


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (f"{GRID_WAIT} ld.global.u32 %r1, [%at0];", None),
        (f"ld.global.u32 %r1, [%at0]; {GRID_WAIT}", "memory is used before"),
        (f"st.global.u32 [%at0], 1; {GRID_WAIT}", "memory is used before"),
        (f"red.global.add.u32 [%at0], 1; {GRID_WAIT}", "memory is used before"),
        (f"setp.eq.u32 %p1, %t, 77; @%p1 ret; {GRID_WAIT}", "a thread may end before"),
        (f"setp.eq.u32 %p1, %t, 77; @%p1 bra on; {GRID_WAIT} on: st.global.u32 [%at0], 1;",
         "memory is used before"),
        (f"setp.eq.u32 %p1, %t, 77; @%p1 bra on; add.u32 %r1, %t, 1; on: {GRID_WAIT}", None),
    ],
)  # fmt: skip
def test_memory_before_the_wait(runner, text, finding):
    words = like_gpu(np.zeros(32), np.uint32)
    found = runner.run(text, Buffer(words), header=NEW)
    assert kinds(found) == ({"static"} if finding else set())
    if finding:
        assert finding in found[0]
    assert not runner.run(text.replace(GRID_WAIT, ""), Buffer(words), header=NEW)
