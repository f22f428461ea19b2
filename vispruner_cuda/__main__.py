"""`python -m vispruner_cuda`: prints what is installed and whether it works on this machine.

With `--verify` it compares every operator with the reference on every device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import vispruner_cuda

from . import _library
from ._version import __version__

DEFAULT_OUTPUT = "vispruner_verify.json"  # of --verify


def coverage(archs: str, major: int, minor: int) -> str:
    """How a list such as "80+PTX 86 90a" covers a GPU: by machine "code", by "PTX", or "none"."""
    found = "none"
    for arch in archs.split():
        match = re.fullmatch(r"(\d+)(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            continue
        built = (int(match[1]), int(match[2]))
        # Machine code runs on its version and on later minor ones; code for an "a" architecture on
        # that only.
        same_family = built[0] == major and built[1] <= minor
        if built == (major, minor) or (same_family and match[3] != "a"):
            return "code"
        if match[4] and not match[3] and built <= (major, minor):
            found = "PTX"  # compiled by the driver at the first use
    return found


def compiler_warning(compiler: str, torch_cuda: str | None) -> str | None:
    """A warning if the kernels were compiled with a newer CUDA than torch's; otherwise None."""
    if not compiler or not torch_cuda:
        return None
    major, torch_major = (int(version.split(".")[0]) for version in (compiler, torch_cuda))
    if major <= torch_major:
        return None
    return (
        f"the kernels were compiled with CUDA {compiler} and torch with CUDA {torch_cuda}: they "
        f"need a driver for CUDA {major}; otherwise reinstall with the nvcc of torch's CUDA"
    )


def probe(device: torch.device) -> str | None:
    """Prune on the device and on the CPU and compare. Returns an error message or None."""
    feats = torch.arange(64 * 16).mul(37).remainder(101).sub(50).to(torch.float16).view(1, 64, 16)
    scores = torch.arange(64).mul(29).remainder(64).to(torch.float16).view(1, 64)
    want = vispruner_cuda.prune(feats, scores, 16)
    try:
        got = vispruner_cuda.prune(feats.to(device), scores.to(device), 16)
        same = all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))
    except Exception as error:
        return " ".join(str(error).split())
    return None if same else "not the result of the CPU"


def report() -> dict[str, Any]:
    """Everything the command prints, as plain data; "problems" is empty if there are none."""
    info = _library.load()
    devices: list[dict[str, Any]] = []
    problems: list[str] = []
    for index in range(torch.cuda.device_count() if torch.version.cuda else 0):
        major, minor = torch.cuda.get_device_capability(index)
        device: dict[str, Any] = {
            "index": index,
            "name": torch.cuda.get_device_name(index),
            "capability": f"{major}.{minor}",
            "covered_by": coverage(info.cuda_archs, major, minor),
            "works": False,
        }
        if info.cuda_runtime_state != _library.READY:
            problem = "the library was built without CUDA kernels"
        elif device["covered_by"] == "none":
            problem = f"no kernels for compute capability {major}.{minor}"
        else:
            problem = probe(torch.device("cuda", index)) or ""
        device["works"] = not problem
        if problem:
            problems.append(f"cuda:{index} ({device['name']}): {problem}")
        devices.append(device)
    return {
        "version": __version__,
        "library": str(_library.PATH),
        "build": dataclasses.asdict(info),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "backends": ["reference", "cpu", *(["cuda"] if any(d["works"] for d in devices) else [])],
        "devices": devices,
        "warning": compiler_warning(info.cuda_version, torch.version.cuda),
        "problems": problems,
    }


def _why_no_kernels(library: Path) -> str:
    """The line on CUDA kernels in the build's summary, which is next to the library."""
    try:
        summary = library.with_suffix(".txt").read_text(encoding="utf-8")
    except OSError:  # a library that was copied here
        summary = ""
    found = re.search("CUDA kernels: (.*)", summary)
    return found[1] if found else "none (built without nvcc)"


def _text(data: dict[str, Any]) -> str:
    build = data["build"]
    cuda = _why_no_kernels(Path(data["library"]))
    if build["cuda"]:
        cuda = f"{build['cuda_archs']} (CUDA {build['cuda_version']})"
        if build["cuda_runtime_state"] != _library.READY:
            cuda += ", idle: this torch has no CUDA"
        if data["warning"]:
            cuda += f"; {data['warning']}"
    rows = [
        ("vispruner_cuda", data["version"]),
        ("library", data["library"]),
        (
            "torch",
            f"{data['torch']} ({'CUDA ' + data['torch_cuda'] if data['torch_cuda'] else 'CPU'})",
        ),
        ("backends", ", ".join(data["backends"])),
        ("CPU kernels", f"{build['cpu_isa']} (built: {', '.join(build['cpu_isas'])})"),
        ("CUDA kernels", cuda),
    ]
    for device in data["devices"]:
        how = {"code": "machine code", "PTX": "PTX, compiled at first use", "none": "no kernels"}
        rows.append(
            (
                f"cuda:{device['index']}",
                f"{device['name']}, compute capability {device['capability']}: "
                f"{how[device['covered_by']]}, {'works' if device['works'] else 'UNUSABLE'}",
            )
        )
    if not data["devices"]:
        rows.append(("devices", "CPU only"))
    return "\n".join(f"{name:<15}{value}" for name, value in rows)


def _chosen_devices(wanted: Sequence[str] | None, available: Sequence[str]) -> list[str]:
    """The devices to verify; ValueError for one that does not exist."""
    if wanted is None:
        return list(available)
    chosen: list[str] = []
    for name in wanted:
        found = [a for a in available if a == name or a.partition(":")[0] == name]
        if not found:
            raise ValueError(f"no device {name!r} to verify here, only {', '.join(available)}")
        chosen += [device for device in found if device not in chosen]
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status. Wrong options exit with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m vispruner_cuda",
        description="Print what is installed and whether it works on the devices of this machine.",
        epilog="The exit status is 1 if there is a GPU that the kernels cannot use, or if a result "
        "of --verify differs from the reference.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    verifying = parser.add_argument_group("verification")
    verifying.add_argument(
        "--verify",
        action="store_true",
        help="compare every operator, dtype and launch plan with the reference on each device, "
        "which takes about a minute, and write a file to attach to a report",
    )
    verifying.add_argument(
        "--device",
        nargs="+",
        metavar="DEVICE",
        help="verify only these: cpu, cuda (each GPU) or cuda:N",
    )
    verifying.add_argument("--quick", action="store_true", help="run a small subset of the cases")
    verifying.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help=f"default: {DEFAULT_OUTPUT}"
    )
    options = parser.parse_args(arguments)
    if not options.verify:
        for option in ("device", "quick", "output"):
            if getattr(options, option):
                parser.error(f"--{option} is an option of --verify")
        data = report()
        print(json.dumps(data, indent=2) if options.json else _text(data))
        for problem in data["problems"]:
            print(f"vispruner_cuda: {problem}", file=sys.stderr)
        return 1 if data["problems"] else 0

    from .verification import command, machine

    output = options.output or Path(DEFAULT_OUTPUT)
    if reason := command.unwritable(output):
        parser.error(f"cannot write {output}: {reason}")
    data = report()
    try:
        devices = _chosen_devices(options.device, machine.device_names(data))
    except ValueError as error:
        parser.error(f"--device: {error}")
    for problem in data["problems"]:
        print(f"vispruner_cuda: {problem}", file=sys.stderr)
    status = command.run(data, devices, options.quick, output, options.json)
    return 1 if data["problems"] and options.device is None else status


if __name__ == "__main__":
    try:
        status = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # nobody reads the output any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        status = 128 + signal.SIGPIPE
    except OSError as error:
        sys.exit(f"vispruner_cuda: {error}")
    sys.exit(status)
