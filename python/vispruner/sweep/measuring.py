"""Asks a model about a picture, unpruned and under each setting."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

import vispruner_cuda

from .. import flops
from ..hf import apply
from ..phases import phases_of, unpruned
from ..selection import Budget
from .data import Item


@dataclass(frozen=True)
class Measurement:
    """One question under one setting.

    Attributes:
        answer: decoded greedily.
        log_probability: mean over the tokens of the unpruned model's answer, given by this model.
        first_choices: share of those tokens that are this model's first choice as well.
        visual_tokens: in the prompt.
        cache_bytes: of the prompt's keys and values.
        milliseconds: "vision", "prune", "prefill", "decode", "first token" and "total".
    """

    answer: str
    log_probability: float
    first_choices: float
    visual_tokens: int
    cache_bytes: int
    milliseconds: dict[str, float]

    def data(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Subject:
    """A model that is swept.

    Args:
        model, processor: of transformers, in eval mode.
        inputs_of: the model's inputs for a picture and a question.
        name: of the model as it was loaded: a directory or a name on the hub.
        max_new_tokens: length of the longest answer.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        inputs_of: Callable[[Image.Image, str], Any],
        name: str,
        max_new_tokens: int,
    ) -> None:
        self.model, self.processor, self.inputs_of = model, processor, inputs_of
        self.max_new_tokens = max_new_tokens
        self.identity = _identity(model, name, max_new_tokens)
        self._whole: tuple[str, Any, Any] | None = None  # the latest item's inputs and answer

    def key(self, item: Item, budget: Budget | None) -> str:
        """Hash of the model, picture, question and setting, on which a measurement depends."""
        parts = (self.identity, item.picture, item.question, repr(budget))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

    def warm_up(self, item: Item) -> None:
        """The first call is slower than later ones."""
        self.measure(item, None)

    def measure(self, item: Item, budget: Budget | None) -> Measurement:
        """A question under a setting; None is the unpruned model.

        Raises:
            ValueError, TypeError, RuntimeError, OSError: the picture cannot be read or used.
        """
        inputs, reference = self._reference(item)
        with ExitStack() as stack, torch.no_grad():
            if budget is None:
                clock = stack.enter_context(unpruned(self.model))
                sequences = self._generate(inputs)
                times = phases_of(clock.milliseconds())
                tokens = self._visual_tokens(inputs)
                removed = 0
            else:
                pruner = stack.enter_context(apply(self.model, budget))
                sequences = self._generate(inputs)
                last = pruner.last
                assert last is not None
                times = phases_of(last.milliseconds)
                tokens, removed = last.tokens_after, last.prompt_before - last.prompt_after
            log_probability, first = self._forced(inputs, reference)
        columns = inputs["input_ids"].shape[1]
        times["first token"] = times["vision"] + times["prune"] + times["prefill"]
        text = self.model.config.get_text_config()
        element = next(self.model.parameters()).element_size()
        return Measurement(
            self._text(sequences[:, columns:]),
            log_probability,
            first,
            tokens,
            flops.cache_bytes(text, columns - removed, element),
            times,
        )

    def _reference(self, item: Item) -> tuple[Any, Any]:
        """The inputs of an item, and the unpruned model's answer (1, T)."""
        if self._whole is None or self._whole[0] != self.key(item, None):
            with Image.open(io.BytesIO(item.content)) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
            inputs = self.inputs_of(image, item.question)
            with torch.no_grad():
                sequences = self._generate(inputs)
            answer = sequences[:, inputs["input_ids"].shape[1] :]
            self._whole = self.key(item, None), inputs, answer
        return self._whole[1:]

    def _generate(self, inputs: Any) -> Any:
        return self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)

    def _text(self, tokens: Any) -> str:
        return str(self.processor.batch_decode(tokens, skip_special_tokens=True)[0]).strip()

    def _visual_tokens(self, inputs: Any) -> int:
        token = getattr(self.model.config, "image_token_id", None)
        return int((inputs["input_ids"] == token).sum())

    def _forced(self, inputs: Any, answer: torch.Tensor) -> tuple[float, float]:
        """Mean log-probability of the answer, and the share of first choices, in one forward."""
        length = answer.shape[1]
        longer = dict(inputs)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in longer:
                column = longer[name]
                more = answer if name == "input_ids" else torch.ones_like(answer)
                if name == "mm_token_type_ids":
                    more = torch.zeros_like(answer)
                longer[name] = torch.cat([column, more.to(column.dtype)], dim=1)
        # The answer is the end of the prompt, so its columns are the last ones, pruned or not.
        logits = self.model(**longer).logits[:, -length - 1 : -1].float()
        chances = logits.log_softmax(dim=-1)
        own = chances.gather(2, answer.unsqueeze(-1)).mean()
        return float(own), float((logits.argmax(dim=-1) == answer).float().mean())


def _identity(model: Any, name: str, max_new_tokens: int) -> str:
    """Hash of what answers depend on: the weights, the model's code and this package's version."""
    digest = hashlib.sha256()
    directory = Path(name)
    if directory.is_dir():
        for file in sorted(p for p in directory.iterdir() if p.is_file()):
            digest.update(file.name.encode())
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
    else:
        digest.update(f"{name} {getattr(model.config, '_commit_hash', None)}".encode())
    about = {
        "vispruner_cuda": vispruner_cuda.__version__,
        "dtype": str(model.dtype),
        "attention": model.config._attn_implementation,
        "max_new_tokens": max_new_tokens,
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()[:16]
