"""Options of engines and requests, and small parts that need no engine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.models.interfaces import SupportsQuant

from vispruner.selection import Budget
from vispruner.vllm import architectures, compatibility
from vispruner.vllm.config import KEY, Pruning, identity
from vispruner.vllm.llava import PrunedLlava
from vispruner.vllm.model import counts_of, encoder_batches
from vispruner.vllm.positions import (
    CHANNELS,
    LIMIT,
    Unpruned,
    with_places,
    without_places,
    write_places,
)
from vispruner.vllm.processing import RETAINED
from vispruner.vllm.qwen_vl import PrunedQwen3VL, PrunedQwen25VL, _Processor

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]


def pruning(**options: Any) -> Pruning:
    found = Pruning.of(SimpleNamespace(vispruner=options))
    assert found is not None
    return found


def test_an_engine_without_the_option_does_not_prune() -> None:
    assert Pruning.of(SimpleNamespace()) is None
    assert Pruning.of(SimpleNamespace(vispruner=None)) is None


def test_options_of_an_engine() -> None:
    assert pruning(k=64) == Pruning(Budget(64), Budget(64))
    assert pruning(k=64, max_k=576, step=4).cap == Budget(576, step=4)
    scope = pruning(k=64, max_k=128, method="scope", scope_alpha=0.5)
    assert scope.cap == Budget(128, method="scope", scope_alpha=0.5)
    assert scope.for_request({KEY: {"k": 96}}) == Budget(96, method="scope", scope_alpha=0.5)
    both = pruning(ratio=0.1, max_ratio=0.5, important_ratio=1)
    assert (both.budget.ratio, both.cap.ratio, both.budget.important_ratio) == (0.1, 0.5, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (64, "expected an object"),
        ({}, "exactly one of k and ratio"),
        ({"k": 64, "ratio": 0.1}, "exactly one of k and ratio"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": "64"}, "k must be an int"),
        ({"k": "auto"}, "k='auto' cannot be used with vLLM, which schedules a prompt before"),
        ({"k": 64, "max_k": "auto"}, "k='auto' cannot be used with vLLM"),
        ({"k": 64, "mass": 0.5}, "unknown option 'mass'; known: k, ratio"),
        ({"visual_token_num": 64}, "unknown option 'visual_token_num'; known: k, ratio"),
        ({"k": 64, "max_k": 32}, "max_k=32 is less than k=64"),
        ({"k": 64, "max_ratio": 0.5}, "max_ratio goes with ratio, this engine has k"),
        ({"ratio": 0.5, "max_k": 64}, "max_k goes with k, this engine has ratio"),
        ({"ratio": 1.5}, "ratio must be in"),
        ({"k": 64, "step": 0}, "step must be at least 1"),
        ({"k": 64, "method": "divprune"}, "method must be one of vispruner, topk"),
        ({"k": 64, "method": "topk", "step": 8}, "step is a parameter of method vispruner"),
    ],
)
def test_bad_options_of_an_engine(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Pruning.of(SimpleNamespace(vispruner=options))
    assert str(error.value).startswith(f"{KEY}: ")
    assert "\n" not in str(error.value)


def test_options_of_a_request() -> None:
    own = pruning(k=64, max_k=128, important_ratio=0.25)
    assert own.for_request({}) == own.budget
    assert own.for_request({KEY: {}}) == own.budget
    assert own.for_request({KEY: {"k": 128}, "size": 1}) == Budget(128, important_ratio=0.25)
    assert pruning(ratio=0.5).for_request({KEY: {"ratio": 0.25}}) == Budget(ratio=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 129}, "k=129 is more than this engine's 128"),
        ({"k": 0}, "k must be at least 1"),
        ({"k": True}, "k must be an int"),
        ({"k": "auto"}, "k='auto' cannot be used with vLLM"),
        ({"k": None}, "exactly one of k and ratio"),
        ({"ratio": 0.5}, "unknown option 'ratio'; known: k"),
        ({"step": 1}, "unknown option 'step'"),
        ({"method": "topk"}, "unknown option 'method'"),
        (32, "expected an object"),
    ],
)
def test_bad_options_of_a_request(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruning(k=64, max_k=128).for_request({KEY: options})


def test_identity_differs_between_prunings() -> None:
    budgets = [Budget(8), Budget(9), Budget(ratio=0.5), Budget(8, step=4), Budget(8, None, 0.25)]
    budgets += [Budget(8, method="random", seed=seed) for seed in (0, 1)]
    budgets += [Budget(8, method="topk")]
    assert len({identity(budget) for budget in budgets}) == len(budgets)
    assert identity(Budget(8)) == identity(Budget(k=8, ratio=None))


# ---------------------------------------------------------------------------------------- the parts
@pytest.mark.parametrize(
    ("tokens", "limit", "expected"),
    [
        ([], 5, []),
        ([9], 5, [(0, 1)]),
        ([2, 2, 2], 5, [(0, 2), (2, 3)]),
        ([5, 9, 1, 4, 1], 5, [(0, 1), (1, 2), (2, 4), (4, 5)]),
        ([1, 1, 1], 5, [(0, 3)]),
    ],
)
def test_encoder_batches(tokens: list[int], limit: int, expected: list[tuple[int, int]]) -> None:
    assert [(x.start, x.stop) for x in encoder_batches(tokens, limit)] == expected


def test_counts_come_in_two_shapes() -> None:
    assert counts_of(torch.tensor([3, 4])) == [3, 4]
    assert counts_of(torch.tensor([[3], [4]])) == [3, 4]
    assert counts_of([torch.tensor(3), torch.tensor([4])]) == [3, 4]


@dataclass(frozen=True)
class _Range:
    offset: int
    length: int


@dataclass(frozen=True)
class _Feature:
    mm_position: _Range
    name: str = ""
    modality: str = "image"
    data: dict[str, Any] = field(default_factory=dict)


def test_unpruned_prompt() -> None:
    tokens = [1, 2, 9, 9, 3, 8, 8, 4]
    features = [_Feature(_Range(2, 2), "a"), _Feature(_Range(5, 2), "b")]
    unpruned = Unpruned.of(tokens, features, [(2, 4), (2, 2)], {8, 9})
    assert unpruned.tokens == [1, 2, 9, 9, 9, 9, 3, 8, 8, 4]
    assert [f.mm_position for f in unpruned.features] == [_Range(2, 4), _Range(7, 2)]
    assert [f.name for f in unpruned.features] == ["a", "b"]
    assert unpruned.columns == [0, 1, 2, 3, 6, 7, 8, 9]
    assert [unpruned.tokens[column] for column in unpruned.columns] == tokens


def test_unpruned_video() -> None:
    """Frames of three tokens, one of them retained, next to each other or with text between
    them."""
    for tokens, whole, columns in (
        ([1, 8, 8, 2], [1, 8, 8, 8, 8, 8, 8, 2], [0, 1, 4, 7]),
        (
            [1, 5, 8, 6, 5, 8, 6, 2],
            [1, 5, 8, 8, 8, 6, 5, 8, 8, 8, 6, 2],
            [0, 1, 2, 5, 6, 7, 10, 11],
        ),
    ):
        feature = _Feature(_Range(1, len(tokens) - 2), modality="video")
        unpruned = Unpruned.of(tokens, [feature], [(1, 3)], {8, 9})
        assert unpruned.tokens == whole
        assert unpruned.columns == columns
        assert unpruned.features[0].mm_position == _Range(1, len(whole) - 2)


@pytest.mark.parametrize("model", [PrunedQwen25VL, PrunedQwen3VL], ids=lambda m: m.__name__)
def test_positions_before_the_image_is_encoded(model: Any) -> None:
    """Correct for text, for the time of images and for the answer, even without recomputation."""
    qwen = object.__new__(model)
    torch.nn.Module.__init__(qwen)
    qwen.visual = SimpleNamespace(spatial_merge_size=2)
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    qwen.config = SimpleNamespace(
        vision_config=vision, image_token_id=9, video_token_id=8, vision_start_token_id=7,
        vision_end_token_id=6,
    )  # fmt: skip
    grid = SimpleNamespace(data=torch.tensor([1, 4, 10]))  # 2 x 5 merged tokens
    kept = SimpleNamespace(data=torch.tensor(3))
    feature = _Feature(_Range(2, 3), data={"image_grid_thw": grid, RETAINED["image"]: kept})
    positions, ahead = qwen.get_mrope_input_positions([1, 7, 9, 9, 9, 6, 2], [feature])
    assert positions[0].tolist() == [0, 1, 2, 2, 2, 7, 8]
    text = [0, 1, 5, 6]
    assert positions[1:, text].tolist() == [[0, 1, 7, 8]] * 2
    assert ahead == 9 - 7
    places = with_places(torch.zeros(3, 4), torch.tensor([[0, 0, 4], [0, 1, 0], [0, 1, 3]]))
    (plain,), written, again = qwen.recompute_mrope_positions(
        [1, 7, 9, 9, 9, 6, 2], [places], positions, 0
    )
    assert plain.shape == (3, 4)
    assert written[1:, 2:5].tolist() == [[2, 3, 3], [6, 2, 5]]
    assert again == ahead
    unchanged = qwen.recompute_mrope_positions([1, 7, 9, 9, 9, 6, 2], [], written, 7)
    assert unchanged[0] == []
    assert unchanged[1].equal(written)
    assert unchanged[2] == ahead


def test_positions_beyond_the_digits_are_refused() -> None:
    text = SimpleNamespace(max_position_embeddings=LIMIT)  # the bound is four times this
    hf_config = SimpleNamespace(get_text_config=lambda: text)
    model_config = SimpleNamespace(hf_config=hf_config, max_model_len=512)
    processor: Any = object.__new__(_Processor)
    processor.info = SimpleNamespace(ctx=SimpleNamespace(model_config=model_config))
    processor.check_positions(LIMIT - 512)
    with pytest.raises(ValueError, match=rf"leaves {LIMIT - 512} of {LIMIT}: send fewer"):
        processor.check_positions(LIMIT - 511)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    places = torch.tensor([[0, 0, 1], [2, 127, 255], [7, 128, 256], [LIMIT - 9, LIMIT - 1, 4097]])
    embeddings = with_places(torch.zeros(4, 6, dtype=dtype), places)
    assert embeddings.dtype == dtype
    assert embeddings.shape == (4, 6 + CHANNELS)
    whole = without_places(torch.zeros(2, 6, dtype=dtype))
    ids = [5, 9, 9, 9, 9, 5, 8, 8]
    positions = torch.arange(8).repeat(3, 1)
    positions[:, 1:5] = torch.tensor([7, 9, 14, LIMIT - 2])  # the picture begins at 7
    written = write_places(ids, [embeddings, whole], positions, 0, (9, 8))
    assert written[0].equal(positions[0])
    assert written[1, 1:5].tolist() == [7, 134, 135, LIMIT + 6]
    assert written[2, 1:5].tolist() == [8, 262, 263, 4104]
    kept = [0, 5, 6, 7]
    assert written[:, kept].equal(positions[:, kept])
    # Repeated, and in two steps that split the image.
    assert write_places(ids, [embeddings, whole], written, 0, (9, 8)).equal(written)
    half = write_places(ids, [embeddings[:1]], positions, 0, (9, 8))
    assert write_places(ids, [embeddings[1:], whole], half, 2, (9, 8)).equal(written)


class _NoWaitingCopies(TorchDispatchMode):
    """Fails on a copy to another device that the host waits for.

    Reading a number of the meta device, the other way to wait, is an error of torch itself.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            device = kwargs.get("device")
            same = device is None or torch.device(device) == args[0].device
            assert same or kwargs.get("non_blocking"), "the host waits for a copy"
        return func(*args, **kwargs)


@pytest.mark.parametrize("model", [PrunedQwen25VL, PrunedQwen3VL], ids=lambda m: m.__name__)
def test_the_host_does_not_wait_for_the_encoder(model: Any) -> None:
    """With the features on another device; vLLM's VLLM_GPU_SYNC_CHECK finds waits on GPUs."""
    qwen, channels = object.__new__(model), 8
    torch.nn.Module.__init__(qwen)

    def encode(pixels: torch.Tensor, grids: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = len(pixels) // 4
        scores = torch.empty(tokens, device=pixels.device)
        return pixels.new_empty(tokens, channels), qwen._in_raster_order(scores, grids)

    def choose(features: Any, scores: torch.Tensor, lengths: Any, counts: list[int]) -> Any:
        return None, torch.empty(sum(counts), dtype=torch.long, device=scores.device)

    qwen._encode, qwen.choose, qwen.encoder_tokens = encode, choose, 1000
    qwen.visual = SimpleNamespace(
        spatial_merge_size=2, spatial_merge_unit=4,
        get_window_index_thw=lambda t, h, w: (torch.arange(t * h * w // 4), None),
    )  # fmt: skip
    qwen.config = SimpleNamespace(
        vision_config=SimpleNamespace(tokens_per_second=2),
        get_text_config=lambda: SimpleNamespace(hidden_size=channels),
    )
    given = {
        "video_grid_thw": torch.tensor([[2, 4, 4], [1, 6, 4]]),
        "pixel_values_videos": torch.empty(2 * 16 + 24, 3, device="meta"),
        "second_per_grid_ts": torch.tensor([2.5, 1.0]),
    }
    with _NoWaitingCopies():
        embeddings = qwen._pruned("video", given, [3, 2])
    assert [tuple(x.shape) for x in embeddings] == [(2 * 3, 8 + CHANNELS), (2, 8 + CHANNELS)]


# ------------------------------------------------------------------------------------- the versions
def test_no_internals_have_moved() -> None:
    """Fails on a version with moved internals, which must not be listed until the package handles
    them."""
    assert compatibility.version_problem() is None
    assert compatibility.moved() == []
    assert set(compatibility.STOCK) == set(architectures())


def test_supported_versions_are_documented() -> None:
    table = (ROOT / "docs" / "serving.md").read_text().split("### Supported versions")[1]
    documented = re.findall(r"^\| (\d+\.\d+) \|", table, re.MULTILINE)
    assert tuple(documented) == compatibility.SUPPORTED
    # So is the version that `pip install 'vispruner-cuda[vllm]'` installs.
    (lowest, highest) = re.findall(
        r'"vllm>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text()
    )[0]
    assert lowest == compatibility.SUPPORTED[0]
    assert highest not in compatibility.SUPPORTED


def test_moved_internals_are_detected() -> None:
    internals = {
        "vllm.config:ModelConfig.no_such_method": (),
        "vllm.no_such_module:name": (),
        "vllm.config:MultiModalConfig.is_multimodal_pruning_enabled": ("no_such_parameter",),
    }
    assert compatibility.moved(internals) == [
        "vllm.config:ModelConfig.no_such_method",
        "vllm.no_such_module:name",
        "vllm.config:MultiModalConfig.is_multimodal_pruning_enabled (no no_such_parameter)",
    ]


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    supported = re.escape(", ".join(compatibility.SUPPORTED))
    message = rf"^vispruner: vLLM 0\.99\.1 is not supported \(supported: {supported}\); [^\n]*$"
    with pytest.raises(compatibility.UnsupportedVersionError, match=message):
        compatibility.refuse_unsupported()
    for architecture in architectures():
        stand_in = getattr(compatibility, architecture)
        assert stand_in.__mro__[1].__name__ == compatibility.STOCK[architecture].split(":")[1]
        config = SimpleNamespace(hf_config=SimpleNamespace(vispruner={"k": 64}))
        with pytest.raises(compatibility.UnsupportedVersionError, match=message):
            stand_in(vllm_config=SimpleNamespace(model_config=config))


def test_a_build_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "moved", lambda: ["vllm.somewhere:else"])
    with pytest.raises(
        compatibility.UnsupportedVersionError, match=r"differs.*vllm\.somewhere:else"
    ):
        compatibility.refuse_unsupported()


def test_quantized_models_have_the_names_of_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM passes the mapping of names to the quantization when it allocates the model."""
    quantization = SimpleNamespace(packed_modules_mapping={}, apply_vllm_mapper=lambda mapper: None)
    model_config = SimpleNamespace(hf_config=SimpleNamespace(vispruner={"k": 8}))
    vllm_config: Any = SimpleNamespace(model_config=model_config, quant_config=quantization)
    monkeypatch.setattr(
        SupportsQuant,
        "_find_quant_config",
        lambda *args, **kwargs: kwargs["vllm_config"].quant_config,
    )
    model = PrunedQwen25VL.__new__(PrunedQwen25VL, vllm_config=vllm_config, prefix="")
    assert type(model) is PrunedQwen25VL
    assert model.quant_config is quantization
    assert "gate_up_proj" in quantization.packed_modules_mapping
    assert type(PrunedLlava.__new__(PrunedLlava, vllm_config=vllm_config)) is PrunedLlava
