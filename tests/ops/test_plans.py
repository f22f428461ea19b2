"""Launch plans: the selected one is launched, and one that cannot be launched is an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from support import environment
from support.compiled_kernels import A100, ADA, BLACKWELL, H100, Device, Kernels
from support.problems import Problem

import vispruner_cuda
from vispruner_cuda import plans, reference

PROBLEM = Problem(2, 300, 40, 2, 33, features="clustered", dtype=torch.float16)

#: Each plan and a kernel that only this plan launches.
LAUNCHED = {
    ("rank", "tokens_8"): "rank_kernel<Half, 8>",
    ("rank", "tokens_32"): "rank_kernel<Half, 32>",
    ("gram", "tiles_32"): "gram_kernel<Similarities, Shape<32, 64, 1, 6, 1>>",
    ("gram", "tiles_64"): "gram_kernel<Similarities, Shape<64, 64, 2, 3, 3>>",
    ("gram", "tiles_128"): "gram_kernel<Similarities, Shape<128, 128, 4, 3, 1>>",
    ("neighbours", "warp_576"): "neighbours_kernel<32, 18>",
    ("neighbours", "warp_1024"): "neighbours_kernel<32, 32>",
    ("neighbours", "block_4096"): "neighbours_kernel<256, 16>",
    ("neighbours", "block_16384"): "neighbours_kernel<512, 32>",
    ("neighbours", "block_32768"): "neighbours_kernel<1024, 32>",
    ("dedup", "lists_shared"): "dedup_kernel<true, true>",
    ("dedup", "state_shared"): "dedup_kernel<false, true>",
    ("dedup", "workspace"): "dedup_kernel<false, false>",
}


def prune(kernels: Kernels, problem: Problem = PROBLEM) -> None:
    """Prunes, compares with the reference, and stores the launches in kernels.launches."""
    feats, attn = problem.tensors()
    got = kernels.prune(feats, attn, problem.k, **problem.keywords())
    want = reference.prune(feats, attn, problem.k, **problem.keywords())
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.feats, want.feats)


@pytest.mark.parametrize(("stage", "plan"), LAUNCHED)
@pytest.mark.parametrize("device", [H100, A100], ids=["sm_90", "sm_80"])
def test_the_selected_plan_is_launched(
    stage: str, plan: str, device: Device, compiled: Kernels
) -> None:
    compiled.device = device
    with compiled.plans.use(**{stage: plan}):
        prune(compiled)
    launched = [name for name in compiled.kernel_names() if name.startswith(f"{stage}_kernel")]
    assert launched == [LAUNCHED[stage, plan]]


@pytest.mark.parametrize(
    ("plan", "device", "expected"),
    [
        ("auto", H100, True),
        ("auto", BLACKWELL, True),
        ("auto", ADA, False),
        ("auto", A100, False),
        ("auto", Device(9, 0, H100.shared_bytes, newest_ptx=80), False),
        ("ordered", H100, False),
        ("dependent", H100, True),
    ],
)
def test_dependent_launches(plan: str, device: Device, expected: bool, compiled: Kernels) -> None:
    compiled.device = device
    with compiled.plans.use(launch=plan):
        prune(compiled)
    assert len(compiled.launches) == 5
    assert [launch["dependent"] for launch in compiled.launches] == [expected] * 5


@pytest.mark.parametrize("launch", ["auto", "ordered", "dependent"])
@pytest.mark.parametrize("function", ["prune", "dedup", "topk", "pairwise_cosine"])
def test_only_a_kernel_of_the_same_call_may_start_early(
    function: str, launch: str, compiled: Kernels
) -> None:
    """Kernels after the last one of a call are not of this library."""
    feats, attn = PROBLEM.tensors()
    arguments = {
        "prune": (feats, attn, 33),
        "dedup": (feats, 33),
        "topk": (attn, 33),
        "pairwise_cosine": (feats,),
    }
    compiled.module.clear_counters()
    with compiled.plans.use(launch=launch):
        getattr(compiled, function)(*arguments[function])
    names = compiled.kernel_names()
    triggers = [compiled.times_run(name, "griddepcontrol.launch_dependents") > 0 for name in names]
    assert triggers == [launch != "ordered"] * (len(names) - 1) + [False]


@pytest.mark.parametrize("sort", ["buckets", "counting"])
def test_sorting_runs_the_lines_of_its_plan(sort: str, compiled: Kernels) -> None:
    """One kernel contains both algorithms: the executed lines distinguish them."""
    lines = {
        "buckets": "rank_in_buckets",
        "counting": "sort_by_counting",
    }
    compiled.options = {"profile": True}
    compiled.module.clear_counters()
    with compiled.plans.use(sort=sort):
        prune(compiled)
    ran = compiled.functions_run("dedup_kernel<true, true>")
    for name, function in lines.items():
        assert (function in ran) == (name == sort), (name, ran)


CHOICES = [
    # tokens, images, k, device: kernels
    (576, 1, 64, H100, ["rank_kernel<float, 8>", "Shape<32, 64", "<32, 18>", "<true, true>"]),
    (576, 8, 64, H100, ["rank_kernel<float, 32>", "Shape<64, 64", "<32, 18>", "<true, true>"]),
    (700, 1, 64, H100, ["rank_kernel<float, 8>", "Shape<64, 64", "<32, 32>", "<true, true>"]),
    (700, 1, 64, ADA, ["rank_kernel<float, 8>", "Shape<64, 64", "<32, 32>", "<false, true>"]),
    (1200, 1, 64, A100, ["rank_kernel<float, 8>", "Shape<64, 64", "<256, 16>", "<false, true>"]),
]


@pytest.mark.parametrize(("tokens", "images", "k", "device", "kernels"), CHOICES)
def test_what_the_shape_chooses(
    tokens: int, images: int, k: int, device: Device, kernels: list[str], compiled: Kernels
) -> None:
    compiled.device = device
    prune(compiled, Problem(images, tokens, 4, None, k, step=tokens))
    names = compiled.kernel_names()
    assert len(names) == 5
    for name, part in zip(names, kernels, strict=False):
        assert part in name


def test_attention_plans(compiled: Kernels) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn((1, 2, 40), generator=g), torch.randn((1, 2, 70, 40), generator=g)
    for plan, far in (("shared", "false"), ("workspace", "true")):
        with compiled.plans.use(cls_attention=plan):
            compiled.cls_attention(q, k, 0.2)
        assert compiled.kernel_names()[0] == f"softmax_kernel<float, {far}>"
    rows = k[0].transpose(0, 1)
    for plan, shape in (("wide", "Shape<float, 64, 1>"), ("narrow", "Shape<float, 16, 1>")):
        with compiled.plans.use(received_attention=plan):
            compiled.received_attention(rows, rows, 0.2)
        passes = [name for name in compiled.kernel_names() if name.startswith("pass_kernel")]
        assert passes == [f"pass_kernel<float, {sums}, {shape}>" for sums in ("false", "true")]


# ---- refusals ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("device", "asked", "problem", "message"),
    [
        (H100, {"neighbours": "warp_576"}, Problem(1, 700, 4, None, 9), "at most 576 residual"),
        (ADA, {"dedup": "lists_shared"}, Problem(1, 700, 4, None, 9), "this GPU has 99328"),
        (ADA, {"dedup": "state_shared"}, Problem(1, 9000, 1, None, 8999), None),
        (A100, {"launch": "dependent"}, PROBLEM, "needs a GPU of compute capability 9.0"),
        (Device(9, 0, 232448, newest_ptx=80), {"launch": "dependent"}, PROBLEM, "VISPRUNER_CUDA_A"),
    ],
)
def test_a_plan_that_cannot_do_the_work_is_an_error(
    device: Device, asked: dict[str, str], problem: Problem, message: str | None, compiled: Kernels
) -> None:
    compiled.device = device
    feats, attn = problem.tensors()
    with compiled.plans.use(**asked):
        if message is None:  # no residual tokens, so any plan works
            compiled.prune(feats, attn, problem.k, important_ratio=1.0)
            return
        with pytest.raises(RuntimeError, match=re.escape(message)) as raised:
            compiled.prune(feats, attn, problem.k)
    assert "\n" not in str(raised.value)


def test_received_attention_names_the_limit(compiled: Kernels) -> None:
    q = torch.randn(70, 1, 256)
    compiled.device = ADA
    with (
        compiled.plans.use(received_attention="wide"),
        pytest.raises(RuntimeError, match=r"head_dim = 256 takes 133120 .* has 99328: use receiv"),
    ):
        compiled.received_attention(q, q, 0.1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"gram": "tiles_7"}, "gram must be one of auto, tiles_32.* got 'tiles_7'"),
        ({"cpu": "sse2"}, "cpu must be one of auto, portable.* got 'sse2'"),
        ({"gather": "auto"}, "no stage 'gather' has launch plans in this build: use one of .*cpu"),
    ],
)
def test_unknown_names(asked: dict[str, str], message: str) -> None:
    if "gram" in asked and "gram" not in plans.choices():
        message = "no stage 'gram' has launch plans in this build"
    before = plans.current()
    with pytest.raises(ValueError, match=message):
        plans.select(**asked)
    with pytest.raises(ValueError, match=message), plans.use(**asked):
        pytest.fail("the block must not run")
    assert plans.current() == before


@pytest.mark.parametrize("stage", ["rank", "nothing"])
def test_the_operator_refuses_unknown_names(stage: str) -> None:
    with pytest.raises(RuntimeError, match=r"vispruner: no (plan 'x' for|stage 'nothing')"):
        torch.ops.vispruner.set_plan(stage, "x")


def test_use_restores_the_selected_plans() -> None:
    with plans.use(cpu="portable"):
        assert plans.current()["cpu"] == "portable"
        with plans.use(cpu="auto"):
            assert plans.current()["cpu"] == "auto"
        assert plans.current()["cpu"] == "portable"
    assert set(plans.current().values()) == {"auto"}


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment(**variables),
        capture_output=True,
        text=True,
    )


def test_environment_variables_are_read_once() -> None:
    names = plans.variables()
    wanted = {stage: plans.choices()[stage][1] for stage in names}
    program = """
import os
from vispruner_cuda import plans
before = plans.current()
os.environ.update({name: "nonsense" for name in plans.variables().values()})
assert plans.current() == before
print(before)
"""
    done = python(program, **{names[stage]: plan for stage, plan in wanted.items()})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(wanted)


@pytest.mark.parametrize("stage", ["cpu", "gram"])
def test_unknown_name_in_the_environment(stage: str) -> None:
    if stage not in plans.choices():
        pytest.skip("the library was built without CUDA kernels")
    variable = plans.variables()[stage]
    done = python("import vispruner_cuda", **{variable: "fast"})
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: vispruner_cuda: environment variable {variable}: ")
    assert f"no plan 'fast' for {stage}: use one of auto, " in last


def test_any_text_in_the_environment() -> None:
    done = python("import vispruner_cuda", VISPRUNER_CPU_ISA='a"b\\c\td\u00e9')
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: vispruner_cuda: environment variable VISPRUNER_CPU_ISA: ")
    assert "no plan 'a\"b\\c\td\u00e9' for cpu" in last


def test_plans_of_this_build() -> None:
    choices: dict[str, Any] = plans.choices()
    assert all(names[0] == "auto" for names in choices.values())
    assert ("gram" in choices) == bool(vispruner_cuda._library.load().cuda)
    assert "portable" in choices["cpu"]
    assert set(plans.variables()) == set(choices)
    assert not {name for name in plans.variables().values() if name in os.environ}


# Other tests get a new device per call. In another process, because it changes the module.
TWO_CALLS = """
import torch
from support.compiled_kernels import Kernels, build_module
kernels = Kernels(build_module(), counted=False)
for _ in range(2):
    kernels.module.take_runtime_calls()
    kernels.prune(torch.randn(1, 90, 16), torch.rand(1, 90), 30)
    kernels.module.set_device = lambda **_: None
print(kernels.module.take_runtime_calls())
"""


@pytest.mark.usefixtures("compiled_session")
def test_device_properties_are_queried_once() -> None:
    """Properties of a device and its kernels are cached; only launches remain."""
    command = [sys.executable, "-c", TWO_CALLS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'cudaLaunchKernelExC': 5}"
