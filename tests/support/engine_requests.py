"""The same requests for an engine and for transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import vispruner

SIZES = ((112, 112), (168, 224), (112, 280), (140, 84))  # height, width
LARGE = 101  # the picture of this number is larger than the tiles of LLaVA-OneVision here
THIN, TALL = 102, 103  # pictures of one row and of one column of pixels
WIDE = 100  # the picture of this number is a strip: 2 x 100 merged tokens of 28 pixels
FRAMES = 4
# 1.5 s per pair of frames, or 3 positions of Qwen2.5-VL. More than 3, and the text after a video
# continues at other positions in vLLM than in transformers, pruned or not.
FPS = 4 / 3
SIDE = 112  # of a frame: 16 merged tokens where patches have 14 pixels


def picture(number: int) -> Image.Image:
    """Noise, of one of four sizes."""
    values = np.random.default_rng(number)
    special = {WIDE: (56, 2800), LARGE: (448, 448), THIN: (1, 190), TALL: (190, 1)}
    height, width = special.get(number, SIZES[number % len(SIZES)])
    return Image.fromarray(values.integers(0, 255, (height, width, 3), dtype=np.uint8))


def smooth_picture(number: int) -> Image.Image:
    """Large soft spots, as in a photograph out of focus: neighbouring patches are similar."""
    height, width = SIZES[number % len(SIZES)]
    spots = np.random.default_rng(number).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC)


def clip_of_frames(number: int) -> Any:
    """A video in vLLM's format: frames and metadata."""
    frames = np.random.default_rng(100 + number).integers(
        0, 255, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8
    )
    return frames, {
        "fps": FPS, "duration": FRAMES / FPS, "total_num_frames": FRAMES,
        "frames_indices": list(range(FRAMES)), "video_backend": "opencv",
        "do_sample_frames": False,
    }  # fmt: skip


_IMAGE = {
    "internvl": "<IMG_CONTEXT>",
    "llava": "<image>",
    "qwen": "<|vision_start|><|image_pad|><|vision_end|>",
}
_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@dataclass(frozen=True)
class Request:
    """A prompt with images and videos.

    Attributes:
        text: with {image} and {video} at their places.
        images, videos: numbers of pictures and videos.
        k: of the request, None for the engine's.
    """

    text: str
    images: Sequence[int] = ()
    videos: Sequence[int] = field(default=())
    k: int | None = None

    def prompt(self, family: str) -> str:
        image = next((own for kind, own in _IMAGE.items() if family.startswith(kind)), "<image>")
        return self.text.replace("{image}", image).replace("{video}", _VIDEO)

    def for_engine(self, family: str) -> dict[str, Any]:
        data: dict[str, Any] = {}
        if self.images:
            data["image"] = [picture(number) for number in self.images]
        if self.videos:
            data["video"] = [clip_of_frames(number) for number in self.videos]
        request: dict[str, Any] = {"prompt": self.prompt(family)}
        if data:
            request["multi_modal_data"] = data
        if self.k is not None:
            request["mm_processor_kwargs"] = {"vispruner": {"k": self.k}}
        return request

    def for_transformers(self, family: str, processor: Any) -> Any:
        call: dict[str, Any] = {"text": [self.prompt(family)], "return_tensors": "pt"}
        if self.images:
            call["images"] = [picture(number) for number in self.images]
        if self.videos:
            videos = [clip_of_frames(number) for number in self.videos]
            call["videos"] = [frames for frames, _ in videos]
            call["video_metadata"] = [
                {k: v for k, v in metadata.items() if k != "do_sample_frames"}
                for _, metadata in videos
            ]
            call["do_sample_frames"] = False
        return processor(**call)


class Transformers:
    """The checkpoint in transformers, pruned by `vispruner.apply`.

    Args:
        adapted: whether it has the adapter of `save_adapter` merged into it.
    """

    def __init__(self, family: str, folder: Path, *, adapted: bool = False) -> None:
        self._family = family
        self._processor = transformers.AutoProcessor.from_pretrained(folder)
        self._model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self._model.generation_config.eos_token_id = None  # as with ignore_eos
        self._known: dict[str, tuple[int, list[int]]] = {}
        if adapted:
            for weight, down, up in self._adapter().values():
                weight.data += up @ down

    def _adapter(self) -> dict[str, tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]]:
        """The weight of each query projection of the language model, and a random change of it."""
        random = torch.Generator().manual_seed(1)
        return {
            name: (
                weight,
                torch.randn(4, weight.shape[1], generator=random) * 0.2,
                torch.randn(weight.shape[0], 4, generator=random) * 0.2,
            )
            for name, weight in self._model.named_parameters()
            if "language_model" in name and name.endswith("q_proj.weight")
        }

    def save_adapter(self, folder: Path) -> Path:
        """Saves a LoRA adapter as PEFT does."""
        tensors = {}
        for name, (_, down, up) in self._adapter().items():
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = down
            tensors[f"{module}.lora_B.weight"] = up
        save_file(tensors, folder / "adapter_model.safetensors")
        options = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(options))
        return folder

    def __call__(
        self, requests: Sequence[Request], k: int | None, length: int = 16, **budget: float
    ) -> list[tuple[int, list[int]]]:
        """Columns of the (pruned) prompt and tokens of the answer, for each request.

        Args:
            k: for requests without k, None to prune nothing then.
            budget: other arguments of `vispruner.apply`.
        """
        answers = []
        for request in requests:
            key = repr((request, request.k or k, length, budget))
            if key not in self._known:
                self._known[key] = self._answer(request, request.k or k, length, budget)
            answers.append(self._known[key])
        return answers

    def _answer(
        self, request: Request, k: int | None, length: int, budget: dict[str, float]
    ) -> tuple[int, list[int]]:
        inputs = request.for_transformers(self._family, self._processor)
        prompt = inputs["input_ids"].shape[1]
        call = {**inputs, "max_new_tokens": length, "do_sample": False}
        options: dict[str, Any] = dict(budget)
        if "ratio" not in budget:
            options["k"] = k
        if self._family.startswith("llava_next"):
            options["tiles"] = "all"
        columns = prompt
        with torch.no_grad():
            if options.get("k") is None and "ratio" not in budget:
                output = self._model.generate(**call)
            else:
                with vispruner.apply(self._model, **options) as pruner:
                    output = self._model.generate(**call)
                if pruner.last is not None:  # the prompt has images
                    columns = pruner.last.prompt_after
        return columns, output[0, prompt:].tolist()


K = 8
ALL = 256  # at least the tokens of any picture here

ONE = Request("USER: {image}what is in the image? ASSISTANT:", [1])
OTHER = Request("USER: {image}what is in the image? ASSISTANT:", [2])
TWO = Request("USER: {image} and {image} describe the picture ASSISTANT:", [1, 2])
NONE = Request("USER: what is in the image? ASSISTANT:")
VIDEO = Request("USER: {video} describe ASSISTANT:", videos=[0])
BOTH = Request("USER: {video} and {image} in detail, {image} ASSISTANT:", [1, 3], [0])


def requests_of(family: str) -> list[Request]:
    videos = [VIDEO, BOTH] if family.startswith("qwen") else []
    return [ONE, OTHER, TWO, NONE, *videos]


def limits(family: str) -> dict[str, int]:
    return {"image": 2, "video": 1} if family.startswith("qwen") else {"image": 2}


def asked(
    run: Any, family: str, requests: list[Request], length: int = 16, **options: Any
) -> list[Any]:
    return run([request.for_engine(family) for request in requests], length, **options)
