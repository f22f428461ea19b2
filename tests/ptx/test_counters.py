"""Counters: instructions, wavefronts of shared memory, sectors of global memory."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.programs import Buffer, like_gpu


@pytest.fixture
def count(executor, runner):
    def run(text: str, *arguments, **options) -> dict:
        executor.clear_counters()
        assert not runner.run(text, *arguments, profile=True, races=False, **options)
        return executor.counters()["k"]

    return run


SHARED = ".shared .align 16 .b8 s[16384]; mov.u32 %r1, s;"


@pytest.mark.parametrize(
    ("stride", "width", "wavefronts", "ideal"),
    [
        (4, "u32", 1, 1),
        (0, "u32", 1, 1),  # all lanes one word
        (8, "u32", 2, 1),
        (128, "u32", 32, 1),
        (132, "u32", 1, 1),
        (2, "u16", 1, 1),
        (8, "u64", 2, 2),
        (16, "v4.u32", 4, 4),
        (128, "v4.u32", 32, 4),
    ],
)
def test_wavefronts(count, stride, width, wavefronts, ideal):
    value = {"u16": "%h1", "u32": "%r2", "u64": "%rd2", "v4.u32": "{%r2, %r3, %r4, %r5}"}[width]
    text = f"{SHARED} mad.lo.u32 %r1, %t, {stride}, %r1; st.shared.{width} [%r1], {value};"
    c = count(text)
    assert (c["shared_requests"], c["shared_wavefronts"], c["shared_ideal"]) == (
        1,
        wavefronts,
        ideal,
    )


@pytest.mark.parametrize(
    ("stride", "offset", "sectors", "ideal"),
    [(4, 0, 4, 4), (4, 4, 5, 4), (0, 0, 1, 1), (8, 0, 8, 4), (32, 0, 32, 4), (256, 0, 32, 4)],
)
def test_sectors(count, stride, offset, sectors, ideal):
    words = like_gpu(np.zeros(4096), np.uint32)
    text = f"mad.wide.u32 %rd1, %t, {stride}, %arg0; ld.global.u32 %r1, [%rd1+{offset}];"
    c = count(text, Buffer(words))
    assert (c["load_requests"], c["load_sectors"], c["load_ideal"]) == (1, sectors, ideal)
    assert c["load_bytes"] == 128
    assert c["store_requests"] == 0


def test_atomics_of_one_address_are_serialized(count):
    words = like_gpu(np.zeros(64), np.uint32)
    c = count("red.global.add.u32 [%arg0], 1; red.global.add.u32 [%at0], 1;", Buffer(words))
    assert c["atomic_requests"] == 2
    assert c["atomic_serial"] == 32 + 1


def test_instructions_by_category_and_line(count):
    text = """.loc 1 10 1
        setp.lt.u32 %p1, %t, 8;
        @!%p1 bra over;
        .loc 1 20 1
        add.u32 %r1, %t, 1;
        add.u32 %r1, %r1, 1;
        over: .loc 1 30 1
        bar.sync 0;"""
    c = count(text, declarations='.file 1 "a/file.cu"\n', grid=3, block=64)
    assert (c["launches"], c["blocks"], c["threads"]) == (1, 3, 64)
    lines = {name: n for name, n in c["lines"].items() if name.startswith("file.cu")}
    # three blocks of two warps, and only the first warp adds; the return is on the last line
    assert lines == {"file.cu:10": 3 * 2 * 2, "file.cu:20": 3 * 2, "file.cu:30": 3 * 2 * 2}
    assert c["warp"]["int"] == 3 * 2
    assert c["thread"]["int"] == 3 * 2 * 8
    assert c["warp"]["bar"] == 3 * 2
    assert c["barriers"] == 3
    assert c["branches"] == 3 * 2
    assert c["divergent_branches"] == 3
    assert c["warp_instructions"] == sum(c["warp"].values())
    assert c["thread_instructions"] == sum(c["thread"].values())


def test_where_and_lines(executor, count):
    c = count(".loc 1 7 1\nmov.u32 %r1, 1;", declarations='.file 1 "x.cu"\n')
    lines = executor.lines("k")
    assert len(lines) == len(c["executed"])
    at = lines.index("x.cu:7")
    assert executor.where("k", at) == "x.cu:7  mov.u32 %r1, 1;"
    with pytest.raises(KeyError, match="no launch of kernel other"):
        executor.lines("other")


def test_matrices_and_copies(count):
    words = like_gpu(np.zeros(128), np.uint32)
    text = f"""{SHARED} mad.lo.u32 %r1, %t, 16, %r1; mad.wide.u32 %rd1, %t, 16, %arg0;
        cp.async.cg.shared.global [%r1], [%rd1], 16; cp.async.wait_all; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r1];"""
    c = count(text, Buffer(words))
    assert (c["async_requests"], c["async_sectors"], c["async_ideal"]) == (1, 16, 16)
    assert (c["async_shared_wavefronts"], c["async_shared_ideal"]) == (4, 4)
    assert (c["matrix_requests"], c["matrix_wavefronts"], c["matrix_ideal"]) == (1, 4, 4)


def test_options_start_from_the_defaults(executor, runner):
    executor.clear_counters()
    runner.run("mov.u32 %r1, 1;", profile=True)
    executor.configure()
    assert not runner.run(".shared .b32 s; bar.sync 0;")
    assert executor.counters()["k"]["barriers"] == 0
