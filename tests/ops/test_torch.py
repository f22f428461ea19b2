"""Integration with torch: opcheck, FakeTensor, torch.compile, autograd, streams, graphs."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from support import environment
from support.problems import Problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import vispruner_cuda
from vispruner_cuda import methods, reference

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def inputs(device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    problem = Problem(2, 40, 24, 3, 10, dtype=torch.float16, seed=seed)
    feats, attn = problem.tensors()
    return feats.to(device), attn.to(device)


def calls(device: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    feats, attn = inputs(device)
    ops = torch.ops.vispruner
    return {
        "topk": (ops.topk.default, (attn, 7)),
        "topk of scores": (ops.topk.default, (attn[:, 0], 100)),
        "pairwise_cosine": (ops.pairwise_cosine.default, (feats,)),
        "dedup": (ops.dedup.default, (feats, 9, 8)),
        "prune": (ops.prune.default, (feats, attn, 10, 0.5, 8)),
        "prune all": (ops.prune.default, (feats, attn, 1000, 0.5, 8)),
        "prune_by": (ops.prune_by.default, (feats, attn, 10, "mmr", 0.5)),
        "prune_by all": (ops.prune_by.default, (feats, attn, 1000, "random", 3.0)),
        "prune_varlen_by": (
            ops.prune_varlen_by.default,
            (feats.flatten(0, 1), attn[0].repeat(1, 2), [0, 30, 30, 80], [5, 4, 60], "scope", 1.0),
        ),
        "prune_varlen": (
            ops.prune_varlen.default,
            (feats.flatten(0, 1), attn[0].repeat(1, 2), [0, 30, 30, 80], [5, 4, 60], 0.5, 8),
        ),
        "cls_attention": (
            ops.cls_attention.default,
            (feats[:, :3], feats[:, None].repeat(1, 3, 1, 1), 0.2),
        ),
        "received_attention": (
            ops.received_attention.default,
            (feats.transpose(0, 1), feats.transpose(0, 1), 0.2, [0, 10, 40], None),
        ),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", calls("cpu"))
def test_opcheck(name: str, device: str) -> None:
    op, args = calls(device)[name]
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("name", calls("cpu"))
def test_fake_kernels_give_the_real_shapes_and_dtypes(name: str) -> None:
    op, args = calls("cpu")[name]
    real = op(*args)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    real, fake = (r if isinstance(r, tuple) else (r,) for r in (real, fake))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_meta_tensors() -> None:
    kept = vispruner_cuda.prune(
        torch.empty(4, 576, 1024, device="meta"), torch.empty(4, 16, 576, device="meta"), 64
    )
    assert kept.feats.shape == (4, 64, 1024)
    assert kept.indices.device.type == "meta"


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("device", DEVICES)
def test_compile_fullgraph(device: str, method: str) -> None:
    def model(feats: Tensor, attn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = vispruner_cuda.prune(feats * 2, attn, 10, method=method)
        ranked = vispruner_cuda.topk(attn, 3)
        packed = vispruner_cuda.prune_varlen(
            feats.flatten(0, 1), attn[:, 0].flatten(), [0, 40, 80], 6, method=method
        )
        return kept.feats + 1, kept.indices + ranked.indices[:, :1], packed.indices

    feats, attn = inputs(device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for want, got in zip(model(feats, attn), compiled(feats, attn), strict=True):
        assert torch.equal(want, got)


def test_compile_with_dynamic_batch_recompiles_once() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda f, a: vispruner_cuda.prune(f, a, 5).indices, backend=counter, fullgraph=True
    )
    for batch in (2, 3, 4, 5, 6):
        feats, attn = torch.randn(batch, 20, 8), torch.rand(batch, 20)
        assert torch.equal(compiled(feats, attn), reference.prune(feats, attn, 5).indices)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("device", DEVICES)
def test_features_are_an_ordinary_differentiable_gather(device: str) -> None:
    feats, attn = inputs(device)
    feats = feats.float().requires_grad_()
    kept = vispruner_cuda.prune(feats, attn, 10)
    assert kept.feats.requires_grad
    assert not kept.indices.requires_grad
    kept.feats.sum().backward()
    expected = torch.zeros_like(feats)
    expected[torch.arange(2, device=device)[:, None], kept.indices] = 1.0
    assert torch.equal(feats.grad, expected)

    packed = vispruner_cuda.prune_varlen(feats.flatten(0, 1), attn[:, 0].flatten(), [0, 40, 80], 6)
    assert packed.feats.requires_grad
    with torch.no_grad():
        assert not vispruner_cuda.prune(feats, attn, 10).feats.requires_grad
    with torch.inference_mode():
        assert torch.equal(vispruner_cuda.prune(feats, attn, 10).indices, kept.indices)


@pytest.mark.parametrize("method", ["vispruner", "topk"])  # of two operators
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_forward_mode(device: str, packed: bool, method: str) -> None:
    """The tangent of the retained features is that of torch's gather, in every transform."""
    feats, attn = inputs(device)
    feats, attn = feats.float(), attn[:, 0].contiguous()
    weight = torch.arange(2 * 10 * 24.0, device=device).view(2, 10, 24)

    def kept(module: Any, x: Tensor) -> Tensor:
        if not packed:
            return module.prune(x, attn, 10, method=method).feats
        found = module.prune_varlen(x.flatten(0, 1), attn.flatten(), [0, 40, 80], 10, method=method)
        return found.feats.view(2, 10, 24)

    def dual(f: Any) -> Tensor:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(feats, feats.cos()))).tangent
            assert tangent is not None
            return tangent

    def jvp(f: Any) -> Tensor:
        return torch.func.jvp(f, (feats,), (feats.cos(),))[1]

    transforms: dict[str, Any] = {
        "dual numbers": dual,
        "jvp": jvp,
        "jacfwd": lambda f: torch.func.jacfwd(lambda x: f(x * feats).sum((1, 2)))(feats[:1]),
        "jvp without gradients": lambda f: jvp(torch.no_grad()(f)),
        # the inner transform hides the outer tangent
        "jvp of grad": lambda f: jvp(
            lambda x: torch.func.grad(lambda y: (f(x) ** 2 * y**2).sum())(weight)
        ),
        "jvp of jvp": lambda f: jvp(
            lambda x: torch.func.jvp(lambda y: f(x) ** 2 * y**2, (weight,), (weight,))[1]
        ),
        "hessian": lambda f: torch.func.hessian(lambda a: (f(a * feats) ** 3).sum())(
            torch.ones((), device=device)
        ),
    }
    for name, transform in transforms.items():
        found = transform(lambda x: kept(vispruner_cuda, x))
        want = transform(lambda x: kept(reference, x))
        assert want.abs().sum() > 0, name
        torch.testing.assert_close(found, want, msg=name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_derivatives_through_vmap(device: str, packed: bool) -> None:
    """Inside vmap and functionalize, tensors hide that the gradient of an outer one is wanted."""
    feats, attn = inputs(device)
    feats, attn = feats.float(), attn.float()

    def kept(x: Tensor, a: Tensor) -> Tensor:
        if packed:
            return vispruner_cuda.prune_varlen(x, a, [0, 40], 10).feats
        return vispruner_cuda.prune(x[None], a[None], 10).feats[0]

    def squares(f: Any) -> Any:
        return lambda x: (f(x) ** 2).sum()

    def backward(f: Any) -> Tensor:
        leaf = feats.clone().requires_grad_()
        f(leaf).backward()
        assert leaf.grad is not None
        return leaf.grad

    mapped = squares(lambda x: torch.func.vmap(kept)(x, attn))
    want = torch.func.grad(
        squares(lambda x: torch.stack([kept(*one) for one in zip(x, attn, strict=True)]))
    )(feats)
    assert want.abs().sum() > 0
    for found in (
        backward(mapped),
        backward(torch.func.functionalize(mapped)),
        torch.func.grad(mapped)(feats),
        torch.func.vmap(torch.func.grad(lambda x, a: (kept(x, a) ** 2).sum()))(feats, attn),
    ):
        torch.testing.assert_close(found, want)
    tangent = torch.func.jvp(mapped, (feats,), (feats.cos(),))[1]
    torch.testing.assert_close(tangent, (want * feats.cos()).sum())
    # What has no gradient does not claim one.
    leaf = feats.clone().requires_grad_()
    cosines = torch.func.vmap(lambda x: vispruner_cuda.pairwise_cosine(x[None]))(leaf)
    assert not cosines.requires_grad


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_derivatives_inside_a_compiled_function(transform: str) -> None:
    feats, attn = inputs()
    feats = feats.float()

    def derivative(x: Tensor) -> Tensor:
        def f(x: Tensor) -> Tensor:
            return (vispruner_cuda.prune(x, attn, 10).feats ** 2).sum()

        if transform == "grad":
            return torch.func.grad(f)(x)
        return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]

    torch._dynamo.reset()
    found = torch.compile(derivative, backend="eager", fullgraph=True)(feats)
    want = derivative(feats)
    assert want.abs().sum() > 0
    torch.testing.assert_close(found, want)


def test_attention_that_requires_grad_is_fine() -> None:
    feats, attn = inputs()
    kept = vispruner_cuda.prune(feats, attn.requires_grad_(), 10)
    assert not kept.feats.requires_grad


def test_inputs_are_not_changed() -> None:
    feats, attn = inputs()
    before = feats.clone(), attn.clone()
    vispruner_cuda.prune(feats, attn, 10)
    assert torch.equal(feats, before[0])
    assert torch.equal(attn, before[1])


@pytest.mark.parametrize("device", DEVICES)
def test_threads_do_not_affect_each_other(device: str) -> None:
    problems = [inputs(device, seed) for seed in range(4)]
    expected = [reference.prune(*p, 10).indices for p in problems]
    wrong: list[int] = []
    if device == "cuda":
        torch.cuda.synchronize()  # the threads' streams do not wait for the expected indices

    def work(i: int) -> None:
        stream = torch.cuda.Stream() if device == "cuda" else None
        for _ in range(25):
            with torch.cuda.stream(stream):
                got = vispruner_cuda.prune(*problems[i], 10).indices
                if not torch.equal(got, expected[i]):
                    wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_changes_nothing(threads: int) -> None:
    problem = Problem(5, 150, 33, None, 20, features="clustered")
    feats, attn = problem.tensors()
    expected = reference.prune(feats, attn, 20)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for batch in (5, 1):
            got = vispruner_cuda.prune(feats[:batch], attn[:batch], 20)
            assert torch.equal(got.indices, expected.indices[:batch])
    finally:
        torch.set_num_threads(before)


@needs_cuda
def test_cuda_graph_replays_with_new_data() -> None:
    feats, attn = inputs("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        vispruner_cuda.prune(feats, attn, 10)  # one-time setup before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = vispruner_cuda.prune(feats, attn, 10)
        packed = vispruner_cuda.prune_varlen(
            feats.flatten(0, 1), attn[:, 0].flatten(), [0, 50, 80], [7, 9]
        )
    for seed in range(5):
        new_feats, new_attn = inputs("cuda", seed)
        feats.copy_(new_feats)
        attn.copy_(new_attn)
        graph.replay()
        assert torch.equal(kept.indices, reference.prune(feats, attn, 10).indices)
        want = reference.prune_varlen(
            feats.flatten(0, 1), attn[:, 0].flatten(), [0, 50, 80], [7, 9]
        )
        assert torch.equal(packed.indices, want.indices)


@needs_cuda
def test_cuda_graph_is_captured_by_the_first_call_of_a_process() -> None:
    """One-time setup per kernel and device is allowed during a capture."""
    program = """
import torch, vispruner_cuda
from support.problems import Problem
from vispruner_cuda import methods, reference
feats, attn = (t.cuda() for t in Problem(1, 196, 4, None, 26).tensors())
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    kept = vispruner_cuda.prune(feats, attn, 26)
graph.replay()
assert torch.equal(kept.indices, reference.prune(feats, attn, 26).indices)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_cuda
def test_no_host_synchronization() -> None:
    todo = calls("cuda").values()  # before the mode: copies to the device wait for it
    feats, attn = inputs("cuda")
    vispruner_cuda.prune(feats, attn, 10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for op, args in todo:
            op(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    feats, attn = inputs("cuda:1")
    kept = vispruner_cuda.prune(feats, attn, 10)
    assert kept.feats.device == feats.device
    assert torch.cuda.current_device() == 0
    assert torch.equal(kept.indices, reference.prune(feats, attn, 10).indices)
