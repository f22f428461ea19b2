"""Asks a model about a picture, unpruned and under each setting."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
        answer: decoded greedily; tokens: its ids.
        log_probability: mean over the tokens of the unpruned model's answer, given by this model.
        first_choices: share of those tokens that are this model's first choice as well.
        visual_tokens: in the prompt.
        cache_bytes: of the prompt's keys and values.
        milliseconds: "vision", "prune", "prefill", "decode", "first token" and "total".
    """

    answer: str
    tokens: list[int]
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
        inputs_of: the model's inputs for an item.
        name: of the model as it was loaded: a directory or a name on the hub.
        max_new_tokens: length of the longest answer.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        inputs_of: Callable[[Item], Any],
        name: str,
        max_new_tokens: int,
    ) -> None:
        self.model, self.processor, self.inputs_of = model, processor, inputs_of
        self.max_new_tokens = max_new_tokens
        self.identity = _identity(model, name, max_new_tokens)
        self._latest: tuple[Item, Any] | None = None  # an item and its inputs

    def key(self, item: Item, budget: Budget | None) -> str:
        """Hash of the model, picture, question and setting, on which a measurement depends."""
        parts = (self.identity, item.picture, item.question, repr(budget))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

    def measure(
        self, item: Item, budget: Budget | None, unpruned_answer: Sequence[int] = ()
    ) -> Measurement:
        """A question under a setting.

        Args:
            budget: None is the unpruned model.
            unpruned_answer: the token ids of its answer, for a setting.

        Raises:
            ValueError, TypeError, RuntimeError: the picture cannot be used, or what `inputs_of`
                raises.
        """
        if self._latest is None or self._latest[0] is not item:
            self._latest = item, self.inputs_of(item)
        inputs = self._latest[1]
        columns = inputs["input_ids"].shape[1]
        with ExitStack() as stack, torch.no_grad():
            if budget is None:
                clock = stack.enter_context(unpruned(self.model))
                answer = self._generate(inputs)[:, columns:]
                times = phases_of(clock.milliseconds())
                visual = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
                prompt, reference = columns, answer
            else:
                pruner = stack.enter_context(apply(self.model, budget))
                answer = self._generate(inputs)[:, columns:]
                last = pruner.last
                assert last is not None
                times = phases_of(last.milliseconds)
                visual, prompt = last.tokens_after, last.prompt_after
                reference = torch.tensor([list(unpruned_answer)], device=answer.device)
            log_probability, first = self._forced(inputs, reference)
        times["first token"] = times["vision"] + times["prune"] + times["prefill"]
        return Measurement(
            str(self.processor.batch_decode(answer, skip_special_tokens=True)[0]).strip(),
            answer[0].tolist(),
            log_probability,
            first,
            visual,
            flops.cache_bytes(self.model.config, prompt, self.model.dtype.itemsize),
            times,
        )

    def _generate(self, inputs: Any) -> Any:
        return self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)

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
