"""Builds the PTX executor, and modules of the project's kernels that run on it.

    python build.py --csrc ../../csrc --targets 80 90 --out ../../build/ptx

Objects are named by the content of their sources. A copy of csrc with one changed file compiles
only that file, if it is built into the same directory, and the module of each copy has a separate
path.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "src"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
JOBS = 2

#: Sources that need more than a C++ compiler: CUDA's headers, or the project's.
OPERATORS = SOURCES / "operators.cpp"
RUNTIME = SOURCES / "cuda_runtime.cpp"
EXECUTOR_MODULE = SOURCES / "executor_module.cpp"
#: The source in csrc itself that is not linked.
TORCH_BINDING = "ops.cpp"

# No symbol of a module is visible to another one, and none is unique in the process: modules of the
# same name can be loaded in one process.
_HIDDEN = ["-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]
# -ffp-contract=off and --fmad=false as in CMakeLists.txt: no operation may be fused.
CXX_FLAGS = [
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-Wall",
    "-Wextra", *_HIDDEN,
]  # fmt: skip
NVCC_FLAGS = [
    "-std=c++17", "-O3", "-DNDEBUG", "--fmad=false", "-lineinfo", "--no-compress",
    "-Xcompiler=" + ",".join([*_HIDDEN, "-ffp-contract=off"]),
]  # fmt: skip
LINK_FLAGS = ["-shared", "-Wl,-Bsymbolic"]

#: Maximum number of kernel objects in a build directory: the oldest are removed.
MOST_OBJECTS = 400


#: The usual directory of toolkits.
USUAL_HOME = Path("/usr/local/cuda")


class BuildError(RuntimeError):
    """A compiler failed or is missing."""


# ---- the CUDA compiler


@dataclass(frozen=True)
class Nvcc:
    path: Path
    include: Path

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.path.parent}{os.pathsep}{os.environ['PATH']}"}


def _python_nvccs() -> list[Path]:
    """The compilers of PyPI's packages, which install into nvidia/cu13."""
    try:
        import nvidia
    except ImportError:
        return []
    found = [path for root in nvidia.__path__ for path in Path(root).glob("cu*/bin/nvcc")]
    return sorted(found, reverse=True)


def _nvcc_candidates() -> Iterator[Path]:
    if compiler := os.environ.get("CUDACXX"):
        yield Path(compiler)
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home) / "bin" / "nvcc"
    yield USUAL_HOME / "bin" / "nvcc"
    yield from _python_nvccs()


@functools.cache
def find_nvcc() -> Nvcc:
    """The compiler from CUDACXX, PATH, CUDA_HOME or the Python environment."""
    for path in _nvcc_candidates():
        if not os.access(path, os.X_OK):
            continue
        # It may be a script that calls the real one: --dryrun prints the path of the headers.
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory) / "x.cu"
            source.touch()
            command = [str(path), "--dryrun", "-c", str(source), "-o", f"{directory}/x.o"]
            done = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r'INCLUDES="-I([^"]*)"', done.stderr)
        include = Path(found[1]) if found else path.resolve().parents[1] / "include"
        if (include / "cuda_runtime_api.h").exists():
            return Nvcc(path, include.resolve())
        raise BuildError(
            f"{path} has no headers of the CUDA runtime (looked in {include}); with PyPI's "
            "packages install nvidia-cuda-runtime of the same version"
        )
    raise BuildError(
        "no nvcc: set CUDACXX or CUDA_HOME, or put it on the PATH, or install it with\n"
        "    pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' "
        "'nvidia-cuda-crt==13.0.*' \\\n"
        "        'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*'"
    )


# ---- compiling


def _run(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> None:
    arguments = [str(c) for c in command]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise BuildError(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr)


def _headers(source: Path, directories: Sequence[Path]) -> set[Path]:
    """The headers in these directories that a source includes, directly or not."""
    found: set[Path] = set()
    todo = [source]
    while todo:
        text = todo.pop().read_text()
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
            for directory in directories:
                header = directory / name
                if header.exists() and header not in found:
                    found.add(header)
                    todo.append(header)
    return found


def _key(source: Path, directories: Sequence[Path], *more: object) -> str:
    digest = hashlib.sha256(repr(more).encode())
    for path in [source, *sorted(_headers(source, directories), key=lambda p: p.name)]:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Task:
    """One object to be compiled, unless it exists."""

    target: Path
    command: list[str | Path]
    environment: dict[str, str] | None = None

    def run(self) -> float:
        if self.target.exists():
            os.utime(self.target)  # mark as used, so that it is not removed as an old one
            return 0.0
        begin = time.perf_counter()
        partial = self.target.with_suffix(".partial.o")
        _run([*self.command, "-o", partial], self.environment)
        partial.replace(self.target)
        return time.perf_counter() - begin


def _cxx_task(
    source: Path, out: Path, includes: Sequence[Path], depends: Sequence[Path] = ()
) -> _Task:
    include_flags = [f"-I{i}" for i in includes]
    # Only the content of `depends` matters, which is part of _key().
    others = [str(i) for i in includes if i not in depends]
    key = _key(source, [SOURCES, *depends], CXX_FLAGS, others, sys.version)
    return _Task(out / f"{source.stem}-{key}.o", ["g++", *CXX_FLAGS, *include_flags, "-c", source])


def _kernel_task(source: Path, csrc: Path, out: Path, targets: Sequence[int]) -> _Task:
    nvcc = find_nvcc()
    directories = [csrc / "include", csrc / "cuda"]
    codes = [f"-gencode=arch=compute_{t},code=compute_{t}" for t in targets]
    includes = [f"-I{d}" for d in directories]
    return _Task(
        out / f"{source.stem}-{_key(source, directories, NVCC_FLAGS, codes, str(nvcc.path))}.o",
        [nvcc.path, "-c", *codes, *NVCC_FLAGS, *includes, source],
        nvcc.environment,
    )


def _compile(tasks: Sequence[_Task], jobs: int) -> list[Path]:
    with ThreadPoolExecutor(jobs) as pool:
        seconds = list(pool.map(_Task.run, tasks))
    for task, taken in zip(tasks, seconds, strict=True):
        if taken and os.environ.get("VISPRUNER_PTX_TIMES"):
            print(f"{task.target.name}: {taken:.1f} s", file=sys.stderr)
    return [task.target for task in tasks]


def _python_includes() -> list[Path]:
    import pybind11

    return [Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One build of a directory at a time: test processes may start together."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_old(directory: Path) -> None:
    by_age = sorted(directory.glob("*.o"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in by_age[MOST_OBJECTS:]:
        path.unlink(missing_ok=True)


# ---- targets


def executor(out: Path, jobs: int = JOBS) -> list[Path]:
    """The objects of the executor, the same for every module."""
    special = {path.name for path in (OPERATORS, RUNTIME, EXECUTOR_MODULE)}
    sources = sorted(path for path in SOURCES.glob("*.cpp") if path.name not in special)
    (out / "executor").mkdir(parents=True, exist_ok=True)
    includes = _python_includes()
    return _compile([_cxx_task(s, out / "executor", includes) for s in sources], jobs)


def kernels(
    csrc: Path,
    out: Path,
    targets: Sequence[int] = (80, 90),
    jobs: int = JOBS,
    names: Collection[str] | None = None,
) -> dict[str, Path]:
    """The objects of the kernels of a csrc with their host code, by the name of their source.

    Args:
        names: of the sources, without .cu; default all.
    """
    sources = sorted((csrc / "cuda").rglob("*.cu"))
    if not sources:
        raise BuildError(f"no kernels in {csrc}/cuda")
    wanted = {s.stem: s for s in sources if names is None or s.stem in names}
    if unknown := set(names or ()) - set(wanted):
        raise BuildError(f"no {', '.join(sorted(unknown))} in {csrc}/cuda")
    directory = out / "objects"
    directory.mkdir(parents=True, exist_ok=True)
    tasks = [_kernel_task(source, csrc, directory, targets) for source in wanted.values()]
    return dict(zip(wanted, _compile(tasks, jobs), strict=True))


def host_objects(csrc: Path, out: Path, jobs: int = JOBS) -> list[Path]:
    """The objects of the rest of a csrc, and the binding of the operators."""
    directory = out / "objects"
    directory.mkdir(parents=True, exist_ok=True)
    includes = [csrc / "include", *_python_includes()]
    tasks = [_cxx_task(OPERATORS, directory, includes, depends=[csrc / "include"])]
    for source in sorted(csrc.glob("*.cpp")):
        if source.name != TORCH_BINDING:
            includes_of_csrc = [csrc / "include"]
            tasks.append(_cxx_task(source, directory, includes_of_csrc, depends=includes_of_csrc))
    tasks.append(_cxx_task(RUNTIME, directory, [find_nvcc().include]))
    return _compile(tasks, jobs)


def link(compiled: Iterable[Path], directory: Path, name: str = "vispruner_ptx") -> Path:
    """Links a module of these objects in a separate directory; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    module = directory / f"{name}{SUFFIX}"
    inputs = sorted(str(o.resolve()) for o in compiled)
    record = directory / f"{name}.objects"
    if module.exists() and record.exists() and record.read_text().splitlines() == inputs:
        return module
    # A new file, because a running process may use the old one.
    partial = directory / f"{name}.partial.so"
    _run(["g++", *LINK_FLAGS, "-o", partial, *inputs])
    partial.replace(module)
    record.write_text("\n".join(inputs))
    return module


def build_executor(out: Path, jobs: int = JOBS) -> Path:
    """The module ptx_executor, for which no CUDA is needed."""
    out = Path(out).resolve()
    with _locked(out):
        compiled = executor(out, jobs)
        main = _compile([_cxx_task(EXECUTOR_MODULE, out / "executor", _python_includes())], 1)
        return link([*main, *compiled], out, "ptx_executor")


def build(
    csrc: Path,
    out: Path,
    targets: Sequence[int] = (80, 90),
    jobs: int = JOBS,
    directory: Path | None = None,
) -> Path:
    """The module vispruner_ptx of a csrc, in `directory` (default: `out`). Objects are in `out`."""
    csrc, out = Path(csrc).resolve(), Path(out).resolve()
    with _locked(out):
        compiled = [
            *kernels(csrc, out, targets, jobs).values(),
            *host_objects(csrc, out, jobs),
            *executor(out, jobs),
        ]
        _remove_old(out / "objects")
        return link(compiled, Path(directory).resolve() if directory else out)


def load(path: Path) -> ModuleType:
    """Imports a module. Two of the same name can be loaded, because each gets a package."""
    name = f"ptx_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}.{path.name.split('.')[0]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    root = HERE.parents[1]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csrc", type=Path, default=root / "csrc", help="directory of the kernels")
    parser.add_argument("--out", type=Path, default=root / "build/ptx", help="build directory")
    parser.add_argument(
        "--targets", type=int, nargs="+", default=[80, 90], metavar="XX", help="compute_XX of PTX"
    )
    parser.add_argument("--nvcc", help="the CUDA compiler (default: searched for)")
    parser.add_argument("--jobs", type=int, default=JOBS, help="number of parallel compilers")
    parser.add_argument("--times", action="store_true", help="print the compile time of each file")
    arguments = parser.parse_args()
    if arguments.nvcc:
        os.environ["CUDACXX"] = arguments.nvcc
    if arguments.times:
        os.environ["VISPRUNER_PTX_TIMES"] = "1"
    try:
        print(build(arguments.csrc, arguments.out, arguments.targets, arguments.jobs))
    except BuildError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
