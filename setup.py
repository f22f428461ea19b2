"""Runs CMake (CMakeLists.txt is the build); all metadata but the description is in pyproject.toml.

Environment variables for CMake: VISPRUNER_CUDA=AUTO|ON|OFF, VISPRUNER_CUDA_ARCHS,
VISPRUNER_TORCH_DIR, VISPRUNER_PTXAS_REPORT; MAX_JOBS limits the parallel compilations.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TextIO

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OPTIONS = (
    "VISPRUNER_CUDA",
    "VISPRUNER_CUDA_ARCHS",
    "VISPRUNER_TORCH_DIR",
    "VISPRUNER_PTXAS_REPORT",
)
# The compilers that CMake looks for if CXX is not set.
COMPILERS = ("c++", "g++", "clang++", "icpx", "CC")


def readme() -> str:
    """README.md for the package index.

    Its links are relative. They become absolute if `[project.urls]` in pyproject.toml has a
    `Repository`.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    repository = re.search(r'^Repository = "(.+?)/?"$', project, re.MULTILINE)
    if repository is None:
        return text

    def absolute(link: re.Match[str]) -> str:
        view = "raw" if link[1].endswith((".png", ".svg", ".webp")) else "blob"
        return f"]({repository[1]}/{view}/HEAD/{link[1]})"

    return re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", absolute, text)


def check_tools() -> None:
    """Raises SystemExit with a one-line message if a build tool is missing."""
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    if named and not shutil.which(named[0]):
        raise SystemExit(f"vispruner: CXX={os.environ['CXX']}: program {named[0]!r} not found")
    if not named and not any(map(shutil.which, COMPILERS)):
        raise SystemExit(
            "vispruner: no C++ compiler: install one (Debian and Ubuntu: apt install g++; "
            "conda: conda install gxx), or name it in CXX"
        )
    if not shutil.which("cmake"):
        raise SystemExit(
            "vispruner: no cmake: pip install cmake ninja, or omit --no-build-isolation"
        )


def run(*command: str) -> None:
    """Runs a step of the build; raises SystemExit with a likely reason if it fails."""
    status = subprocess.run(command).returncode
    if status == 0:
        return
    message = f"vispruner: {command[0]} failed with exit status {status}, see the output above"
    for place in (ROOT, Path(tempfile.gettempdir())):  # compilers write to the second
        left = shutil.disk_usage(place).free >> 20
        if left < 64:
            message += f"; {place} has {left} MiB left: free some disk space"
    raise SystemExit(message)


@functools.cache
def lock() -> TextIO | None:
    """Waits for another build of this source tree: both would write the same files in build/.

    The lock is held until this process ends, because the wheel is made from these files.
    """
    path = ROOT / "build" / "lock"
    path.parent.mkdir(exist_ok=True)
    try:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"vispruner: waiting for another build in {path.parent}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # another user's file, or a file system without locks
        return None
    return file


class BuildPy(build_py):
    """Starts from an empty build/lib, so that deleted modules are not packaged."""

    def run(self) -> None:
        lock()
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildLibrary(build_ext):
    """Builds libvispruner.so with CMake, for the package and into the source tree.

    The copy in the source tree makes `import vispruner_cuda` work inside a clone, where Python
    finds the source tree before the installed package.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python ABI in the name

    def build_extension(self, ext: Extension) -> None:
        check_tools()
        lock()
        # One directory for all kinds of builds, so that later ones compile little.
        build = ROOT / "build" / f"cmake-{self.plat_name}"
        # pip builds in the source tree: options and compilers of an earlier build must not remain.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for found in build.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(found)
        arguments = [
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython3_EXECUTABLE={sys.executable}",
        ]
        arguments += [f"-D{name}={os.environ[name]}" for name in OPTIONS if os.environ.get(name)]
        ninja = shutil.which("ninja")
        if ninja:  # by path: that of an earlier build may be in a deleted environment
            arguments += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        run("cmake", "-S", str(ROOT), "-B", str(build), *arguments)
        run("cmake", "--build", str(build), "--parallel", jobs)

        packaged = Path(self.get_ext_fullpath(ext.name)).resolve()
        in_source = ROOT / "vispruner_cuda" / "libvispruner.so"
        for target in {packaged, in_source}:
            target.parent.mkdir(parents=True, exist_ok=True)
            # Always a new file: a running process may have the old one mapped.
            target.unlink(missing_ok=True)
            shutil.copy2(build / "libvispruner.so", target)
            # pip shows the summary only with -v; `python -m vispruner_cuda` reads it from here.
            shutil.copyfile(build / "summary.txt", target.with_suffix(".txt"))
        print(f"\n{(build / 'summary.txt').read_text()}", flush=True)


class PythonFreeWheel(bdist_wheel):
    """The library has no Python symbols, so one wheel per platform works with every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension("vispruner_cuda.libvispruner", sources=[])],
    cmdclass={"build_py": BuildPy, "build_ext": BuildLibrary, "bdist_wheel": PythonFreeWheel},
)
