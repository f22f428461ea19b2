"""The machine code in the library: `python -m support.machine_code` from within tests/ prints each
kernel's registers and shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from vispruner_cuda import _library


class Kernel(NamedTuple):
    arch: str
    name: str  # as in C++, without its namespaces and parameters
    registers: int
    shared: int  # bytes, the static ones
    local: int  # bytes per thread: spilled registers and arrays that could not stay in registers


def run(name: str, *arguments: object) -> str:
    """Runs a program and returns its output; CUDA's may come from the toolkit or from PyPI.

    Raises FileNotFoundError if there is no such program.
    """
    program = shutil.which(name)
    if program is None:
        try:
            import nvidia
        except ImportError:
            nvidia = None
        packages = nvidia.__path__ if nvidia else []
        found = [path for root in packages for path in Path(root).glob(f"*/bin/{name}")]
        if not found:
            raise FileNotFoundError(f"{name} is not installed (pip install '.[test]')")
        program = str(found[0])
    # PyPI's cuobjdump looks for nvdisasm on the PATH; they lie side by side.
    path = os.pathsep.join([str(Path(program).parent), os.environ["PATH"]])
    done = subprocess.run(
        [program, *map(str, arguments)],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
    )
    return done.stdout + done.stderr


def _short(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|vispruner::(cuda::)?", "", name)
    return re.sub(r"^void |\(.*", "", name).replace("> >", ">>")


def kernels(library: Path) -> list[Kernel]:
    """Every kernel of every architecture, in the library's order."""
    found = []
    arch = name = ""
    for line in run("cuobjdump", "-res-usage", library).splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            local = usage["STACK"] + usage["LOCAL"]
            found.append(Kernel(arch, name, usage["REG"], usage["SHARED"], local))
    if not found:
        return []
    plain = run("c++filt", *(kernel.name for kernel in found)).splitlines()
    return [kernel._replace(name=_short(p)) for kernel, p in zip(found, plain, strict=True)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m support.machine_code", description="Registers and shared memory of kernels."
    )
    parser.add_argument("library", type=Path, nargs="?", default=_library.PATH)
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")
    o = parser.parse_args(argv)
    try:
        found = kernels(o.library)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    if not found:
        print(f"{parser.prog}: {o.library} has no CUDA code", file=sys.stderr)
        return 1
    if o.json:
        print(json.dumps([kernel._asdict() for kernel in found], indent=1))
        return 0
    archs = list(dict.fromkeys(kernel.arch for kernel in found))
    by_name: dict[str, dict[str, Kernel]] = {}
    for kernel in found:
        by_name.setdefault(kernel.name, {})[kernel.arch] = kernel
    print(" ".join(f"{arch:>9}" for arch in archs) + "  registers/shared bytes of")
    for name, of in sorted(by_name.items()):
        cells = (f"{of[a].registers}/{of[a].shared}" if a in of else "-" for a in archs)
        print(" ".join(f"{cell:>9}" for cell in cells) + f"  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
