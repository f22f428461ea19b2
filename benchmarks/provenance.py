"""Provenance of a results file: device, versions and sources."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import vispruner_cuda
from vispruner_cuda import _library

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def tree_hash(directory: Path) -> str | None:
    """The git tree hash of a directory, as from `git rev-parse HEAD:csrc` once committed."""
    listed = _git("ls-files", "-co", "--exclude-standard", "--", str(directory))
    if listed:
        return _tree(directory, {ROOT / line for line in listed.splitlines()})
    files = {f for f in directory.rglob("*") if f.is_file()}  # without git
    return _tree(directory, files) if files else None


def _tree(directory: Path, files: set[Path]) -> str:
    entries = []
    for child in sorted({directory / f.relative_to(directory).parts[0] for f in files}):
        if child.is_dir():
            inside = {f for f in files if child in f.parents}
            mode, digest, sort_name = b"40000", _tree(child, inside), child.name + "/"
        elif child.exists():
            data = child.read_bytes()
            digest = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            mode = b"100755" if os.access(child, os.X_OK) else b"100644"
            sort_name = child.name
        else:
            continue
        entries.append((sort_name.encode(), mode, child.name.encode(), bytes.fromhex(digest)))
    body = b"".join(mode + b" " + name + b"\0" + raw for _, mode, name, raw in sorted(entries))
    return hashlib.sha1(b"tree %d\0" % len(body) + body).hexdigest()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        driver = "unknown"
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def describe() -> dict[str, Any]:
    """Device, versions and sources, as plain data.

    Raises:
        RuntimeError: the library was built from other sources than those of this tree.
    """
    info = _library.load()
    if old := _library.stale(info, ROOT):
        raise RuntimeError(old)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "instruction_set": info.cpu_isa,
            "gpu": _gpu(),
        },
        "versions": {
            "vispruner_cuda": vispruner_cuda.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": _git("rev-parse", "--verify", "--quiet", "HEAD"),
        "csrc_tree": tree_hash(ROOT / "csrc"),
    }


def write(name: str, data: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Writes NAME.json, with the provenance first."""
    path = directory / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".json.new")
    written.write_text(json.dumps({**describe(), **data}, indent=1) + "\n")
    os.replace(written, path)  # so that an interrupted run leaves no partial file
    return path
