"""Launches that a driver refuses, devices, and the choice of PTX."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from ptx.programs import Buffer, kernel_text, kinds, like_gpu

STATIC = ".shared .align 4 .b8 s[{bytes}]; mov.u32 %r1, s;"
KIB = 1024
INVALID_CONFIGURATION, INVALID_VALUE = "cudaErrorInvalidConfiguration", "cudaErrorInvalidValue"


@pytest.mark.parametrize(
    ("shape", "directives", "refusal"),
    [
        ({"block": 1024}, "", None),
        ({"block": 1025}, "", "too large a block"),
        ({"block": (32, 32, 1)}, "", None),
        ({"block": (32, 32, 2)}, "", "more than 1024 threads"),
        ({"block": (1, 1, 64)}, "", None),
        ({"block": (1, 1, 65)}, "", "too large a block"),
        ({"block": 0}, "", "empty"),
        ({"grid": 0}, "", "empty"),
        ({"grid": (1, 0, 1)}, "", "empty"),
        ({"grid": (70000, 1, 1), "block": 1}, "", None),
        ({"grid": (1, 65535, 1), "block": 1}, "", None),
        ({"grid": (1, 65536, 1), "block": 1}, "", "too large a grid"),
        ({"grid": (1, 1, 65536), "block": 1}, "", "too large a grid"),
        ({"grid": (1 << 31, 1, 1)}, "", "too large a grid"),
        ({"block": 128}, ".maxntid 128, 1, 1", None),
        ({"block": 129}, ".maxntid 128, 1, 1", "compiled for, 128"),
        ({"block": 64}, ".maxntid 8, 8", None),
        ({"block": 64}, ".reqntid 64", None),
        ({"block": 32}, ".reqntid 64", "requires, (64, 1, 1)"),
        ({"block": 64}, ".minnctapersm 4", None),
    ],
)
def test_shapes(runner, shape, directives, refusal):
    found = runner.run("", directives=directives, **shape)
    if refusal is None:
        assert not found
        assert not runner.error
    else:
        assert kinds(found) == {"launch"}
        assert refusal in found[0]
        assert "k <<<(" in found[0]
        assert runner.error == f"{INVALID_CONFIGURATION}: invalid configuration argument"


@pytest.mark.parametrize(
    ("static", "dynamic", "allowed", "accepted"),
    [
        (0, 48 * KIB, -1, True),
        (0, 48 * KIB + 1, -1, False),
        (128, 48 * KIB - 128, -1, True),
        (128, 48 * KIB - 127, -1, False),  # static bytes count as well
        (128, 100 * KIB, 100 * KIB, True),
        (128, 100 * KIB + 1, 100 * KIB, False),
    ],
)
def test_shared_memory(runner, static, dynamic, allowed, accepted):
    text = STATIC.format(bytes=static) if static else ""
    found = runner.run(text, shared_bytes=dynamic, allowed_shared=allowed)
    assert bool(runner.error) != accepted
    if not accepted:
        assert runner.error.startswith(INVALID_VALUE)
    # If it was requested, host code gets an error that it can report: no finding.
    assert kinds(found) == ({"launch"} if not accepted and allowed < 0 else set())


@pytest.mark.parametrize(("size", "accepted"), [(4096, True), (4100, False)])
def test_parameters(executor, runner, size, accepted):
    text = kernel_text("").replace("k()", f"k(.param .align 4 .b8 arg0[{size}])")
    executor.configure()
    executor.load_ptx(text)
    arguments = [bytes(size)]
    if accepted:
        executor.launch("k", (1, 1, 1), (1, 1, 1), 0, arguments)
        assert not executor.take_findings()
        return
    with pytest.raises(RuntimeError, match=INVALID_VALUE):
        executor.launch("k", (1, 1, 1), (1, 1, 1), 0, arguments)
    assert "4100 bytes of parameters are more than 4096" in executor.take_findings()[0]


def test_dependent_launches(executor, runner):
    new = ".version 8.0\n.target sm_90\n.address_size 64\n"
    wait = "griddepcontrol.wait;"
    assert not runner.run(wait, dependent=True, header=new)
    assert not runner.run("", header=new)
    found = runner.run("", dependent=True, header=new)
    assert kinds(found) == {"launch"}
    assert "without griddepcontrol.wait" in found[0]
    assert not runner.error
    executor.set_device(8, 9)
    found = runner.run("", dependent=True)
    assert kinds(found) == {"launch"}
    assert "compute capability 8.9" in found[0]
    assert runner.error.startswith("cudaErrorNotSupported")


def test_log_of_launches(executor, runner):
    executor.take_launches()
    runner.run("", grid=(2, 3, 1), block=(8, 4, 1), shared_bytes=100)
    runner.run("", block=2000)
    assert executor.take_launches() == [
        {
            "kernel": "k",
            "grid": (2, 3, 1),
            "block": (8, 4, 1),
            "shared_bytes": 100,
            "dependent": False,
            "ptx": 80,
        },
        {
            "kernel": "k",
            "grid": (1, 1, 1),
            "block": (2000, 1, 1),
            "shared_bytes": 0,
            "dependent": False,
            "ptx": 80,
        },
    ]
    assert executor.take_launches() == []


def test_unknown_kernel_and_arguments(executor, runner):
    runner.run("")
    with pytest.raises(ValueError, match="no kernel other"):
        executor.launch("other", (1, 1, 1), (1, 1, 1))
    with pytest.raises(ValueError, match="0 parameters"):
        executor.launch("k", (1, 1, 1), (1, 1, 1), 0, [1])


# ---- fat binaries
def entry(target: int, text: str, *, kind: int = 1, flags: int = 0x11) -> bytes:
    data = text.encode() + b"\0"
    data += bytes(-len(data) % 8)
    header = struct.pack("<HHIQIIHHIIIQQQ", kind, 0x101, 72, len(data), 0, 0, 0, 9, target, 0, 0,
                         flags, 0, 0)  # fmt: skip
    return header.ljust(72, b"\0") + data


def fat_binary(*entries: bytes) -> bytes:
    data = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(data)) + data


def code(target: int, suffix: str = "") -> str:
    body = f"st.global.u32 [%rd1], {target};"
    header = f".version 8.0\n.target sm_{target}{suffix}\n.address_size 64\n"
    return kernel_text(f"ld.param.u64 %rd1, [arg0]; {body}", ["u64"], header=header)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ({"major": 9}, 90),
        ({"major": 8}, 80),
        ({"major": 8, "minor": 9}, 80),
        ({"major": 12}, 120),
        ({"major": 10}, 90),
        ({"major": 9, "newest_ptx": 80}, 80),
        ({"major": 12, "newest_ptx": 90}, 90),
    ],
)
def test_choice_of_ptx(executor, device, expected):
    """The newest PTX that the device can run, as a driver chooses."""
    data = fat_binary(*(entry(t, code(t)) for t in (80, 120, 90)), entry(90, "\x7fELF", kind=2))
    executor.set_device(**device)
    executor.configure()
    assert executor.load_fat_binary(data) == ["k"]
    out = like_gpu([0], np.uint32)
    executor.add_memory("out", out.ctypes.data, 4)
    executor.launch("k", (1, 1, 1), (1, 1, 1), 0, [out.ctypes.data])
    executor.clear_memory()
    assert out[0] == expected
    assert executor.take_launches()[-1]["ptx"] == expected


def test_code_for_one_device_only(executor):
    """compute_90a does not run on a newer device."""
    data = fat_binary(entry(80, code(80)), entry(90, code(90, "a")))
    executor.take_launches()
    for major, expected in ((9, 90), (10, 80)):
        executor.set_device(major)
        executor.load_fat_binary(data)
        executor.launch("k", (1, 1, 1), (1, 1, 1), 0, [0])
        executor.take_findings()
        assert executor.take_launches()[-1]["ptx"] == expected


@pytest.mark.parametrize(
    ("data", "device", "message"),
    [
        (b"not a fat binary", {}, "not a fat binary"),
        (fat_binary(), {}, "a fat binary without PTX: compile with -gencode"),
        (fat_binary(entry(90, "\x7fELF", kind=2)), {}, "a fat binary without PTX"),
        (fat_binary(entry(90, code(90))), {"major": 8}, "no PTX for a device of compute capability "
         "8.0; there is compute_90"),
        (fat_binary(entry(90, code(90))), {"newest_ptx": 80}, "no PTX for a device of compute "
         "capability 9.0 in a library up to compute_80; there is compute_90"),
        (fat_binary(entry(80, "x", flags=0x2011)), {}, "the PTX for compute_80 is compressed: "
         "compile with --no-compress"),
        (fat_binary(entry(80, "x", flags=0x8011)), {}, "compressed"),
        (fat_binary(entry(80, code(80)))[:16] + bytes(80), {}, "a damaged fat binary"),
    ],
)  # fmt: skip
def test_faulty_fat_binaries(executor, data, device, message):
    executor.set_device(**device)
    with pytest.raises(RuntimeError) as error:
        executor.load_fat_binary(data.ljust(200, b"\0"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_results_of_failed_launches_stay(runner):
    """A refused launch writes nothing."""
    words = like_gpu(np.zeros(32), np.uint32)
    runner.run("st.global.u32 [%at0], 1;", Buffer(words), block=1025)
    assert not words.any()
