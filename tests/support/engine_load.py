"""Mixed traffic: text and images, every k, broken images, and clients that disconnect."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openai

from .engine_requests import smooth_picture
from .engine_traffic import chat, image_part

LONGER = 20  # factor of the answer's length for clients that disconnect
PICTURES = 24  # fewer than requests, so that requests share images with different k

_DATA = "data:image/png;base64,"


@dataclass(frozen=True)
class Job:
    """A request and the behaviour of its client.

    Attributes:
        kind: "text", "image", "broken" (an invalid image) or "refused" (k above the cap).
        images: numbers of images, odd ones noise and even ones smooth; k: of the request, None for
            the engine's; text: the question.
        leaves: None, "streaming" (the client disconnects after the first token) or the seconds
            after which it disconnects.
    """

    kind: str
    images: tuple[int, ...] = ()
    k: int | None = None
    text: str = ""
    leaves: str | float | None = None

    def call(self, length: int) -> dict[str, Any]:
        """Arguments of the chat completion, for an answer of `length` tokens."""
        pictures = [smooth_picture(n) if n % 2 == 0 else n for n in self.images]
        parts = []
        if self.kind == "broken":
            parts = [{"type": "image_url", "image_url": {"url": _broken(self.images[0])}}]
            pictures = []
        if self.leaves is not None:
            length *= LONGER
        call = chat(*pictures, k=self.k, text=self.text, length=length, parts=parts)
        return {**call, "stream": True, "stream_options": {"include_usage": True}}


def _broken(number: int) -> str:
    """An invalid image."""
    url: str = image_part(number)["image_url"]["url"]
    whole = base64.b64decode(url.removeprefix(_DATA))
    cut = base64.b64encode(whole[: len(whole) // 2]).decode()
    return (_DATA + cut, f"{_DATA}{base64.b64encode(b'GIF89a').decode()}", f"{_DATA}%%%")[
        number % 3
    ]


def mix(count: int, most: int, pictures: int = PICTURES) -> list[Job]:
    """The jobs of a run, equal in every run.

    Args:
        most: the engine's cap. Each client that disconnects at a random time has a different k, so
            that counters by k show which requests the engine had accepted.
        pictures: number of different images.
    """
    random = np.random.default_rng(0)
    early = count // 20
    shared = most - early
    jobs = []
    for number in range(count):
        text = f"what is in the image? {number % 5}"
        images = tuple(int(n) for n in random.integers(0, pictures, 1 + number % 2))
        k = None if number % 10 == 3 else int(random.integers(1, shared + 1))
        place = number % 20
        if place in (0, 10):
            jobs.append(Job("broken", images[:1], k, text))
        elif place == 1:
            jobs.append(Job("refused", images, most + 1, text))
        elif place in (2, 7, 12):
            jobs.append(Job("text", (), k, text))
        elif place == 4:
            jobs.append(Job("image", images, k, text, "streaming"))
        elif place == 14:
            own = shared + 1 + number // 20
            jobs.append(Job("image", images, own, text, float(random.uniform(0.001, 0.5))))
        else:
            jobs.append(Job("image", images, k, text))
    return jobs


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job.

    Attributes:
        status: of the HTTP answer, 0 if the client disconnected before it.
        text: of a complete answer; message: of an error.
        prompt: tokens of the prompt as the server counts them; first: seconds to the first token.
    """

    status: int
    text: str = ""
    message: str = ""
    prompt: int = 0
    first: float = 0.0


async def ask(client: openai.AsyncOpenAI, job: Job, length: int) -> Outcome:
    """Runs one job."""
    start = time.perf_counter()
    call = client.chat.completions.create(**job.call(length))
    try:
        if isinstance(job.leaves, float):
            stream = await asyncio.wait_for(call, job.leaves)
            await stream.close()
            return Outcome(200)
        stream = await call
    except asyncio.TimeoutError:
        return Outcome(0)
    except openai.APIStatusError as error:
        return Outcome(error.status_code, message=str(error))
    text, prompt, first = "", 0, 0.0
    async for chunk in stream:
        if chunk.choices and not first:  # sent with the first token, even if its text is empty
            first = time.perf_counter() - start
            if job.leaves:
                await stream.close()
                return Outcome(200, first=first)
        if chunk.choices and chunk.choices[0].delta.content:
            text += chunk.choices[0].delta.content
        if chunk.usage is not None:
            prompt = chunk.usage.prompt_tokens
    return Outcome(200, text, prompt=prompt, first=first)


async def ask_all(
    client: openai.AsyncOpenAI, jobs: Sequence[Job], length: int, concurrency: int
) -> list[Outcome]:
    """Runs all jobs, `concurrency` at a time."""
    gate = asyncio.Semaphore(concurrency)

    async def one(job: Job) -> Outcome:
        async with gate:
            return await ask(client, job, length)

    return await asyncio.gather(*map(one, jobs))
