"""Whole models: latency, memory, servers.

Run in benchmarks/: `python -m models.end_to_end --help`.
"""

import sys

import provenance

_TESTS = provenance.ROOT / "tests"

# tests/support can write whole checkpoints and start servers; engine_site has
# workarounds for vLLM's CPU build.
sys.path += [str(_TESTS), str(_TESTS / "support" / "engine_site")]
