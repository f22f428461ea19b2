"""Engines, checkpoints and the expected answers from transformers.

An engine takes ten seconds to start, so tests with equal options share one.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engine_process import SITE, Engine
from support.one_thread import one_thread as one_thread

if importlib.util.find_spec("vllm") is not None:
    sys.path.append(str(SITE))
    import engine_shims

    engine_shims.install()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's checkpoint, created on first use."""
    from support.engine_models import BUILDERS

    root = tmp_path_factory.mktemp("checkpoints")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            path.mkdir()
            BUILDERS[family](path)
        return path

    return folder


@pytest.fixture(scope="module")
def engine(checkpoint: Callable[[str], Path]) -> Iterator[Callable[..., Engine]]:
    """Engines by family and options: one at a time, since each needs a core and a gigabyte."""
    running: dict[str, Engine] = {}

    def start(family: str, pruning: dict[str, Any] | None = None, **options: Any) -> Engine:
        key = repr((family, pruning, options))
        if key not in running:
            for other in list(running):
                running.pop(other).close()
            running[key] = Engine(checkpoint(family), pruning, **options)
        return running[key]

    yield start
    for last in running.values():
        last.close()


@pytest.fixture(scope="session")
def transformers_of(checkpoint: Callable[[str], Path]) -> Callable[..., Any]:
    """The answers of a family in transformers."""
    from support.engine_requests import Transformers

    @functools.cache
    def of(family: str, *, adapted: bool = False) -> Transformers:
        return Transformers(family, checkpoint(family), adapted=adapted)

    return of
