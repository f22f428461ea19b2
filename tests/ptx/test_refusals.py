"""Anything unknown is refused, by name and line, in one line of text."""

from __future__ import annotations

import pytest
from ptx.programs import HEADER, kernel_text


def refusal(executor, text: str) -> str:
    with pytest.raises(RuntimeError) as error:
        executor.load_ptx(text)
    message = str(error.value)
    assert "\n" not in message
    return message


def in_kernel(instructions: str) -> str:
    return kernel_text(instructions)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("frobnicate.u32 %r1, %r2;", "unknown instruction frobnicate.u32"),
        ("add.u8 %r1, %r2, %r3;", "unknown instruction add.u8"),
        ("add.f32 %f1, %f2, %f3;", "unknown instruction add.f32"),  # ptxas may fuse it
        ("add.rn.ftz.f32 %f1, %f2, %f3;", "unknown modifier .ftz of instruction add.rn.ftz.f32"),
        ("add.sat.s32 %r1, %r2, %r3;", "unknown modifier .sat"),
        ("div.approx.f32 %f1, %f2, %f3;", "unknown instruction div.approx.f32"),
        ("sqrt.approx.f32 %f1, %f2;", "unknown instruction sqrt.approx.f32"),
        ("rsqrt.approx.f32 %f1, %f2;", "unknown instruction rsqrt"),
        ("neg.u32 %r1, %r2;", "unknown instruction neg.u32"),
        ("shl.s32 %r1, %r2, %r3;", "unknown instruction shl.s32"),
        ("setp.lt.ftz.f32 %p1, %f1, %f2;", "unknown modifier .ftz"),
        ("setp.lt.b32 %p1, %r1, %r2;", "unknown instruction setp.lt.b32"),
        ("setp.near.u32 %p1, %r1, %r2;", "unknown instruction setp.near.u32"),
        ("cvt.rz.f32.f64 %f1, %rd1;", "unknown instruction cvt.rz.f32.f64"),
        ("cvt.rn.relu.f16.f32 %h1, %f1;", "unknown modifier .relu"),
        ("cvt.f32.s32 %f1, %r1;", "unknown instruction cvt.f32.s32"),
        ("cvta.local.u64 %rd1, %rd2;", "unknown instruction cvta.local.u64"),
        ("prmt.b32.f4e %r1, %r2, %r3, 0;", "unknown modifier .f4e"),
        ("ld.local.u32 %r1, [%rd1];", "unknown modifier .local"),
        ("ld.const.u32 %r1, [%rd1];", "unknown modifier .const"),
        ("ld.volatile.global.u32 %r1, [%rd1];", "unknown modifier .volatile"),
        ("ld.acquire.gpu.global.u32 %r1, [%rd1];", "unknown modifier .acquire"),
        ("ld.global.L1::no_allocate.u32 %r1, [%rd1];", "unknown modifier .L1::no_allocate"),
        ("ld.shared.nc.u32 %r1, [%rd1];", "unknown modifier .nc"),
        ("ld.shared::cluster.u32 %r1, [%rd1];", "unknown modifier .shared::cluster"),
        ("st.release.gpu.global.u32 [%rd1], %r1;", "unknown modifier .release"),
        ("st.param.u32 [arg0], %r1;", "unknown instruction st.param.u32"),
        ("atom.global.add.f32 %f1, [%rd1], %f2;", "unknown instruction atom.global.add.f32"),
        ("atom.acq_rel.gpu.global.add.u32 %r1, [%rd1], 1;", "unknown modifier .acq_rel"),
        ("cp.async.bulk.commit_group;", "unknown modifier .bulk"),
        ("cp.async.cg.shared.global [%r1], [%rd1], 8;", "an asynchronous copy of 8 bytes"),
        ("cp.async.ca.shared.global [%r1], [%rd1], 16, 8;", "with 4 operands"),
        ("bar.sync 1;", "a barrier other than 0"),
        ("bar.sync 0, 64;", "with 2 operands"),
        ("bar.arrive 0, 64;", "without .sync"),
        ("barrier.cluster.arrive;", "barrier.cluster.arrive"),
        ("shfl.up.b32 %r1, %r2, 1, 0;", "without .sync"),
        ("vote.sync.ballot.pred %p1, %p2, -1;", "without .b32"),
        ("redux.sync.add.b32 %r1, %r2, -1;", "unknown instruction redux.sync.add.b32"),
        ("match.any.sync.b32 %r1, %r2, -1;", "unknown instruction match"),
        ("membar.gl;", "unknown instruction membar.gl"),
        ("fence.sc.gpu;", "unknown instruction fence.sc.gpu"),
        ("mbarrier.init.shared.b64 [%r1], 1;", "unknown instruction mbarrier"),
        ("wgmma.fence.sync.aligned;", "unknown instruction wgmma"),
        ("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r4};", "m16n8k16"),
        ("ldmatrix.sync.aligned.m16n16.x1.shared.b8 {%r1, %r2}, [%r3];", "without .m8n8"),
        ("call foo;", "unknown instruction call"),
        ("trap;", "unknown instruction trap"),
        ("nanosleep.u32 100;", "unknown instruction nanosleep"),
        ("mov.u32 %r1, %clock;", "unknown register %clock"),
        ("mov.u64 %rd1, %globaltimer;", "unknown register of 64 bits %globaltimer"),
        ("mov.u32 %r1, %smid;", "unknown register %smid"),
        ("mov.u32 %r1, %r99;", "unknown register %r99"),
        ("mov.u32 %r1, table;", "unknown symbol table"),
        ("mov.u32 %r1, %rd1;", "register %rd1 has another width"),
        ("mov.u64 %rd1, %r1;", "register %r1 has another width"),
        ("mov.u32 %rd1, %r1;", "register %rd1 has another width"),
        ("add.u32 %r1, %r2;", "with 2 operands"),
        ("@%r1 add.u32 %r1, %r2, %r3;", "unknown predicate %r1"),
        ("bra nowhere;", "unknown label nowhere"),
        ("ld.global.v2.u32 {%r1, %r2, %r3}, [%rd1];", "wrong number of elements"),
        ("ld.global.v4.u64 {%rd1, %rd2, %rd3, %rd4}, [%rd5];", "unknown instruction ld"),
        ("ld.global.u64 %r1, [%rd1];", "register %r1 is too narrow"),
        ("ld.global.u32 %r1, %rd1;", "expected an address"),
        ("add.u32 %r1, %r2, 0x;", "bad number 0x"),
        (".local .align 4 .b8 stack[16];", "unknown directive .local"),
        ('.pragma "unroll 4";', "unknown .pragma unroll 4"),
        ("add.u32 %r1, %r2, %r3", "expected ;"),
    ],
)  # fmt: skip
def test_instructions(executor, instruction, message):
    text = in_kernel(f"mov.u32 %r1, 0;\n{instruction}")
    found = refusal(executor, text)
    assert message in found
    line = text[: text.index(instruction)].count("\n") + 1
    line += message == "expected ;"  # detected on the next line
    assert found.startswith(f"PTX line {line}: ")
    assert found.endswith(" in k")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "PTX line 1: this is not PTX: it does not begin with .version"),
        ("int main() { return 0; }", "this is not PTX"),
        ("\x7fELF\x02\x01", "this is not PTX: a character of code 127"),
        (".version nine", "bad .version nine"),
        (".version 9.6\n.target sm_90", "PTX .version 9.6 is newer than 9.5, the newest that the "
         "executor has been tested with"),
        (".version 10.0\n.target sm_90", ".version 10.0 is newer than 9.5"),
        (".version 8.0\n.target compute_80", "unknown .target compute_80"),
        (".version 8.0\n.target sm_80\n.address_size 32", "only .address_size 64"),
        (HEADER + ".global .align 4 .b8 table[4];", "PTX line 4: unknown directive .global"),
        (HEADER + ".visible .const .align 4 .b8 table[4];", "unknown directive .const"),
        (HEADER + ".func twice() { ret; }", "unknown directive .func"),
        (HEADER + ".extern .func twice();", "unknown directive .extern .func"),
        (HEADER + "/* no end", "a comment without an end"),
        (HEADER + '.file 1 "no end', "a string without an end"),
        (HEADER + ".visible .entry k() .maxnreg 32 { ret; }", "unknown directive .maxnreg in k"),
        (HEADER + ".visible .entry k(.param .u32) { ret; }", "expected a name"),
        (HEADER + ".visible .entry k() { ret;", "a kernel without an end in k"),
        (HEADER + ".visible .entry k() { a: a: ret; }", "label a is defined twice"),
        (HEADER + ".visible .entry k() { ret; } .visible .entry k() { ret; }", "two kernels"),
    ],
)  # fmt: skip
def test_texts(executor, text, message):
    assert message in refusal(executor, text)


def test_the_newest_version_is_accepted(executor):
    text = in_kernel("").replace(".version 8.0", ".version 9.0")
    assert executor.load_ptx(text) == ["k"]


def test_unknown_options(executor):
    with pytest.raises(TypeError, match=r"unknown option colour; known are seed, .*step_limit"):
        executor.configure(colour=1)
    with pytest.raises(TypeError):
        executor.set_device(colour=1)
