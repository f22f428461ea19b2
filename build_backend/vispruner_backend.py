"""The PEP 517/660 backend: setuptools, building against the installed torch.

pip builds in an isolated environment, and a build requirement on torch would download a second
torch (gigabytes) to build against. But pip runs the isolated build with the target environment's
interpreter and hides its packages only by PYTHONPATH, so a child interpreter without that variable
can see them. This backend asks a child for the location of torch and passes the directory to CMake.
torch is never imported, and is a build requirement only if it is not installed.

Likewise, setuptools, CMake and ninja are required only if no recent enough version is available.
With them installed, `pip install .` needs no network.

The CUDA kernels need nvcc. If torch has CUDA and there is no nvcc of its major version, the
compiler is also a build requirement, from the package index and of torch's CUDA version.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TORCH = (2, 10)  # the first with the stable ABI functions that csrc/ops.cpp uses
SETUPTOOLS = (77, 0)  # the first that supports the license expression in pyproject.toml
CMAKE = (3, 22)

TORCH_DIR = "VISPRUNER_TORCH_DIR"
CUDA = "VISPRUNER_CUDA"  # AUTO, ON, OFF: as in CMakeLists.txt
NVCC = "VISPRUNER_NVCC"  # auto, system, index

# The compiler in the package index, all of one minor version.
_INDEX_COMPILER = (
    "nvidia-cuda-nvcc",
    "nvidia-nvvm",
    "nvidia-cuda-crt",
    "nvidia-cuda-runtime",
)
_LAST_CCCL = (13, 3)  # from here on nvidia-cuda-cccl has separate version numbers
_INDEX_CUDA = 13  # the first major version whose packages contain nvcc; those of 12 have only ptxas

# Set by pip (PYTHONPATH) and `build` (PYTHONNOUSERSITE) to hide an environment from the build.
_HIDING = ("PYTHONPATH", "PYTHONNOUSERSITE")

_ROOT = Path(__file__).resolve().parents[1]

_PROBE = """
import importlib.metadata, importlib.util, json
found = {}
for name in ("torch", "setuptools"):
    spec = importlib.util.find_spec(name)
    if spec and spec.submodule_search_locations:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = [version, spec.submodule_search_locations[0]]
print(json.dumps(found))
"""


def _version(text: str) -> tuple[int, int]:
    """The first two numbers of a version, (0, 0) if there are none."""
    match = re.search(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _packages(target: bool) -> dict[str, tuple[str, str]]:
    """Version and directory of torch and setuptools, in the target environment or in this one."""
    hidden = _HIDING if target else ()
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    # Not in the source tree, whose directories `python -c` would find first.
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], env=environment, cwd=os.sep, capture_output=True, text=True
    )
    if done.returncode != 0:
        return {}
    return {name: (found[0], found[1]) for name, found in json.loads(done.stdout).items()}


def torch_dir() -> str | None:
    """The torch to build against: VISPRUNER_TORCH_DIR, this environment's, or the target's.

    None if there is no torch.
    """
    named = os.environ.get(TORCH_DIR)
    if named:
        if not Path(named, "include", "torch", "headeronly", "version.h").is_file():
            raise SystemExit(f"{TORCH_DIR}={named}: no torch >= {TORCH[0]}.{TORCH[1]} there")
        return named
    old = ""
    for target in (False, True):
        version, directory = _packages(target).get("torch", ("", ""))
        if _version(version) >= TORCH:
            return directory
        old = version or old
    if old:  # an error, instead of downloading a second torch
        raise SystemExit(
            f"vispruner: torch {old} is installed, and at least {TORCH[0]}.{TORCH[1]} is needed: "
            f"pip install -U 'torch>={TORCH[0]}.{TORCH[1]}'"
        )
    return None


def _target_setuptools() -> str | None:
    """The import directory of the target environment's setuptools, if it is new enough."""
    version, directory = _packages(target=True).get("setuptools", ("", ""))
    return str(Path(directory).parent) if _version(version) >= SETUPTOOLS else None


def _tool_works(name: str, oldest: tuple[int, int] = (0, 0)) -> bool:
    """Whether a command works here (one installed in a hidden environment may not)."""
    try:
        done = subprocess.run([name, "--version"], capture_output=True, text=True)
    except OSError:
        return False
    return done.returncode == 0 and _version(done.stdout) >= oldest


# pip and uv print a SystemExit as one line, and other exceptions with a traceback.
def _chosen(name: str, values: tuple[str, ...]) -> str:
    """The value of an environment variable; the first of `values` if it is not set."""
    value = os.environ.get(name) or values[0]
    if value not in values:
        raise SystemExit(f"{name}={value}: must be one of {', '.join(values)}")
    return value


def _check_environment() -> None:
    """Refuses variables that would be ignored, or end in another program's error."""
    path = _ROOT / "vispruner_cuda" / "_environment.py"
    names: Any = {}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    if wrong := names["misspelt"](os.environ, names["BUILD"]):
        raise SystemExit(f"vispruner: {wrong}")
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not re.fullmatch("0*[1-9][0-9]*", jobs):
        raise SystemExit(f"vispruner: MAX_JOBS={jobs}: must be a whole number from 1, or unset")


def torch_cuda(directory: str) -> str | None:
    """The CUDA version of a torch, None for a CPU build."""
    try:
        text = Path(directory, "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def _system_nvcc() -> str | None:
    """The nvcc that CMake would find (CMakeLists.txt, vp_setup_cuda)."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home, "bin")) for home in homes] + [os.environ.get("PATH", "")]
    if not os.environ.get("CUDA_HOME"):
        places.append("/usr/local/cuda/bin")
    return shutil.which("nvcc", path=os.pathsep.join(places))


def _nvcc_version(nvcc: str) -> tuple[int, int]:
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    except OSError:
        return (0, 0)
    match = re.search(r"release (\d+\.\d+)", done.stdout)
    return _version(match[1]) if match else (0, 0)


def index_compiler() -> str | None:
    """The CUDA version, such as "13.0", of the compiler to take from the package index.

    None if there is nothing to compile, or if the system's nvcc is used.
    """
    wanted = _chosen(NVCC, ("auto", "system", "index"))
    kernels = _chosen(CUDA, ("AUTO", "ON", "OFF"))
    if kernels == "OFF":
        if wanted == "index":
            raise SystemExit(f"{NVCC}=index, but {CUDA}=OFF: unset one of them")
        return None
    own = os.environ.get("CUDACXX")
    if wanted == "index" and own:
        raise SystemExit(f"{NVCC}=index, but CUDACXX={own}: unset one of them")
    if wanted == "system" or own:
        return None
    directory = torch_dir()
    cuda = torch_cuda(directory) if directory else None
    if cuda is None:
        if wanted == "index":
            raise SystemExit(
                f"{NVCC}=index, but this torch has no CUDA version for the compiler to match: "
                f"install a torch with CUDA, or unset {NVCC}"
            )
        return None  # the system's nvcc is used anyway
    version = _version(cuda)
    if wanted == "auto":
        nvcc = _system_nvcc()
        if nvcc and _nvcc_version(nvcc)[0] == version[0]:
            return None
    if version[0] < _INDEX_CUDA:
        if wanted == "index":
            raise SystemExit(
                f"{NVCC}=index, but the index's packages for CUDA {cuda} contain no nvcc: install "
                f"the CUDA toolkit {version[0]}, or a torch for CUDA {_INDEX_CUDA} or later"
            )
        return None  # CMake warns
    return f"{version[0]}.{version[1]}"


def _index_nvcc(version: str) -> str | None:
    """nvcc of this version from the packages of the index, if installed."""
    for place in sys.path:
        for nvcc in sorted(Path(place or os.curdir, "nvidia").glob("cu*/bin/nvcc")):
            if _nvcc_version(str(nvcc)) == _version(version):
                return str(nvcc)
    return None


def _index_packages(version: str) -> list[str]:
    """Requirements for the compiler of this CUDA version."""
    packages = [f"{name}=={version}.*" for name in _INDEX_COMPILER]
    newest = _version(version) >= _LAST_CCCL
    cccl = f">={_LAST_CCCL[0]}.{_LAST_CCCL[1]},<{_LAST_CCCL[0] + 1}" if newest else f"=={version}.*"
    return [*packages, f"nvidia-cuda-cccl{cccl}"]


def _compiler_requirements() -> list[str]:
    version = index_compiler()
    return _index_packages(version) if version else []


def _setuptools_requirement() -> list[str]:
    return [] if _target_setuptools() else [f"setuptools>={SETUPTOOLS[0]}.{SETUPTOOLS[1]}"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    _check_environment()
    requirements = _setuptools_requirement()
    if not _tool_works("cmake", CMAKE):
        requirements.append(f"cmake>={CMAKE[0]}.{CMAKE[1]}")
    if not _tool_works("ninja"):
        requirements.append("ninja")
    if torch_dir() is None:
        requirements.append(f"torch>={TORCH[0]}.{TORCH[1]}")
    return requirements + _compiler_requirements()


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return _setuptools_requirement()


def _setuptools() -> Any:
    """setuptools.build_meta, from the target environment if this one has no setuptools."""
    # The build writes into all of them. build/ may be left from another user.
    for place in (_ROOT, _ROOT / "vispruner_cuda", _ROOT / "build"):
        if place.exists() and not os.access(place, os.W_OK):
            raise SystemExit(
                f"vispruner: cannot write to the source tree {place}, where the build takes "
                "place: install from a copy"
            )
    try:
        import setuptools
    except ImportError:
        directory = _target_setuptools()
        if directory is None:
            raise SystemExit(
                "vispruner: this environment has no setuptools: pip install "
                f"'setuptools>={SETUPTOOLS[0]}', or omit --no-build-isolation"
            ) from None
        sys.path.append(directory)  # last: packages of the build environment have priority
        import setuptools
    if _version(setuptools.__version__) < SETUPTOOLS:
        raise SystemExit(
            f"vispruner: setuptools {setuptools.__version__} is too old: pip install "
            f"'setuptools>={SETUPTOOLS[0]}', or omit --no-build-isolation"
        )
    from setuptools import build_meta

    return build_meta


def _builder() -> Any:
    _check_environment()
    directory = torch_dir()
    if directory is None:
        raise SystemExit(
            "vispruner: no torch to build against. Install torch first, or set "
            f"{TORCH_DIR} to the directory of its package."
        )
    os.environ[TORCH_DIR] = directory  # setup.py passes it to CMake
    version = index_compiler()
    if version:
        nvcc = _index_nvcc(version)
        if nvcc is not None:
            os.environ["CUDACXX"] = nvcc
            # nvcc searches lib64, but the packages have the libraries in lib.
            libraries = [str(Path(nvcc).parents[1] / "lib"), os.environ.get("LIBRARY_PATH", "")]
            os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
        elif _chosen(NVCC, ("auto", "system", "index")) == "index":
            raise SystemExit(
                f"vispruner: {NVCC}=index, but this environment has no nvcc {version} from the "
                f"package index. Install it: pip install {shlex.join(_index_packages(version))}"
            )
    return _setuptools()


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    return _builder().build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    return _builder().build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    return _setuptools().build_sdist(sdist_directory, config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    return _setuptools().prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Any = None
) -> str:
    return _setuptools().prepare_metadata_for_build_editable(metadata_directory, config_settings)
