"""Pruned models on a GPU that does not exist (support.imagined_gpu): devices, and waits for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from support.generation import generate
from support.imagined_gpu import ImaginedGpu, MixedDevicesError
from support.tiny_models import FAMILIES, Tiny, image, video
from torch import Tensor

import vispruner
from vispruner.models.qwen_vl import QwenVL

K = 5
#: waits that pruning adds to a forward, by a part of the family's name; 1 in the others
MOST_WAITS = {
    "qwen2.5": 7,
    "qwen": 5,
    "glm": 3,
    "idefics": 2,
    "smolvlm": 2,
}


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param


def rows_of(tiny: Tiny) -> list[list[Any]]:
    rows: list[list[Any]] = [[1, image(0), 10, 11], [1, 20, image(1), 22, image(2), 24]]
    return [*rows, [1, 30, video(0), 32]] if "video" in tiny.kinds else rows


def test_same_answer_and_few_waits(tiny: Tiny) -> None:
    model, inputs = tiny.build(), tiny.inputs(rows_of(tiny))
    with vispruner.apply(model, k=K, **tiny.options):
        expected = generate(model, inputs)
    with ImaginedGpu() as gpu, torch.no_grad():
        gpu.place(model, lambda name: "cuda:0")
        inputs = {
            name: gpu.put(value) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        generate(model, inputs)
        gpu.events.clear()
        model(**inputs)
        unpruned = gpu.events.copy()
        with vispruner.apply(model, k=K, **tiny.options) as pruner:
            gpu.events.clear()
            model(**inputs)
            added = gpu.events - unpruned
            found = generate(model, inputs)
            assert pruner.last is not None
            assert torch.equal(found.cpu(), expected)
    waits = sum(count for kind, count in added.items() if kind.startswith("wait"))
    assert waits <= next((most for part, most in MOST_WAITS.items() if part in tiny.name), 1), added


def test_tensors_on_different_devices_are_noticed() -> None:
    """As on a GPU, and not as on the CPU."""
    with ImaginedGpu() as gpu:
        here, there = gpu.put(torch.ones(3)), gpu.put(torch.ones(3), "cuda:1")
        assert here.device == torch.device("cuda:0")
        assert (here + 1).tolist() == [2, 2, 2]
        assert (here + torch.tensor(1)).device == here.device  # a number
        for other in (there, torch.ones(3)):
            with pytest.raises(MixedDevicesError):
                here + other
        with pytest.raises(MixedDevicesError):
            here[gpu.put(torch.tensor([0]), "cuda:1")]
        gpu.events.clear()
        here[gpu.put(torch.tensor([True, False, True]))]
        int(here.sum())
        here.to("cpu")
        torch.ones(3).to("cuda:0")
        assert gpu.events == {
            "wait: boolean index": 1,
            "wait: aten::_local_scalar_dense": 1,
            "wait: copy to the host": 1,
            "copy to the GPU": 1,
        }


@pytest.mark.parametrize("per_image", [False, True])
def test_features_of_earlier_blocks_on_another_gpu(per_image: bool) -> None:
    """As when the blocks of Qwen3-VL's tower are on one GPU and its merger on another."""
    with ImaginedGpu() as gpu:
        whole = gpu.put(torch.arange(8.0).view(4, 2))
        rows = gpu.put(torch.tensor([0, 1, 3]), "cuda:1")
        layer = whole.split([3, 1]) if per_image else whole
        output = SimpleNamespace(deepstack_features=[layer])
        QwenVL._keep_deepstack(output, rows, [2, 1])
        (kept,) = output.deepstack_features
        kept = torch.cat(list(kept)) if per_image else kept
        assert kept.device == whole.device
        assert kept.tolist() == [[0, 1], [2, 3], [6, 7]]
