"""The compiled kernels on different GPUs: what fits, what is refused, and the messages."""

from __future__ import annotations

import re

import pytest
import torch
from support.compiled_kernels import A100, ADA, BLACKWELL, H100, Device, Kernels
from support.problems import DTYPES, NEAR_48_KIB, Problem

from vispruner_cuda import reference

DEVICES = {"sm_90": H100, "sm_80": A100, "sm_89": ADA, "sm_120": BLACKWELL}
on_every_device = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)


def check(kernels: Kernels, problem: Problem) -> None:
    feats, attn = problem.tensors()
    got = kernels.prune(feats, attn, problem.k, **problem.keywords())
    want = reference.prune(feats, attn, problem.k, **problem.keywords())
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.feats, want.feats)


def plan_of_dedup(kernels: Kernels) -> str:
    """Whether the lists, and the loop's arrays, are in shared memory."""
    names = (launch["kernel"] for launch in kernels.launches)
    (found,) = (match[1] for name in names if (match := re.fullmatch("dedup_kernel<(.*)>", name)))
    return str(found)


@on_every_device
def test_newest_code_that_the_device_can_run(device: Device, compiled: Kernels) -> None:
    compiled.device = device
    check(compiled, Problem(1, 70, 9, 2, 20))
    assert {launch["ptx"] for launch in compiled.launches} == {80 if device.major < 9 else 90}


@on_every_device
@pytest.mark.parametrize("problem", NEAR_48_KIB, ids=lambda p: f"{p.tokens} tokens")
def test_shared_memory_near_48_kib(problem: Problem, device: Device, compiled: Kernels) -> None:
    """The first launch on a fresh device: no launch has requested more than 48 KiB before."""
    compiled.device = device
    check(compiled, problem)
    (dedup,) = (launch for launch in compiled.launches if launch["kernel"].startswith("dedup"))
    assert 48 * 1024 - 128 < dedup["shared_bytes"] <= 48 * 1024, "the layout has changed"


@on_every_device
@pytest.mark.parametrize("tokens", [12200, 12201, 12224])
def test_cls_attention_near_48_kib(tokens: int, device: Device, compiled: Kernels) -> None:
    compiled.device = device
    g = torch.Generator().manual_seed(0)
    q = torch.randn((1, 1, 64), generator=g).half()
    k = torch.randn((1, 1, tokens, 64), generator=g).half()
    got = compiled.cls_attention(q, k, 0.125)
    assert torch.allclose(got, reference.cls_attention(q, k, 0.125), rtol=1e-4, atol=0)


@on_every_device
@pytest.mark.parametrize("residual", [479, 480, 798, 799, 1096, 1097])
def test_the_limits_of_the_plans(residual: int, device: Device, compiled: Kernels) -> None:
    """2 KiB of a block's shared memory are never requested."""
    compiled.device = device
    feats, _ = Problem(1, residual, 2, None, 1).tensors()
    got = compiled.dedup(feats, residual - 40, step=20)
    assert torch.equal(got, reference.dedup(feats, residual - 40, step=20))
    assert all(x["shared_bytes"] <= device.shared_bytes - 2048 for x in compiled.launches)
    most = {H100: 1096, A100: 798, ADA: 479, BLACKWELL: 479}[device]
    assert plan_of_dedup(compiled) == ("true, true" if residual <= most else "false, true")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "residual", "plan"),
    [(ADA, 4564, "false, true"), (ADA, 4565, "false, false"), (A100, 4200, "false, true")],
)
def test_the_limits_of_long_images(
    device: Device, residual: int, plan: str, compiled: Kernels
) -> None:
    compiled.device = device
    compiled.options = {"races": False}
    feats, _ = Problem(1, residual, 1, None, 1, features="few_values").tensors()
    got = compiled.dedup(feats, residual - 600, step=600)
    assert torch.equal(got, reference.dedup(feats, residual - 600, step=600))
    assert plan_of_dedup(compiled) == plan


@pytest.mark.parametrize("residual", [1280, 1281])
def test_a_device_with_more_shared_memory_than_threads(residual: int, compiled: Kernels) -> None:
    """Lists in shared memory need a thread for each token of A, of which a block has 640."""
    compiled.device = Device(9, 0, 512 * 1024)
    feats, _ = Problem(1, residual, 2, None, 1).tensors()
    got = compiled.dedup(feats, residual - 40, step=20)
    assert torch.equal(got, reference.dedup(feats, residual - 40, step=20))
    assert plan_of_dedup(compiled) == ("true, true" if residual <= 1280 else "false, true")


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [192, 193, 240, 241, 256])
def test_received_attention_of_many_channels(
    head_dim: int, dtype: torch.dtype, device: Device, compiled: Kernels
) -> None:
    compiled.device = device
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn((90, 1, head_dim), generator=g).to(dtype) for _ in range(2))
    got = compiled.received_attention(q, k, head_dim**-0.5)
    want = reference.received_attention(q, k, head_dim**-0.5)
    assert torch.allclose(got, want, rtol=1e-4, atol=0)


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cls_attention_of_many_tokens(
    dtype: torch.dtype, device: Device, compiled: Kernels
) -> None:
    compiled.device = device
    g = torch.Generator().manual_seed(0)
    q = torch.randn((2, 1, 8), generator=g).to(dtype)
    k = torch.randn((2, 1, 32769, 8), generator=g).to(dtype)
    got = compiled.cls_attention(q, k, 0.3)
    want = reference.cls_attention(q, k, 0.3)
    assert torch.allclose(got, want, rtol=1e-4, atol=0)


# ---- errors -----------------------------------------------------------------------------------
def test_driver_of_an_older_major_version_than_the_compiler(compiled: Kernels) -> None:
    feats, attn = Problem(1, 70, 9, 2, 20).tensors()
    compiled.device = Device(9, 0, H100.shared_bytes, driver=11080)
    with pytest.raises(RuntimeError) as raised:
        compiled.prune(feats, attn, 20)
    message = str(raised.value)
    assert re.search(r"CUDA error 35 \(cudaErrorInsufficientDriver\)", message)
    assert "supports CUDA 11.8, and these kernels were compiled with CUDA 1" in message
    assert "update the driver, or reinstall with the nvcc of your torch's CUDA" in message
    assert "\n" not in message


def test_device_that_no_code_fits(compiled: Kernels) -> None:
    feats, attn = Problem(1, 70, 9, 2, 20).tensors()
    compiled.device = Device(7, 5, 64 * 1024)
    compiled.allowed = (r"\[launch\] no PTX for a device of compute capability 7\.5",)
    with pytest.raises(RuntimeError, match="the library holds no kernels for this GPU: reinstall"):
        compiled.prune(feats, attn, 20)


def test_errors_that_may_come_from_elsewhere_say_so(compiled: Kernels) -> None:
    feats, attn = Problem(1, 70, 9, 2, 20).tensors()
    compiled.options = {"step_limit": 10}  # the launch fails
    compiled.allowed = (r".",)
    with pytest.raises(RuntimeError) as raised:
        compiled.prune(feats, attn, 20)
    message = str(raised.value)
    assert "(cudaErrorLaunchFailure)" in message
    assert "might be reported asynchronously at some other API call" in message
    assert "CUDA_LAUNCH_BLOCKING=1" in message
    assert "\n" not in message
