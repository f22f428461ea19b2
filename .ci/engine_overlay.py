"""Combines Python files of a newer vLLM with the compiled parts of the installed CPU build.

For a release without a CPU build: writes a package `vllm` into DIRECTORY, with the Python files of
WHEEL, which is for GPUs, and the libraries of this interpreter's vLLM. Put it first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import zipfile
from pathlib import Path


def overlay(wheel: Path, directory: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("vllm/") and not name.endswith(".so"):
                archive.extract(name, directory)
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    for library in Path(spec.origin).parent.glob("*.so"):
        shutil.copy(library, directory / "vllm" / library.name)
    # vLLM detects a CPU build by its version.
    version = re.match(r"vllm-([\d.]+)-", wheel.name)
    assert version is not None
    metadata = directory / f"vllm-{version[1]}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version[1]}+cpu\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    overlay(options.wheel, options.directory)


if __name__ == "__main__":
    main()
