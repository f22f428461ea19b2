"""Shared by the commands: arguments of a budget, reading images, loading models."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..hf import Pruner
    from ..selection import Budget

# torch takes seconds to import, so it is imported only where it is used, and not for --help.

DTYPES = ("float32", "float16", "bfloat16")


class CommandError(Exception):
    """Invalid input; the message is the one line that the user sees."""


def one_line(error: BaseException) -> str:
    """The message of an error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def utf8(argument: str) -> str:
    """An argument that a tokenizer can read: bytes that are not UTF-8 arrive as surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("not UTF-8") from error
    return argument


def _k(text: str) -> int | str:
    return text if text == "auto" else int(text)


_k.__name__ = "whole number or auto"


# ------------------------------------------------------------------------------------ the budget
#: The methods of selection, and the option of each parameter: type, method, default and help.
#: Those of vispruner_cuda.methods, which cannot be imported without torch (a test compares them).
METHODS = ("vispruner", "topk", "random", "maxmin", "scope", "mmr")
PARAMETERS = {
    "important_ratio": (float, "vispruner", 0.5, "share of the retained tokens selected by score"),
    "step": (int, "vispruner", 8, "tokens that the deduplication drops per round"),
    "seed": (int, "random", 0, "seed of the random order"),
    "scope_alpha": (float, "scope", 1.0, "exponent of the importance, a multiple of 0.25"),
    "mmr_lambda": (float, "mmr", 1.0, "weight of the similarity to retained tokens"),
}


def _option(parameter: str) -> str:
    return "--" + parameter.replace("_", "-")


def add_budget(parser: argparse.ArgumentParser, *, k: int = 64) -> None:
    """--k or --ratio, --method and the parameters of the methods."""
    group = parser.add_argument_group("pruning")
    how_many = group.add_mutually_exclusive_group()
    # No default of argparse: it would be set together with --ratio.
    how_many.add_argument(
        "--k",
        type=_k,
        default=None,
        help=f"visual tokens to retain per picture, or auto: see --mass (default: {k})",
    )
    how_many.add_argument(
        "--ratio",
        type=float,
        default=None,
        help="or the share of them to retain, where pictures differ in size",
    )
    group.add_argument(
        "--mass",
        type=float,
        help="k = auto: share of the attention that decides k (default: 0.8)",
    )
    group.add_argument(
        "--max-k", type=int, metavar="K", help="k = auto: the largest k (default: no limit)"
    )
    group.add_argument(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help=f"which tokens to retain (default: {METHODS[0]})",
    )
    for name, (kind, method, default, text) in PARAMETERS.items():
        group.add_argument(
            _option(name),
            type=kind,
            metavar=name.rpartition("_")[2].upper(),
            help=f"{method}: {text} (default: {default})",
        )
    parser.set_defaults(default_k=k)


def budget_of(options: argparse.Namespace) -> Budget:
    from ..selection import Budget

    k = options.default_k if options.k is None and options.ratio is None else options.k
    given = {name: getattr(options, name, None) for name in (*PARAMETERS, "mass", "max_k")}
    try:
        return Budget(k, options.ratio, method=options.method, **given)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise CommandError(f"argument {_option(name)}: {rest}") from error


# ------------------------------------------------------------------------------------- the device
def add_device(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device",
        help="cpu, cuda, cuda:N, or auto to spread the model over all devices (default: cuda if "
        "available)",
    )
    group.add_argument(
        "--dtype",
        choices=[*DTYPES, "auto"],
        help="dtype of the model (default: float32 on the CPU, else the checkpoint's)",
    )
    group.add_argument(
        "--attention",
        choices=("sdpa", "eager", "flash_attention_2"),
        default="sdpa",
        help="attention implementation of the encoder and the language model",
    )


def device_of(options: argparse.Namespace) -> torch.device:
    """The device of the inputs."""
    import torch

    if options.device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise CommandError(f"argument --device: cannot use {options.device!r}: {reason}") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(
            f"argument --device: must be a cpu or cuda device, got {options.device!r}"
        )
    return device


def dtype_of(options: argparse.Namespace, device: torch.device) -> Any:
    import torch

    if options.dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, options.dtype) if options.dtype in DTYPES else "auto"


# -------------------------------------------------------------------------------------- the image
def read_image(source: Path | IO[bytes], name: str | None = None) -> Image.Image:
    """An RGB image, upright. Pillow's check for decompression bombs stays enabled.

    Args:
        source: a file; name: of it in errors, its path by default.
    """
    import warnings

    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                return _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except FileNotFoundError:
        reason = "no such file"
    except Exception as error:  # Pillow raises many kinds for broken files
        reason = one_line(error)
    raise CommandError(f"cannot read image {name or source}: {reason}")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Converts images with more than 8 bits per pixel to 8 bits; others are unchanged.

    Pillow clips such pixels to 0..255, which makes 16-bit images white and fractions black.
    Integers of more than 8 bits are scaled from 0..65535; others (float, or beyond that range) from
    their minimum to their maximum.
    """
    import numpy as np
    from PIL import Image

    if image.mode not in ("F", "I") and not image.mode.startswith("I;"):
        return image
    levels = np.asarray(image).astype(np.float64)
    if not np.isfinite(levels).all():
        raise ValueError("pixels that are not finite")
    low, high = float(levels.min()), float(levels.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        high, low = 1.0, 0.0
    elif image.mode != "F" and low >= 0 and high <= 65535:
        high, low = (65535.0, 0.0) if high > 255 else (255.0, 0.0)
    scaled = (levels - low) * (255 / (high - low) if high > low else 0.0)
    return Image.fromarray(scaled.round().astype(np.uint8))


def check_picture_path(path: Path) -> None:
    """Raises CommandError, before any work is done, if Pillow cannot write to the path."""
    from PIL import Image

    if path.is_dir() or not path.parent.is_dir():
        raise CommandError(f"argument -o: cannot write {path}: no such directory, or it is one")
    Image.init()
    format_ = Image.registered_extensions().get(path.suffix.lower())
    if format_ not in Image.SAVE:
        raise CommandError(
            f"argument -o: cannot write {path}: unknown image format {path.suffix!r}"
        )
    there = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise CommandError(f"argument -o: cannot write {path}: {reason}") from error
    if not there:
        path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------- the model
def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help="a directory, or a name on the Hugging Face hub such as llava-hf/llava-1.5-7b-hf "
        "(default: the small bundled model)",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code from the checkpoint: only for publishers you trust",
    )


def quiet() -> None:
    """Silences transformers: errors are reported in one line, by a CommandError."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def load_model(options: argparse.Namespace, device: torch.device) -> tuple[Any, Any]:
    """The model, in eval mode on its device, and its processor.

    Only safetensors files are read: loading them cannot run code.
    """
    import transformers

    from .. import embedded

    quiet()
    # Loosely typed in transformers, differently in each release.
    auto: Any = transformers.AutoModelForImageTextToText
    name = options.model or embedded.path()
    common = {"trust_remote_code": options.trust_remote_code}
    try:
        model, info = auto.from_pretrained(
            name,
            dtype=dtype_of(options, device),
            device_map="auto" if options.device == "auto" else None,
            attn_implementation=options.attention,
            use_safetensors=True,
            output_loading_info=True,
            **common,
        )
        processor = transformers.AutoProcessor.from_pretrained(name, **common)
    except Exception as error:  # hub, file, JSON and safetensors errors have no common base
        flash = options.attention == "flash_attention_2" and "flash" in str(error).lower()
        option = "--attention" if flash else "--model"
        reason = one_line(error)
        raise CommandError(f"argument {option}: cannot load {name!r}: {reason}") from error
    absent = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
    if absent:  # transformers would fill them with random values
        raise CommandError(
            f"argument --model: {name!r} lacks {len(absent)} of its weights, such as {absent[0]}"
        )
    if options.device != "auto":
        model = model.to(device)
    return model.eval(), processor


def apply_budget(model: Any, budget: Budget) -> Pruner:
    """`vispruner.apply` with the budget of the command line."""
    from ..hf import apply

    return apply(model, budget)


def model_inputs(processor: Any, image: Image.Image, question: str, device: torch.device) -> Any:
    """The model's inputs for one image and a question, from its chat template if it has one.

    Without a template, the prompt has LLaVA-1.5's form, "USER: <image>\\n... ASSISTANT:".
    """
    prompt = _prompt(processor, question)
    return processor(images=[image], text=[prompt], return_tensors="pt").to(device)


def batch_inputs(
    processor: Any, images: Sequence[Image.Image], questions: Sequence[str], device: torch.device
) -> Any:
    """The model's inputs for a batch, one image and a question each; padding goes to the left."""
    if len(images) == 1:
        return model_inputs(processor, images[0], questions[0], device)
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    prompts = [_prompt(processor, question) for question in questions]
    return processor(
        images=[[image] for image in images],
        text=prompts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    ).to(device)


def _prompt(processor: Any, question: str) -> str:
    placeholder = getattr(processor, "image_token", None)
    if placeholder and placeholder in question:
        raise ValueError(f"a question must not contain {placeholder}, which stands for an image")
    if not getattr(processor, "chat_template", None):
        return f"USER: {processor.image_token}\n{question} ASSISTANT:"
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    return str(processor.apply_chat_template(turns, add_generation_prompt=True))


def answer(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> str:
    """The model's answer, decoded greedily."""
    sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = sequences[:, inputs["input_ids"].shape[1] :]
    return str(processor.batch_decode(new, skip_special_tokens=True)[0]).strip()
