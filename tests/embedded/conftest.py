"""The embedded model needs transformers, Pillow and NumPy; the experiment is in benchmarks/."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.one_thread import one_thread as one_thread

NEEDED = ("PIL", "numpy", "rich", "transformers")
if not all(importlib.util.find_spec(name) for name in NEEDED):
    collect_ignore_glob = ["test_*.py"]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))


@pytest.fixture(scope="package")
def model() -> Any:
    """The embedded model, loaded as by users with a CPU."""
    from transformers import AutoModelForImageTextToText

    from vispruner import embedded

    return AutoModelForImageTextToText.from_pretrained(embedded.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="package")
def processor() -> Any:
    from transformers import AutoProcessor

    from vispruner import embedded

    return AutoProcessor.from_pretrained(embedded.path())
