"""Every instruction set of this processor: the same tokens, and scores as accurate. Each runs in a
separate process, because the choice is made once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import environment

import vispruner_cuda  # noqa: F401  (registers the operators)

INFO = json.loads(torch.ops.vispruner.build_info())

# Golden cases, random problems and the largest sums; prints the number of comparisons.
SCRIPT = """
import json, sys
import hypothesis, torch
from hypothesis import given, settings
from support.problems import Problem, golden_cases, problems
import vispruner_cuda
from vispruner_cuda import reference

wanted = sys.argv[1]
assert json.loads(torch.ops.vispruner.build_info())["cpu_isa"] == wanted
count = 0
for case in golden_cases("upstream_exact") + golden_cases("v1") + golden_cases("methods"):
    kept = vispruner_cuda.prune(
        case.feats, case.cls_attn, case.k, **case.keywords
    )
    assert torch.equal(kept.indices[0], case.indices), case.name
    count += 1

def check(problem):
    global count
    feats, attn = problem.tensors()
    want = reference.prune(feats, attn, problem.k, **problem.keywords())
    got = vispruner_cuda.prune(feats, attn, problem.k, **problem.keywords())
    assert torch.equal(want.indices, got.indices), problem
    assert torch.equal(reference.pairwise_cosine(feats), vispruner_cuda.pairwise_cosine(feats))
    count += 2

settings(max_examples=200, deadline=None, derandomize=True, database=None,
         suppress_health_check=list(hypothesis.HealthCheck))(given(problems())(check))()
for features in ("constant", "normal", "clustered"):
    check(Problem(1, 150, 8192, None, 16, features=features))
    check(Problem(2, 577, 200, 2, 60, features=features, dtype=torch.float16))
    check(Problem(1, 700, 32, 2, 20, features=features))  # makes neighbour lists again

# Squared norms up to and beyond what an int32 sum over all channels is used for (2^30).
signs = torch.tensor([1.0, -1.0])[torch.randint(2, (80, 1), generator=torch.manual_seed(0))]
for value in (1022, 1023, 1024, 1447, 2047):
    feats = torch.full((1, 80, 1024), float(value))
    feats[0, :, ::7] -= torch.arange(80)[:, None] % 3
    feats[0, :40, 0] = 2047
    feats *= signs
    attn = torch.rand(1, 80, generator=torch.manual_seed(1))
    want, got = (module.prune(feats, attn, 20) for module in (reference, vispruner_cuda))
    assert torch.equal(want.indices, got.indices), value
    assert torch.equal(reference.pairwise_cosine(feats), vispruner_cuda.pairwise_cosine(feats))
    count += 2

# All float16 values, also where the processor flushes subnormals to zero.
halves = torch.arange(65536).to(torch.int16).view(torch.half).view(2, 32768)
strided = torch.stack([halves, halves], -1)[..., 0]
small = (torch.randn(1, 100, 20) * 2e-5).half()
for flush in (False, True):
    assert torch.set_flush_denormal(flush)
    for attn in (halves, strided):
        want, got = (module.topk(attn, 32768) for module in (reference, vispruner_cuda))
        assert torch.equal(want.indices, got.indices), (flush, attn.stride())
    assert torch.equal(reference.pairwise_cosine(small), vispruner_cuda.pairwise_cosine(small))
    count += 3
print("equal", count)
"""


def skip_unless_usable(isa: str) -> None:
    if isa not in INFO["cpu_isas_usable"]:
        pytest.skip(f"this processor has no {isa}")


@pytest.mark.parametrize("isa", INFO["cpu_isas"])
def test_instruction_set(isa: str) -> None:
    skip_unless_usable(isa)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, isa],
        env=environment(VISPRUNER_CPU_ISA=isa),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("equal")


@pytest.mark.parametrize("isa", INFO["cpu_isas"])
def test_scores_of_instruction_set(isa: str) -> None:
    skip_unless_usable(isa)
    tests = Path(__file__).with_name("test_attention.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    done = subprocess.run(
        command, env=environment(VISPRUNER_CPU_ISA=isa), capture_output=True, text=True,
        cwd=tests.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("isa", INFO["cpu_isas"])
def test_an_unsupported_instruction_set_is_an_error(isa: str) -> None:
    if isa in INFO["cpu_isas_usable"]:
        pytest.skip(f"this processor has {isa}")
    program = "import torch, vispruner_cuda; vispruner_cuda.topk(torch.ones(1, 4), 2)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(VISPRUNER_CPU_ISA=isa),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "VISPRUNER_CPU_ISA names an instruction set that this processor" in done.stderr
