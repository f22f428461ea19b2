"""An OpenAI-compatible server with this package's vLLM plugin, as the model of a sweep."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from typing import Any

from PIL import Image

import vispruner_cuda

from ..selection import Budget
from .client import Client, RefusedError, ServerError
from .data import DataError, Item
from .measuring import Failed, Measurement, Swept

_TOO_MANY = 2**30  # more tokens than any engine allows
_OF_THE_PICTURE = (400, 413, 422)  # status of requests that fail because of their content
_HEADERS = "vispruner.vllm.headers.TokenHeaders"


@dataclass(frozen=True)
class _Reply:
    """The start of an answer: visual tokens before and after pruning, and the budget."""

    before: int
    kept: int
    budget: Budget

    @classmethod
    def of(cls, headers: Message, url: str) -> _Reply:
        try:
            before, kept = (int(headers[f"vispruner-tokens-{n}"]) for n in ("before", "kept"))
            return cls(before, kept, Budget(**json.loads(headers["vispruner-budget"])))
        except (KeyError, TypeError, ValueError):
            raise ServerError(
                f"{url} does not say which tokens it retains: start vLLM with this package, "
                f"--hf-overrides and --middleware {_HEADERS} (docs/serving.md)"
            ) from None


class Served(Swept):
    """A model on a server, which prunes each request to its own k (or ratio).

    Args:
        url: of the server.
        model: its name there, None for the first one.
        picture_of: reads the picture of an item; raises DataError.
        max_new_tokens: length of the longest answer.
        timeout: seconds to wait for a part of an answer.
        concurrency: number of concurrent requests, on which durations depend.

    Attributes:
        name: of the model; version: of the server.
        unit: "k" or "ratio", which its requests may set; most: the largest value.
        method: name and parameters of the method of selection.
        tokens: visual tokens of a small picture.

    Raises:
        ServerError: it cannot be reached, has no such model, does not prune, or cannot answer
            unpruned.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        picture_of: Callable[[Item], Image.Image],
        max_new_tokens: int,
        timeout: float = 300,
        concurrency: int = 1,
    ) -> None:
        self._client = Client(url, timeout)
        self._picture_of, self._max_new_tokens = picture_of, max_new_tokens
        self._batch: tuple[Item, ...] = ()
        self._urls: dict[Item, str] = {}  # of the batch's pictures
        about = self._model(model)
        self.name = str(about["id"])
        try:
            self.version = str(self._client.get("/version").get("version"))
        except ServerError:  # not of vLLM
            self.version = "unknown"
        self.unit, self.most, reply = self._limits()
        self.tokens = reply.before
        self.method = reply.budget.parameters
        known = {name: about.get(name) for name in ("id", "root", "max_model_len")}
        known |= {"version": self.version, "vispruner_cuda": vispruner_cuda.__version__}
        known |= {"max_new_tokens": max_new_tokens, "concurrency": concurrency}
        self.identity = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def url(self) -> str:
        return self._client.url

    def _model(self, name: str | None) -> Mapping[str, Any]:
        found = self._client.get("/v1/models").get("data")
        entries = found if isinstance(found, list) else []
        models = [m for m in entries if isinstance(m, dict) and "id" in m]
        if not models:
            raise ServerError(f"{self.url} has no models: is it an OpenAI server?")
        for one in models:
            if name in (None, one["id"]):
                return one
        there = ", ".join(str(one["id"]) for one in models)
        raise ServerError(f"{self.url} has no model {name!r}, it has {there}")

    def _limits(self) -> tuple[str, float, _Reply]:
        """The unit of requests, its largest value, and a reply with that."""
        picture = _data_url(Image.new("RGB", (112, 112), "gray"))

        def ask(unit: str, amount: float) -> _Reply:
            body = self._body(picture, "?", unit, amount) | {"max_completion_tokens": 1}
            return _Reply.of(self._client.post("/v1/chat/completions", body)[1], self.url)

        unit, most = "k", float(_TOO_MANY)
        for _ in range(3):  # each refusal gives more information
            try:
                reply = ask(unit, most)
                break
            except RefusedError as error:
                above = re.search(r"is more than this engine's ([\d.]+)", error.reason)
                if above:
                    most = float(above[1])
                elif unit == "k" and "unknown option 'k'" in error.reason:
                    unit, most = "ratio", 1.0
                else:
                    raise
        else:
            raise ServerError(f"{self.url} accepts neither vispruner_k nor vispruner_ratio")
        if reply.kept < reply.before:
            raise ServerError(
                f"{self.url} cannot answer unpruned: it retains at most {reply.kept} of "
                f"{reply.before} visual tokens; start it with "
                + (f'"max_k": {reply.before} or more' if unit == "k" else '"max_ratio": 1.0')
            )
        return unit, most, reply

    def _body(self, picture: str, question: str, unit: str, amount: float) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": question},
        ]
        return {
            "model": self.name,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_completion_tokens": self._max_new_tokens,
            "vllm_xargs": {f"vispruner_{unit}": int(amount) if unit == "k" else float(amount)},
        }

    def measure(
        self,
        items: Sequence[Item],
        budget: Budget | None,
        references: Sequence[Measurement] | None = None,
    ) -> list[Measurement | Failed]:
        """See Swept: each question is a request.

        Raises:
            ServerError: the server fails; questions that it refuses are Failed instead.
        """
        if not set(items) <= set(self._batch):
            self._batch, self._urls = tuple(items), {}
        given: Sequence[Measurement | None] = references or [None] * len(items)
        budgets = [budget] * len(items)
        if len(items) == 1:
            return [self._measure(items[0], budget, given[0])]
        with ThreadPoolExecutor(len(items)) as pool:
            return list(pool.map(self._measure, items, budgets, given))

    def _measure(
        self, item: Item, budget: Budget | None, reference: Measurement | None
    ) -> Measurement | Failed:
        try:
            if item not in self._urls:
                self._urls[item] = _data_url(self._picture_of(item))
            return self._ask(item, budget, reference)
        except DataError as error:
            return Failed(str(error))
        except RefusedError as error:
            if error.status not in _OF_THE_PICTURE or error.reason.startswith("vispruner:"):
                raise
            return Failed(str(error))

    def _ask(self, item: Item, budget: Budget | None, reference: Measurement | None) -> Measurement:
        amount: Any = self.most if budget is None else getattr(budget, self.unit)
        body = self._body(self._urls[item], item.question, self.unit, amount)
        events, headers = self._client.stream("/v1/chat/completions", {**body, "stream": True})
        reply = _Reply.of(headers, self.url)
        if budget is None and reply.kept < reply.before:
            raise DataError(
                f"{reply.before} visual tokens, of which the server retains at most {reply.kept}: "
                f"start it with a larger max_{self.unit}"
            )
        pieces = [
            (spent, str(choice["delta"].get("content") or ""))
            for spent, event in events
            for choice in event.get("choices", ())
        ]
        answer = "".join(piece for _, piece in pieces).strip()
        first = next((spent for spent, piece in pieces if piece), events[-1][0] if events else 0.0)
        log_probability, first_choices = self._forced(
            body, answer if reference is None else reference.answer
        )
        return Measurement(
            answer, [], log_probability, first_choices, reply.kept, None, {"first token": first}
        )

    def _forced(self, body: Mapping[str, Any], answer: str) -> tuple[float | None, float | None]:
        """Mean log-probability of an answer and the share of first choices: one request, with the
        answer as the end of its prompt. None where the server does not return them."""
        said = {"role": "assistant", "content": answer}
        longer = {
            **body,
            "messages": [*body["messages"], said],
            "add_generation_prompt": False,
            "continue_final_message": True,
            "prompt_logprobs": 0,
            "max_completion_tokens": 1,
        }
        try:
            found = self._client.post("/v1/chat/completions", longer)[0].get("prompt_logprobs")
        except RefusedError as error:
            if error.status not in _OF_THE_PICTURE:
                raise
            return None, None
        tokens = _last_tokens(found or [], answer)
        if not tokens:
            return None, None
        return (
            statistics.fmean(float(token["logprob"]) for token in tokens),
            statistics.fmean(float(token["rank"] == 1) for token in tokens),
        )


def _last_tokens(prompt: Sequence[Any], text: str) -> list[Any]:
    """The tokens at the end of a prompt that form a text, ignoring spaces; none if they do not."""
    wanted, found, tokens = "".join(text.split()), "", []
    for entry in reversed(prompt):
        if len(found) >= len(wanted) or not entry:
            break
        token = next(iter(entry.values()))
        found = "".join(str(token.get("decoded_token") or "").split()) + found
        tokens.append(token)
    return tokens if found == wanted else []


def _data_url(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
