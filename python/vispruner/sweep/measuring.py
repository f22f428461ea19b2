"""Asks a model about pictures, unpruned and under each setting."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
        answer: decoded greedily; tokens: its ids, empty from a server.
        log_probability: mean over the tokens of the unpruned model's answer, given by this model;
            None from a server that does not return it.
        first_choices: share of those tokens that are this model's first choice as well, or None.
        visual_tokens: in the prompt.
        cache_bytes: of the prompt's keys and values, None from a server.
        milliseconds: "first token", and unless it is from a server "vision", "prune" and "prefill".
    """

    answer: str
    tokens: list[int]
    log_probability: float | None
    first_choices: float | None
    visual_tokens: int
    cache_bytes: int | None
    milliseconds: dict[str, float]

    def data(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Failed:
    """A question that could not be measured, with the reason in one line."""

    reason: str


@dataclass(frozen=True)
class _Prompt:
    """The prompt of the language model: visual tokens, all tokens, and the times until then."""

    visual: int
    tokens: int
    milliseconds: dict[str, float]


class Swept(ABC):
    """A model that is swept, here or on a server.

    Attributes:
        identity: hash of what its answers and times depend on.
    """

    identity: str

    def key(self, item: Item, budget: Budget | None) -> str:
        """Hash of the model, picture, question and setting, on which a measurement depends."""
        parts = (self.identity, item.picture, item.question, repr(budget))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

    @abstractmethod
    def measure(
        self,
        items: Sequence[Item],
        budget: Budget | None,
        references: Sequence[Measurement] | None = None,
    ) -> list[Measurement | Failed]:
        """Questions under a setting, answered at the same time.

        Args:
            budget: None is the unpruned model.
            references: of the unpruned model, for a setting.
        """


class Subject(Swept):
    """A model of transformers.

    Times, visual tokens and bytes are those of a single question, whatever the batch size: in
    a batch of several, each question is timed in a separate call.

    Args:
        model, processor: of transformers, in eval mode.
        inputs_of: the model's inputs for a batch of items, padded on the left.
        name: of the model as it was loaded: a directory or a name on the hub.
        max_new_tokens: length of the longest answer.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        inputs_of: Callable[[Sequence[Item]], Any],
        name: str,
        max_new_tokens: int,
    ) -> None:
        self.model, self.processor, self.inputs_of = model, processor, inputs_of
        self.max_new_tokens = max_new_tokens
        self.identity = _identity(model, name, max_new_tokens)
        names = ("image_token_id", "video_token_id")
        ids = (getattr(model.config, name, None) for name in names)
        # An answer with a placeholder could not be read again. Only random models give one.
        self._placeholders = [token for token in ids if token is not None]
        self._warm = False
        self._batch: tuple[Item, ...] = ()
        self._inputs: dict[tuple[Item, ...], Any] = {}  # of the batch, and of its items

    def measure(
        self,
        items: Sequence[Item],
        budget: Budget | None,
        references: Sequence[Measurement] | None = None,
    ) -> list[Measurement | Failed]:
        try:
            return list(self._measure(items, budget, references))
        except (ValueError, TypeError, RuntimeError) as error:
            if len(items) == 1:
                return [Failed(" ".join(str(error).split()) or type(error).__name__)]
        # A picture cannot be used, or the batch does not fit into memory.
        alone = [[one] for one in references] if references else [None] * len(items)
        return [self.measure([i], budget, r)[0] for i, r in zip(items, alone, strict=True)]

    def _measure(
        self,
        items: Sequence[Item],
        budget: Budget | None,
        references: Sequence[Measurement] | None,
    ) -> list[Measurement]:
        inputs = self._inputs_of(items)
        with torch.no_grad():
            if not self._warm:  # the first call is slower than later ones
                self._ask(self._inputs_of(items[:1]), None, 1)
                self._warm = True
            rows, prompt = self._ask(inputs, budget, self.max_new_tokens)
            prompts = [prompt]
            if len(items) > 1:
                prompts = [self._ask(self._inputs_of([i]), budget, 1)[1] for i in items]
            answers = [self._ended(row) for row in rows.tolist()]
            forced = self._forced(
                inputs, budget, [r.tokens for r in references] if references else answers
            )
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        element = self.model.dtype.itemsize
        return [
            Measurement(
                str(text).strip(),
                answer,
                *given,
                prompt.visual,
                flops.cache_bytes(self.model.config, prompt.tokens, element),
                prompt.milliseconds,
            )
            for text, answer, given, prompt in zip(texts, answers, forced, prompts, strict=True)
        ]

    def _inputs_of(self, items: Sequence[Item]) -> Any:
        key = tuple(items)
        if key not in self._inputs:
            if not set(key) <= set(self._batch):
                self._batch, self._inputs = key, {}
            self._inputs[key] = self.inputs_of(items)
        return self._inputs[key]

    def _ask(self, inputs: Any, budget: Budget | None, length: int) -> tuple[Tensor, _Prompt]:
        """The new tokens of each row, and what the language model read."""
        columns = inputs["input_ids"].shape[1]
        suppressed = [*(self.model.generation_config.suppress_tokens or ()), *self._placeholders]
        call = {
            **inputs,
            "max_new_tokens": length,
            "do_sample": False,
            "suppress_tokens": suppressed,
        }
        if budget is None:
            with unpruned(self.model) as clock:
                sequences = self.model.generate(**call)
            milliseconds = clock.milliseconds()
            visual = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
            tokens = columns
        else:
            with apply(self.model, budget) as pruner:
                sequences = self.model.generate(**call)
            assert pruner.last is not None
            milliseconds = pruner.last.milliseconds
            visual, tokens = pruner.last.tokens_after, pruner.last.prompt_after
        phases = phases_of(milliseconds)
        times = {name: phases[name] for name in ("vision", "prune", "prefill")}
        times["first token"] = sum(times.values())
        return sequences[:, columns:], _Prompt(visual, tokens, times)

    def _ended(self, row: list[int]) -> list[int]:
        """An answer up to its end; the rest of its row is padding."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        return row[:length]

    def _forced(
        self, inputs: Any, budget: Budget | None, answers: Sequence[list[int]]
    ) -> list[tuple[float, float]]:
        """Of each answer the mean log-probability and the share of first choices: one forward."""
        most = max(map(len, answers))
        call = {"logits_to_keep": most + 1, **_extended(inputs, answers)}
        if budget is None:
            logits = self.model(**call).logits
        else:
            with apply(self.model, budget):
                logits = self.model(**call).logits
        found = []
        for row, answer in zip(logits, answers, strict=True):
            # Answers end in the last column, pruned or not.
            scores = row[-len(answer) - 1 : -1].float()
            scores[:, self._placeholders] = -torch.inf
            chances = scores.log_softmax(dim=-1)
            given = torch.tensor(answer, device=row.device)
            own = chances.gather(1, given.unsqueeze(-1)).mean()
            first = (chances.argmax(dim=-1) == given).float().mean()
            found.append((float(own), float(first)))
        return found


def _extended(inputs: Any, answers: Sequence[list[int]]) -> dict[str, Any]:
    """Inputs with an answer after each prompt. Padding goes to the left."""
    ids = inputs["input_ids"]
    most = max(map(len, answers))
    longer = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            continue
        rows = []
        for row, answer in zip(value, answers, strict=True):
            if name == "input_ids":
                after = torch.tensor(answer, dtype=row.dtype, device=row.device)
            else:  # other arguments are 0 for text, except for the mask
                after = row.new_full((len(answer),), int(name == "attention_mask"))
            # Masked columns may hold any token that is not a placeholder, such as the answer's.
            before = after.new_full((most - len(answer),), answer[0] if name == "input_ids" else 0)
            rows.append(torch.cat([before, row, after]))
        longer[name] = torch.stack(rows)
    return longer


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _identity(model: Any, name: str, max_new_tokens: int) -> str:
    """Hash of what a measurement depends on: the weights, how the model runs, and this package's
    version."""
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
        "device": _device_name(model.device),
        "attention": model.config._attn_implementation,
        "max_new_tokens": max_new_tokens,
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    return digest.hexdigest()[:16]
