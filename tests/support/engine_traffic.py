"""Chat completions about numbered images and videos, for a server with the tests' models."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from .engine_requests import clip_of_frames, picture

QUESTION = "what is in the image?"


def _base64(image: Image.Image, kind: str) -> str:
    data = io.BytesIO()
    image.save(data, kind)
    return base64.b64encode(data.getvalue()).decode()


def image_part(image: int | Image.Image) -> dict[str, Any]:
    """An image, given directly or by its number, as a part of a message."""
    image = picture(image) if isinstance(image, int) else image
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{_base64(image, 'PNG')}"},
    }


def video_part(number: int) -> dict[str, Any]:
    """The frames of a video, in vLLM's format without a container."""
    frames, _ = clip_of_frames(number)
    encoded = ",".join(_base64(Image.fromarray(frame), "JPEG") for frame in frames)
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{encoded}"}}


def chat(
    *images: int | Image.Image,
    k: Any = None,
    text: str = QUESTION,
    length: int = 6,
    parts: Sequence[dict[str, Any]] = (),
    **more: Any,
) -> dict[str, Any]:
    """Arguments of a chat completion.

    Args:
        images: in the message; parts: further parts of the message.
        k: of the request, None for the engine's.
        length: tokens of the answer; more: other arguments.
    """
    content = [*map(image_part, images), *parts, {"type": "text", "text": text}]
    body: dict[str, Any] = {"ignore_eos": True}
    if k is not None:
        body["vllm_xargs"] = {"vispruner_k": k}
    return {
        "model": "tiny", "messages": [{"role": "user", "content": content}],
        "max_tokens": length, "temperature": 0, "extra_body": body, **more,
    }  # fmt: skip
