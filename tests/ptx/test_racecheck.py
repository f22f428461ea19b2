"""racecheck: instructions that order two accesses, and those that do not."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.programs import Buffer, kinds, like_gpu

BARRIER = "bar.sync 0;"
WARP_BARRIER = "bar.warp.sync -1;"
VOTE = "vote.sync.ballot.b32 %r9, 1, -1;"
# Every thread has one word, and reads that of the next thread (in a block of 64).
SHARED = """.shared .align 4 .b32 s[64]; mov.u32 %r1, s; add.u32 %r2, %t, 1; and.b32 %r2, %r2, 63;
    mad.lo.u32 %r2, %r2, 4, %r1; mad.lo.u32 %r1, %t, 4, %r1; st.shared.u32 [%r1], 0;"""
# The same in global memory.
GLOBAL = """add.u32 %r2, %t, 1; and.b32 %r2, %r2, 63; mad.wide.u32 %rd2, %r2, 4, %arg0;
    mov.b64 %rd1, %at0; st.global.u32 [%rd1], 0;"""

WRITE, READ_NEXT = "st.{space}.u32 [{own}], %t;", "ld.{space}.u32 %r3, [{next}];"
WRITE_NEXT = "st.{space}.u32 [{next}], %t;"
ADD, ADD_NEXT = "red.{space}.add.u32 [{own}], 1;", "red.{space}.add.u32 [{next}], 1;"


@pytest.fixture
def words() -> np.ndarray:
    return like_gpu(np.zeros(256), np.uint32)


def program(space: str, *steps: str) -> str:
    own, other = ("%r1", "%r2") if space == "shared" else ("%rd1", "%rd2")
    text = "".join(step.format(space=space, own=own, next=other) for step in steps)
    return (SHARED if space == "shared" else GLOBAL) + BARRIER + text


@pytest.mark.parametrize("space", ["shared", "global"])
@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize(
    ("first", "second", "race"),
    [
        (WRITE, READ_NEXT, True),
        (READ_NEXT, WRITE, True),
        (WRITE, WRITE_NEXT, True),
        (ADD, READ_NEXT, True),
        (READ_NEXT, ADD, True),
        (ADD, WRITE_NEXT, True),
        (WRITE, ADD_NEXT, True),
        (ADD, ADD_NEXT, False),
        (READ_NEXT, READ_NEXT, False),
        (WRITE, WRITE, False),
    ],
)
def test_pairs_of_accesses(runner, words, space, lockstep, first, second, race):
    options = {"block": 64, "lockstep": lockstep, "seed": 1}
    found = runner.run(program(space, first, second), Buffer(words), **options)
    assert {kind.split(",")[0] for kind in kinds(found)} == ({"racecheck"} if race else set())
    assert not runner.run(program(space, first, BARRIER, second), Buffer(words), **options)
    off = {"races": False} if space == "shared" else {"global_races": False}
    assert not runner.run(program(space, first, second), Buffer(words), **options, **off)


ONE_WORD = {
    "read": "ld.{space}.u32 %r3, [{own}];",
    "write": "st.{space}.u32 [{own}], 5;",
    "atomic": "red.{space}.add.u32 [{own}], 1;",
}


@pytest.mark.parametrize("space", ["shared", "global"])
@pytest.mark.parametrize("second_thread", [1, 32])
@pytest.mark.parametrize("first", ONE_WORD)
@pytest.mark.parametrize("second", ONE_WORD)
def test_one_after_the_other(runner, words, space, second_thread, first, second):
    """Accesses of thread 0 and of another thread, of its warp or the next: the later one has the
    finding."""
    steps = [
        "mov.u32 %r1, s; mov.b64 %rd1, %arg0;".replace("mov.u32 %r1, s;" * (space == "global"), ""),
        "setp.eq.u32 %p1, %t, 0; @%p1 " + ONE_WORD[first],
        f"setp.eq.u32 %p2, %t, {second_thread}; @%p2 " + ONE_WORD[second],
    ]
    found = runner.run(program(space, *steps), Buffer(words), block=64)
    race = first != second if "write" not in (first, second) else True
    race = race and (first, second) != ("read", "read")
    if not race:
        assert not found
        return
    assert kinds(found) == {"racecheck"} or (first, second) == ("write", "write")
    assert len(found) == 1
    # The warp that arrives last at the barrier in `program` continues first.
    late, before = (0, second) if second_thread == 32 else (second_thread, first)
    assert f"thread {late}: " in found[0]
    assert f"after the {before}" in found[0]


@pytest.mark.parametrize("space", ["shared", "global"])
@pytest.mark.parametrize("width", ["u8", "u16", "u32"])
def test_neighbours_within_a_word(runner, words, space, width):
    """Threads that write bytes or halves next to each other do not race; two of the same do."""
    size = {"u8": 1, "u16": 2, "u32": 4}[width]
    base = ".shared .align 4 .b32 s[64]; mov.u32 %r1, s;"
    address = "%r1" if space == "shared" else "%rd1"
    if space == "shared":
        place = f"{base} mad.lo.u32 %r1, %t, {size}, %r1;"
        shared_place = f"{base} shr.u32 %r2, %t, 1; mad.lo.u32 %r1, %r2, {size}, %r1;"
    else:
        place = f"mad.wide.u32 %rd1, %t, {size}, %arg0;"
        shared_place = f"shr.u32 %r2, %t, 1; mad.wide.u32 %rd1, %r2, {size}, %arg0;"
    store = f"cvt.u16.u32 %h1, %t; st.{space}.{width} [{address}], {'%t' if size == 4 else '%h1'};"
    assert not runner.run(place + store, Buffer(words), block=64)
    found = runner.run(shared_place + store, Buffer(words), block=64)
    assert kinds(found) <= {"racecheck", "racecheck, same value"}
    assert "racecheck" in kinds(found)


@pytest.mark.parametrize(
    "first",
    [
        "st.shared.v4.u32 [%r1], {{%t, %t, %t, %t}};",
        "st.shared.u64 [%r1+8], 5;",
        "st.shared.u32 [%r1+12], 5;",
        "red.shared.add.u32 [%r1+12], 5;",
        "st.shared.u16 [%r1+14], %h1;",
    ],
)
@pytest.mark.parametrize("offset", [15, 11])
def test_a_word_and_its_bytes(runner, first, offset):
    """Units become smaller when bytes are accessed, and keep their recorded accesses."""
    text = f""".shared .align 16 .b32 s[64]; mov.u32 %r1, s; setp.eq.u32 %p1, %t, 0;
        setp.eq.u32 %p2, %t, 32; @%p1 {first} {{between}}
        @%p2 ld.shared.u8 %r2, [%r1+{offset}];"""
    race = offset == 15 or "v4" in first or "u64" in first
    found = runner.run(text.format(between=""), block=64, initialized=False)
    assert kinds(found) == ({"racecheck"} if race else set())
    assert not runner.run(text.format(between=BARRIER), block=64, initialized=False)


@pytest.mark.parametrize("first", ["ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r1];", WARP_BARRIER])
def test_bytes_of_what_was_read(runner, first):
    """The same for readers: thread 32 writes a byte of the 16 that thread 0 has read."""
    text = f""".shared .align 16 .b32 s[64]; mov.u32 %r1, s; setp.eq.u32 %p1, %t, 0;
        setp.eq.u32 %p2, %t, 32; {"@%p1 " if first[0] == "l" else ""}{first}
        mov.u16 %h1, 0; @%p2 st.shared.u8 [%r1+5], %h1;"""
    found = runner.run(text, block=64, initialized=False)
    assert {kind.split(",")[0] for kind in kinds(found)} == (
        {"racecheck"} if first[0] == "l" else set()
    )


def test_same_value(runner):
    text = ".shared .align 4 .b32 s; st.shared.u32 [s], 7;"
    found = runner.run(text, block=2)
    assert kinds(found) == {"racecheck, same value"}
    assert not runner.run(text, block=1)
    found = runner.run(text.replace("7", "%t"), block=2)
    assert kinds(found) == {"racecheck"}


@pytest.mark.parametrize("space", ["shared", "global"])
@pytest.mark.parametrize(
    ("between", "strict", "race"),
    [
        ("", True, True),
        ("", False, True),
        (WARP_BARRIER, True, False),
        (WARP_BARRIER, False, False),
        (VOTE, True, True),
        (VOTE, False, False),
        ("shfl.sync.idx.b32 %r9, %t, 0, 31, -1;", False, False),
        ("redux.sync.add.u32 %r9, %t, -1;", False, False),
        # only half of the lanes synchronize
        ("setp.lt.u32 %p1, %t, 16; @%p1 bar.warp.sync 0xffff;", True, True),
    ],
)
def test_order_within_a_warp(runner, words, space, between, strict, race):
    # of 32 threads: the next one of the last is in no warp, and its word is never written
    text = program(space, WRITE, between, READ_NEXT)
    found = runner.run(text, Buffer(words), block=32, strict=strict, initialized=False)
    assert kinds(found) == ({"racecheck"} if race else set())


def test_no_order_between_warps(runner, words):
    text = program("shared", WRITE, WARP_BARRIER, READ_NEXT)
    found = runner.run(text, Buffer(words), block=64)
    assert "racecheck" in kinds(found)
    assert {int(text.split("thread ")[1].split(":")[0]) % 32 for text in found} <= {0, 31}


def test_order_within_groups_of_lanes(runner):
    """Groups of eight lanes synchronize: there is order within a group, none between groups."""
    text = """.shared .align 4 .b32 s[32]; mov.u32 %r1, s; mad.lo.u32 %r1, %t, 4, %r1;
        and.b32 %r3, %t, 24; mov.u32 %r4, 255; shl.b32 %r4, %r4, %r3;
        st.shared.u32 [%r1], %t; bar.warp.sync %r4;
        xor.b32 %r2, %t, {distance}; mov.u32 %r5, s; mad.lo.u32 %r2, %r2, 4, %r5;
        ld.shared.u32 %r6, [%r2];"""
    for distance in (1, 4, 7):
        assert not runner.run(text.format(distance=distance))
    for distance in (8, 16):
        assert kinds(runner.run(text.format(distance=distance))) == {"racecheck"}


def test_order_is_passed_on(runner):
    """Lane 0 synchronizes with lane 1, then lane 1 with lane 2: lane 0's accesses are before lane
    2's."""
    text = """.shared .align 4 .b32 s; setp.eq.u32 %p1, %t, 0; setp.lt.u32 %p2, %t, 2;
        setp.gt.u32 %p3, %t, 0; setp.eq.u32 %p4, %t, 2;
        @%p1 st.shared.u32 [s], 1; @%p2 bar.warp.sync 3; {second} @%p4 ld.shared.u32 %r1, [s];"""
    assert not runner.run(text.format(second="@%p3 bar.warp.sync 6;"), block=3)
    assert kinds(runner.run(text.format(second=""), block=3)) == {"racecheck"}


def test_a_reader_writes_after_others_have_read(runner):
    """Lane 1 reads, all synchronize, lane 2 reads and writes: the first read is before the
    write."""
    text = """.shared .align 4 .b32 s; setp.eq.u32 %p1, %t, 1; setp.eq.u32 %p2, %t, 2;
        setp.eq.u32 %p3, %t, 0; @%p3 st.shared.u32 [s], 1; bar.sync 0;
        @%p1 ld.shared.u32 %r1, [s]; {between}
        @%p2 ld.shared.u32 %r1, [s]; @%p2 st.shared.u32 [s], 2;"""
    assert not runner.run(text.format(between=WARP_BARRIER))
    assert kinds(runner.run(text.format(between=""))) == {"racecheck"}


@pytest.mark.parametrize("writer", [0, 32])
def test_readers_of_two_warps(runner, writer):
    """Both read alternately; then one of them writes, and only the other one's read matters."""
    text = f""".shared .align 4 .b32 s; and.b32 %r1, %t, 31; setp.eq.u32 %p1, %r1, 0;
        setp.eq.u32 %p2, %t, {writer}; @%p1 ld.shared.u32 %r2, [s]; @%p2 st.shared.u32 [s], 1;"""
    found = runner.run(text, block=64, quantum=1, initialized=False)
    assert kinds(found) == {"racecheck"}
    assert f"thread {writer}: writes" in found[0]
    assert f"after the read of thread {32 - writer} " in found[0]


BETWEEN_BLOCKS = {
    "write, read": ("st.global.u32 [%arg0], 1;", "ld.global.u32 %r1, [%arg0];", True),
    "read, write": ("ld.global.u32 %r1, [%arg0];", "st.global.u32 [%arg0], 1;", True),
    "write, write": ("st.global.u32 [%arg0], 1;", "st.global.u32 [%arg0], 2;", True),
    "read, read": ("ld.global.u32 %r1, [%arg0];", "ld.global.u32 %r1, [%arg0];", False),
    "atomic, atomic": ("red.global.add.u32 [%arg0], 1;", "red.global.add.u32 [%arg0], 1;", False),
    "atomic, read": ("red.global.add.u32 [%arg0], 1;", "ld.global.u32 %r1, [%arg0];", True),
    "other words": ("st.global.u32 [%arg0], 1;", "st.global.u32 [%arg0+4], 1;", False),
}


@pytest.mark.parametrize("name", BETWEEN_BLOCKS)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("blocks", [2, 5])
def test_between_blocks(runner, words, name, seed, blocks):
    """The first block and the last one access the same bytes; barriers do not order them."""
    first, second, race = BETWEEN_BLOCKS[name]
    text = f"""mov.u32 %r9, %ctaid.x; setp.eq.u32 %p1, %r9, {blocks - 1};
        setp.eq.u32 %p2, %r9, 0; bar.sync 0; @%p2 {first} bar.sync 0; @%p1 {second} bar.sync 0;"""
    found = runner.run(text, Buffer(words), grid=blocks, block=1, seed=seed)
    assert {kind.split(",")[0] for kind in kinds(found)} == ({"racecheck"} if race else set())
    if race:
        assert "another block" in found[0]
    assert not runner.run(text, Buffer(words), grid=1, block=1)


def test_a_block_that_reads_and_writes_what_another_block_has_read(runner, words):
    """The reads of the second block must not hide those of the first."""
    text = """mov.u32 %r9, %ctaid.x; setp.eq.u32 %p1, %r9, 1;
        ld.global.u32 %r1, [%arg0]; bar.sync 0; ld.global.u32 %r1, [%arg0];
        @%p1 st.global.u32 [%arg0], 3;"""
    found = runner.run(text, Buffer(words), grid=2, block=1)
    assert kinds(found) == {"racecheck"}


def test_no_race_between_launches(runner, words):
    first, second = "st.global.u32 [%at0], %t;", "ld.global.u32 %r1, [%at0+4];"
    text = f"mov.u32 %r9, %arg1; setp.eq.u32 %p1, %r9, 0; @%p1 {first} @!%p1 {second}"
    runner.run("", Buffer(words))  # the memory below stays registered over two launches
    module = runner.module
    module.configure()
    from ptx.programs import _prologue, kernel_text

    kinds_of, prologue = _prologue([Buffer(words), 0])
    module.load_ptx(kernel_text(f"{prologue}\n{text}", kinds_of))
    module.add_memory("words", words.ctypes.data, words.nbytes)
    for step in (0, 1):
        module.launch("k", (1, 1, 1), (64, 1, 1), 0, [words.ctypes.data, step])
    module.clear_memory()
    assert not module.take_findings()


def test_a_barrier_does_not_order_a_thread_that_has_ended(runner, words):
    """A whole warp ends after a write; the barrier of the others does not order it."""
    text = """setp.ge.u32 %p1, %t, 32; setp.eq.u32 %p2, %t, 32; @%p2 st.global.u32 [%arg0], 5;
        {between} @%p1 ret; bar.sync 0; ld.global.u32 %r1, [%arg0];"""
    found = runner.run(text.format(between=""), Buffer(words), block=64)
    assert kinds(found) == {"racecheck"}
    assert not runner.run(text.format(between=BARRIER), Buffer(words), block=64)
