"""A pruning option of an engine or a request is applied, or is an error of one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import transformers
import vllm
from support.engine_process import Engine
from support.engine_requests import Request

import vispruner.vllm
from vispruner.vllm import architectures, guard
from vispruner.vllm.requests import taken_from

pytestmark = pytest.mark.engine

TEXT = {"prompt_token_ids": [1, 20, 30, 40]}


def config(overrides: Any, **changes: Any) -> Any:
    """The part of vLLM's ModelConfig that the guard reads."""
    hf_config = SimpleNamespace(**(overrides if isinstance(overrides, dict) else {}))
    return SimpleNamespace(hf_overrides=overrides, hf_config=hf_config, **changes)


@pytest.mark.parametrize(
    "name", ["Vispruner", "visprunner", "vis_pruner", "vispruner_k", "VISPRUNER", "vispuner"]
)
@pytest.mark.parametrize("others", [{}, {"vispruner": {"k": 8}}], ids=["alone", "with others"])
def test_a_misspelt_key_is_named(name: str, others: dict[str, Any]) -> None:
    with pytest.raises(guard.UnsupportedEngineError, match=rf"^vispruner: .*'{name}'[^\n]*$"):
        guard.check_engine(
            config({**others, name: {"k": 8}}), "LlavaForConditionalGeneration", architectures()
        )


@pytest.mark.parametrize("name", ["vispruner", "vis_pruner", "vispruner_k"])
def test_options_in_other_places_are_named(name: str) -> None:
    nested = config({"text_config": {"dtype": "float32", name: {"k": 8}}})
    with pytest.raises(guard.UnsupportedEngineError, match=rf"'text_config\.{name}'"):
        guard.check_engine(nested, "LlavaForConditionalGeneration", architectures())
    for field in ("mm_processor_kwargs", "media_io_kwargs"):
        multimodal = SimpleNamespace(**{field: {"image": {name: {"k": 8}}}})
        model = SimpleNamespace(multimodal_config=multimodal)
        option = f"--{field.replace('_', '-')}"
        with pytest.raises(guard.UnsupportedEngineError, match=rf"{option} has 'image\.{name}'"):
            guard.check_other_options(SimpleNamespace(model_config=model, additional_config={}))
    model.multimodal_config = None  # a model without images
    extra = SimpleNamespace(model_config=model, additional_config={"a": {name: 8}})
    with pytest.raises(guard.UnsupportedEngineError, match=rf"--additional-config has 'a.{name}'"):
        guard.check_other_options(extra)
    guard.check_other_options(SimpleNamespace(model_config=model, additional_config={"a": 1}))


@pytest.mark.parametrize("overrides", [{}, {"num_labels": 2}, {"text_config": {}}, lambda c: c])
def test_other_overrides_are_accepted(overrides: Any) -> None:
    guard.check_engine(config(overrides), "OPTForCausalLM", architectures())


def test_an_architecture_without_a_pruned_class(tmp_path: Path) -> None:
    transformers.Glm4vConfig(architectures=["Glm4vForConditionalGeneration"]).save_pretrained(
        tmp_path
    )
    message = (
        "vispruner: Glm4vForConditionalGeneration cannot be pruned in vLLM .supported: "
        ".*LlavaForConditionalGeneration, .*leave the option out"
    )
    with pytest.raises(RuntimeError, match=message):
        Engine(tmp_path, {"k": 8})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_impl": "transformers"}, "vispruner: --model-impl transformers cannot be pruned"),
        ({"hf_overrides": {"vis_pruner": {"k": 8}}}, "vispruner: --hf-overrides has 'vis_pruner'"),
        (
            {"hf_overrides": {}, "mm_processor_kwargs": {"vispruner": {"k": 8}}},
            "vispruner: --mm-processor-kwargs has 'vispruner'",
        ),
        (
            {"hf_overrides": {}, "additional_config": {"vispruner": {"k": 8}}},
            "vispruner: --additional-config has 'vispruner'",
        ),
    ],
)
def test_an_engine_that_would_ignore_the_option_does_not_start(
    options: dict[str, Any], message: str, checkpoint: Callable[[str], Path]
) -> None:
    pruning = None if "hf_overrides" in options else {"k": 8}
    with pytest.raises(RuntimeError, match=message):
        Engine(checkpoint("llava"), pruning, **options)


def test_another_version_of_vllm(checkpoint: Callable[[str], Path]) -> None:
    """On an untested version pruning is refused, and everything else is as without the plugin."""
    folder = checkpoint("llava")
    with pytest.raises(RuntimeError, match=r"vispruner: vLLM 0\.99\.1 is not supported") as error:
        Engine(folder, {"k": 8}, version="0.99.1")
    assert r"\n" not in str(error.value)  # the error in the engine's process, by repr
    with pytest.raises(RuntimeError, match="vispruner: --hf-overrides has 'vis_pruner'"):
        Engine(folder, version="0.99.1", hf_overrides={"vis_pruner": {"k": 8}})
    request = [Request("USER: {image}what is it? ASSISTANT:", [1]).for_engine("llava")]
    with Engine(folder, version="0.99.1") as other:
        found = other(request)
    with Engine(folder, plugin=False) as plain:
        assert found == plain(request)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"k": 9}, "k=9 is more than this engine's 8"),
        ({"ratio": 0.5}, "unknown option 'ratio'"),
        (8, "expected an object"),
    ],
)
def test_a_request_without_images_is_checked_as_well(
    asked: Any, message: str, engine: Callable[..., Engine]
) -> None:
    pruned = engine("llava", {"k": 8})
    with pytest.raises(ValueError, match=rf"vispruner: {message}"):
        pruned([{**TEXT, "mm_processor_kwargs": {"vispruner": asked}}])
    assert len(pruned([{**TEXT, "mm_processor_kwargs": {"vispruner": {"k": 4}}}])[0].tokens) == 16


def test_an_engine_that_does_not_prune_refuses_pruning_options(
    engine: Callable[..., Engine],
) -> None:
    plain = engine("llava")
    with pytest.raises(ValueError, match="vispruner: this engine does not prune: start it with"):
        plain([{**TEXT, "mm_processor_kwargs": {"vispruner": {"k": 4}}}])
    assert len(plain([TEXT])[0].tokens) == 16


@pytest.mark.parametrize("name", ["vispruner_k", "visprunner", "Vispruner"])
def test_options_of_a_request_in_other_places(name: str, engine: Callable[..., Engine]) -> None:
    pruned = engine("llava", {"k": 8})
    for kwargs, place in (
        ({name: 4}, name),
        ({"images_kwargs": {name: 4}}, f"images_kwargs.{name}"),
    ):
        with pytest.raises(ValueError, match=rf"vispruner: mm_processor_kwargs has '{place}'"):
            pruned([{**TEXT, "mm_processor_kwargs": kwargs}])
    image = Request("USER: {image}what is it? ASSISTANT:", [1]).for_engine("llava")
    with pytest.raises(ValueError, match=rf"vispruner: extra_args .* has '{name}'"):
        pruned([image], extra_args={name: 4})
    # The engine does not wait for the picture of a refused request.
    assert len(pruned([image], extra_args={"session_id": "a"})[0].tokens) == 16


@pytest.mark.parametrize("field", ["extra_args", "extra_kwargs"])
def test_parameters(field: str) -> None:
    with pytest.raises(
        ValueError, match=rf"vispruner: {field} of the parameters has 'vispruner_k'"
    ):
        guard.check_parameters(SimpleNamespace(**{field: {"vispruner_k": 4}}))
    # Read by offline scoring.
    scoring = {"mm_processor_kwargs": {"vispruner": {"k": 4}}}
    guard.check_parameters(SimpleNamespace(**{field: scoring}))
    guard.check_parameters(SimpleNamespace(**{field: None}))


@pytest.mark.parametrize("field", ["model_extra", "chat_template_kwargs", "media_io_kwargs"])
def test_fields_of_a_request_in_other_places(field: str) -> None:
    request = SimpleNamespace(**{field: {"vispruner_k": 4}})
    with pytest.raises(ValueError, match=r"vispruner: the request has '[^\n]*vispruner_k', which"):
        taken_from(request)


def test_a_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops engines that prune, and no others."""

    def broken() -> dict[str, str]:
        raise ImportError("broken")

    monkeypatch.setattr(vispruner.vllm, "architectures", broken)
    monkeypatch.setattr(vllm.ModelRegistry, "inspect_model_cls", lambda *args: ("info", args[0]))
    vispruner.vllm.register()
    inspect = vllm.ModelRegistry.inspect_model_cls
    assert inspect("A", SimpleNamespace(hf_config=SimpleNamespace())) == ("info", "A")
    with pytest.raises(RuntimeError, match=r"^vispruner: cannot prune: broken$"):
        inspect("A", SimpleNamespace(hf_config=SimpleNamespace(vispruner={"k": 8})))
