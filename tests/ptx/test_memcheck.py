"""memcheck and initcheck: bounds, alignment, inputs, bytes that nothing wrote."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.programs import Buffer, Input, Output, aligned, kinds, like_gpu

WORDS = ".shared .align 16 .b32 words[32]; .shared .align 16 .b32 others[32];"
SHARED = f"{WORDS} mov.u32 %r1, words; mad.lo.u32 %r1, %t, 4, %r1;"


@pytest.fixture
def words() -> np.ndarray:
    return like_gpu(np.arange(64), np.uint32)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("ld.global.u32 %r1, [%arg0+256];", "256 bytes into argument 0 (256 bytes)"),
        ("ld.global.u32 %r1, [%arg0+-4];", "-4 bytes into argument 0"),
        ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%arg0+256];", "256 bytes into"),
        ("st.global.u32 [%arg0+256], 1;", "writes global memory out of bounds"),
        ("atom.global.add.u32 %r1, [%arg0+256], 1;", "out of bounds"),
        ("mov.u64 %rd1, 0; ld.global.u32 %r1, [%rd1];", "nowhere near an allocation"),
        ("ld.u32 %r1, [%arg0+256];", "global memory out of bounds"),
        ("setp.eq.u32 %p1, %t, 31; @%p1 ld.global.u32 %r1, [%arg0+256];", "thread 31: reads"),
        (f"{SHARED} st.shared.u32 [%r1+128], %t;", "into a shared variable (128 bytes)"),
        (f"{SHARED} st.shared.u32 [%r1+-4], %t;", "writes shared memory out of bounds"),
        (f"{SHARED} mov.u32 %r2, 0; ld.shared.u32 %r3, [%r2];", "shared memory out of bounds"),
        (f"{SHARED} atom.shared.add.u32 %r2, [%r1+128], 1;", "out of bounds"),
    ],
)
@pytest.mark.parametrize("lockstep", [True, False])
def test_out_of_bounds(runner, words, text, where, lockstep):
    found = runner.run(text, Buffer(words), lockstep=lockstep, races=False, initialized=False)
    assert kinds(found) == {"memcheck"}
    assert where in found[0]
    assert not runner.error


@pytest.mark.parametrize(
    "text",
    [
        "ld.global.u32 %r1, [%arg0+252];",
        "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%arg0+240];",
        "setp.eq.u32 %p1, %t, 77; @%p1 ld.global.u32 %r1, [%arg0+256];",
        f"{SHARED} st.shared.u32 [%r1], %t;",
        f"{SHARED} mov.u32 %r2, others; st.shared.u32 [%r2+124], 1;",
    ],
)
def test_in_bounds(runner, words, text):
    assert not runner.run(text, Buffer(words), races=False)


def test_dynamic_shared_memory_has_the_size_of_the_launch(runner):
    declarations = ".extern .shared .align 16 .b8 dynamic[];"
    text = "mov.u32 %r1, dynamic; st.shared.u32 [%r1+60], 1;"
    options = {"declarations": declarations, "block": 1}
    assert not runner.run(text, shared_bytes=64, **options)
    for size in (60, 0):
        found = runner.run(text, shared_bytes=size, **options)
        assert kinds(found) == {"memcheck"}


def test_half_in_bounds(runner, words):
    """An allocation that ends within the access."""
    found = runner.run("ld.global.u64 %rd1, [%arg0+8];", Input(words[:3]), block=1)
    assert kinds(found) == {"memcheck"}


def test_neighbouring_allocations_are_not_one(runner, words):
    """The second begins where the first one ends, and the access lies in both."""
    first, second = words[:3], words[3:]
    assert kinds(runner.run("ld.global.u64 %rd1, [%arg0+8];", Input(first), Input(second))) == {
        "memcheck"
    }
    assert not runner.run("ld.global.u32 %r1, [%arg0+12];", Input(first), Input(second))


@pytest.mark.parametrize("text", ["st.global.u32 [%at0], 1;", "red.global.add.u32 [%at0], 1;"])
def test_inputs_may_not_be_written(runner, words, text):
    before = words.copy()
    found = runner.run(text, Input(words))
    assert kinds(found) == {"memcheck"}
    assert "which is an input" in found[0]
    np.testing.assert_array_equal(words, before)
    assert not runner.run(text, Buffer(words))


@pytest.mark.parametrize(
    "text",
    [
        "ld.global.u16 %h1, [%arg0+1];",
        "ld.global.u32 %r1, [%arg0+2];",
        "ld.global.u64 %rd1, [%arg0+4];",
        "ld.global.v2.u32 {%r1, %r2}, [%arg0+4];",
        "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%arg0+8];",
        "st.global.u32 [%arg0+2], 1;",
        "atom.global.add.u32 %r1, [%arg0+2], 1;",
        f"{SHARED} st.shared.u32 [words+2], 1;",
        f"{SHARED} ld.shared.v4.u32 {{%r2, %r3, %r4, %r5}}, [words+8];",
        f"{SHARED} cp.async.ca.shared.global [words+4], [%arg0], 8; cp.async.wait_all;",
        f"{SHARED} cp.async.ca.shared.global [words], [%arg0+4], 8; cp.async.wait_all;",
        f"{SHARED} cp.async.cg.shared.global [words+8], [%arg0], 16; cp.async.wait_all;",
        f"{SHARED} and.b32 %r2, %t, 7; mad.lo.u32 %r2, %r2, 16, %r1; mov.u32 %r3, words;"
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r3+8];",
    ],
)
def test_misaligned(runner, words, text):
    block = 32 if "ldmatrix" in text else 1
    found = runner.run(text, Buffer(words), block=block, initialized=False)
    assert kinds(found) == {"memcheck"}
    assert "misaligned" in found[0]
    assert not runner.run(
        text.replace("+8]", "]").replace("+4]", "]").replace("+2]", "]").replace("+1]", "]"),
        Buffer(words),
        block=block,
        initialized=False,
    )


def test_read_only_loads_of_what_the_launch_wrote(runner, words):
    text = "st.global.u32 [%at0], 1; ld.global.nc.u32 %r1, [%at0];"
    found = runner.run(text, Buffer(words))
    assert kinds(found) == {"memcheck"}
    assert "read-only" in found[0]
    assert not runner.run(
        "ld.global.nc.u32 %r1, [%at0]; st.global.u32 [%at0+128], 1;", Buffer(words)
    )


def test_parameters_out_of_bounds(runner, words):
    found = runner.run("ld.param.u32 %r1, [arg0+8];", Buffer(words), block=1)
    assert kinds(found) == {"memcheck"}
    assert not runner.run("ld.param.u32 %r1, [arg0+4];", Buffer(words), block=1)


def test_findings_name_the_place(runner, words):
    """Kernel, source line and where it was inlined, PTX line, block and thread; each place once."""
    text = """.loc 2 55 9
        setp.ne.u32 %p1, %t, 3;
        @%p1 bra over;
        .loc 1 7 1, function_name $L__info, inlined_at 2 55 9
        ld.global.u32 %r1, [%arg0+256];
        over:"""
    files = '.file 1 "/somewhere/rank.cu"\n.file 2 "/somewhere/outer.cu"\n'
    found = runner.run(text, Buffer(words), grid=5, declarations=files)
    assert len(found) == 1
    assert found[0].startswith("[memcheck] k at rank.cu:7 (inlined at outer.cu:55), PTX line ")
    assert "`ld.global.u32 %r1, [%arg0+256];`, block 0, thread 3: reads global memory" in found[0]


# ---- initialization
@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (f"{SHARED} ld.shared.u32 %r2, [%r1];", True),
        (f"{SHARED} st.shared.u32 [%r1], 1; ld.shared.u32 %r2, [%r1];", False),
        (f"{SHARED} st.shared.u16 [%r1], 1; ld.shared.u32 %r2, [%r1];", True),
        (f"{SHARED} st.shared.u16 [%r1], 1; ld.shared.u16 %h2, [%r1];", False),
        (f"{SHARED} atom.shared.add.u32 %r2, [%r1], 1;", True),
        (f"{SHARED} st.shared.u32 [%r1], 1; atom.shared.add.u32 %r2, [%r1], 1;", False),
        ("ld.global.u32 %r2, [%at0];", True),
        ("st.global.u32 [%at0], 1; ld.global.u32 %r2, [%at0];", False),
    ],
)
@pytest.mark.parametrize("block", [1, 32])
def test_uninitialized(runner, text, finding, block):
    out = aligned(block)
    end = " st.global.u32 [%at0], 1;"
    found = runner.run(text + end, Output(out), block=block)
    assert kinds(found) == ({"initcheck"} if finding else set())
    assert not runner.run(text + end, Output(out), block=block, initialized=False)


def test_shared_memory_is_uninitialized_in_every_block(runner):
    text = f"""{SHARED} mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 0;
        @%p1 st.shared.u32 [%r1], 1; ld.shared.u32 %r3, [%r1];"""
    assert not runner.run(text, grid=1)
    found = runner.run(text, grid=2)
    assert kinds(found) == {"initcheck"}
    assert "block 1" in found[0]


@pytest.mark.parametrize("missing", [0, 1, 5])
def test_outputs_must_be_written(runner, missing):
    out = aligned(32)
    text = f"setp.lt.u32 %p1, %t, {32 - missing}; @%p1 st.global.u32 [%at0], 1;"
    found = runner.run(text, Output(out))
    if not missing:
        assert not found
        return
    first = 4 * (32 - missing)
    assert found == [
        f"[output] {4 * missing} of 128 bytes of argument 0 were not written, the first at {first}"
    ]
