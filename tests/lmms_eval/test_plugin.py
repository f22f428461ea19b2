"""The plugin for lmms-eval, with fakes of its interface, and in the harness itself.

The harness has a hundred dependencies, so the second half runs only if it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers")

from vispruner import Budget, embedded, lmms_eval
from vispruner.embedded import scenes

TASK = Path(__file__).with_name("task")
QUESTIONS = 12


def load_embedded() -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(embedded.path())


# --------------------------------------------------------------------------------------- fakes
@dataclass(frozen=True)
class ModelManifest:
    """As in lmms_eval.models.registry_v2."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


class LlavaHf:
    """The parts of the harness's class that the plugin uses: keyword arguments and `model`."""

    is_simple = True

    def __init__(self, pretrained: str, batch_size: int = 1) -> None:
        assert pretrained == embedded.path()
        self.model = load_embedded()


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(name: str, **content: Any) -> None:
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    for package in ("lmms_eval", "lmms_eval.models", "lmms_eval.models.simple"):
        install(package, __path__=[])
    install("lmms_eval.models.registry_v2", ModelManifest=ModelManifest)
    install("lmms_eval.models.simple.llava_hf", LlavaHf=LlavaHf)
    lmms_eval._pruned_class.cache_clear()


@pytest.mark.usefixtures("harness")
def test_manifests_name_classes() -> None:
    manifests = {manifest.model_id: manifest for manifest in lmms_eval.manifests()}
    assert set(manifests) == {
        "vispruner_llava_hf",
        "vispruner_qwen2_vl",
        "vispruner_qwen2_5_vl",
        "vispruner_qwen3_vl",
    }
    assert manifests["vispruner_qwen2_vl"].chat_class_path is None
    path = manifests["vispruner_llava_hf"].simple_class_path
    module, _, name = path.rpartition(".")
    assert module == "vispruner.lmms_eval"
    found = getattr(lmms_eval, name)
    assert issubclass(found, LlavaHf)
    assert found.is_simple
    assert found is getattr(lmms_eval, name)


@pytest.mark.usefixtures("harness")
def test_the_model_is_pruned() -> None:
    from transformers import AutoProcessor

    wrapped = lmms_eval.simple_llava_hf(pretrained=embedded.path(), batch_size=1, k=32, step=4)
    scene = scenes.draw(0)
    prompt = f"<image>\n{scene.questions[0][0]}"
    processor = AutoProcessor.from_pretrained(embedded.path())
    inputs = processor(images=scene.image, text=prompt, return_tensors="pt")
    wrapped.model.generate(**inputs, max_new_tokens=1)
    assert wrapped.pruner.last is not None
    assert (wrapped.pruner.last.tokens_before, wrapped.pruner.last.tokens_after) == (196, 32)


@pytest.mark.usefixtures("harness")
def test_another_method() -> None:
    wrapped = lmms_eval.simple_llava_hf(
        pretrained=embedded.path(), batch_size=1, k=32, method="scope", scope_alpha=0.5
    )
    assert wrapped.pruner.budget == Budget(32, method="scope", scope_alpha=0.5)
    with pytest.raises(ValueError, match="step is a parameter of method vispruner"):
        lmms_eval.simple_llava_hf(pretrained=embedded.path(), k=32, method="topk", step=4)


@pytest.mark.usefixtures("harness")
def test_a_budget_is_needed() -> None:
    with pytest.raises(ValueError, match="exactly one of k and ratio"):
        lmms_eval.simple_llava_hf(pretrained=embedded.path())


@pytest.mark.parametrize("name", ["simple_gpt4v", "chat_qwen2_vl", "nothing"])
def test_unknown_classes(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(lmms_eval, name)


# --------------------------------------------------------------------------------- the harness
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval.evaluator") is None, reason="lmms-eval is not installed"
)
def test_in_the_harness(tmp_path: Path) -> None:
    """The command line runs a task of scenes with the embedded model, pruned to 32 of 196."""
    docs = []
    for seed in range(QUESTIONS):
        scene = scenes.draw(seed, split="lmms-eval")
        image = tmp_path / f"{seed}.png"
        scene.image.save(image)
        question, answer = scene.questions[0]
        docs.append({"image": str(image), "question": question, "answer": answer})
    data = tmp_path / "scenes.json"
    data.write_text("\n".join(map(json.dumps, docs)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "functions.py").write_text((TASK / "functions.py").read_text())
    yaml = (TASK / "scenes.yaml").read_text()
    (tasks / "scenes.yaml").write_text(yaml.replace("DATA", str(data)))

    command = [
        sys.executable, "-m", "lmms_eval", "--model", "vispruner_llava_hf",
        "--model_args", f"pretrained={embedded.path()},k=32,dtype=float32,device_map=cpu",
        "--tasks", "vispruner_scenes", "--include_path", str(tasks),
        "--device", "cpu", "--batch_size", "1", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    files = list((tmp_path / "out").rglob("*results.json"))
    assert len(files) == 1, done.stdout + done.stderr  # a failure may also end with status 0
    results = json.loads(files[0].read_text())["results"]["vispruner_scenes"]
    accuracy = next(value for key, value in results.items() if key.startswith("accuracy"))
    assert accuracy >= 0.7  # the experiment's accuracy at k = 32, minus the error of 12 questions
