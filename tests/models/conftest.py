"""Tests of whole models need transformers; without it they are skipped."""

from __future__ import annotations

import pytest
from support.one_thread import one_thread as one_thread

pytest.importorskip("transformers")
