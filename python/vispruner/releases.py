"""Adapter for names that change between releases of transformers.

Inside this package an argument has the newest name. Arguments from callers and to models are
converted here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

#: Name of the KV cache as an argument and in outputs: since 5.24, and before.
_CACHE_NAMES = ("cache", "past_key_values")

#: The oldest supported release, and the newest tested one.
OLDEST, TESTED = (5, 17), (5, 24)


@functools.cache
def version() -> tuple[int, int]:
    """Major and minor of the installed transformers."""
    import transformers

    major, minor, *_ = transformers.__version__.split(".")
    return int(major), int(minor)


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function, or the one that it wraps, has a parameter of this name."""
    return name in inspect.signature(function).parameters


# ------------------------------------------------------------------------------------- the cache
def canonical(call: Mapping[str, Any]) -> dict[str, Any]:
    """A caller's arguments without None values, with the cache under the name "cache"."""
    named = {name: value for name, value in call.items() if value is not None}
    found = [named.pop(name) for name in _CACHE_NAMES if name in named]
    return named | ({"cache": found[0]} if found else {})


def spelled(call: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments for a `forward` of this release, with the cache under its name there.

    Args:
        call: arguments with the names of `canonical`.
        function: a `forward`; `generate` takes the same names as the model's `forward`.
    """
    named = dict(call)
    if "cache" in named and not takes(function, "cache"):
        named["past_key_values"] = named.pop("cache")
    return named


def cache_in(output: Any) -> Any:
    """The cache in the output of `forward` or `generate`, None if there is none."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    if isinstance(output, Mapping):
        return next((output[name] for name in _CACHE_NAMES if output.get(name) is not None), None)
    return None


def _packs_requests(cache: Any) -> bool:
    """Whether it is a paged cache (`generate_batch`), whose one row holds several prompts."""
    return cache is not None and not hasattr(cache, "get_seq_length")


def cached_columns(cache: Any) -> int:
    """Number of cached columns; 1 for a paged cache, which is not empty in general."""
    if _packs_requests(cache):
        return 1
    return 0 if cache is None else int(cache.get_seq_length())


def cached_rows(cache: Any) -> int | None:
    """Number of cached rows, None if unknown.

    Raises:
        ValueError: a paged cache: the row is not one prompt.
    """
    if _packs_requests(cache):
        raise ValueError(
            f"a {type(cache).__name__} packs several prompts into one row, whose images cannot be "
            "pruned: call generate, or remove() the pruner"
        )
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.dim() == 4:
            return int(keys.shape[0])
    return None


# ----------------------------------------------------------------------------------- the encoders
def encoder_layers(tower: Any) -> Any:
    """The layers of a vision tower, which are one module deeper in earlier releases."""
    encoder = getattr(tower, "vision_model", tower).encoder
    return encoder.layers if hasattr(encoder, "layers") else encoder.layer


def takes_encoder_outputs(model: Any) -> bool:
    """Whether the model takes `mm_encoder_outputs`: since 5.18."""
    return takes(model.forward, "mm_encoder_outputs")


def takes_chunked_images() -> bool:
    """Whether prefill in chunks is correct for prompts with images: since 5.23."""
    return version() >= (5, 23)


def mixes_repeated_images(model: Any) -> bool:
    """Whether generate mixes up the images of repeated rows, pruned or not.

    It does in 5.18, and in GLM in later releases as well. So a row of two images is tried. If the
    method has another name or other arguments, its order is unknown.
    """
    row = torch.full((1, 2), int(model.config.image_token_id))
    images = SimpleNamespace(pooler_output=[torch.zeros(1, 1), torch.ones(1, 1)])
    try:
        found = model._expand_multimodal_outputs(
            input_ids=row, mm_encoder_output={"image": images}, expand_size=2
        )
    except (AttributeError, TypeError):
        return True
    return [int(image) for image in found["image"].pooler_output] != [0, 1, 0, 1]


def separates_pictures_of_idefics3() -> bool:
    """Whether Idefics3 and SmolVLM take the features of pictures as a list: since 5.21."""
    return version() >= (5, 21)


def masks_images_behind_a_cache() -> bool:
    """Whether tokens of a new image after a cache attend to each other in Gemma 3.

    They do in 5.23 and do not in 5.17; releases between them are not trusted.
    """
    return version() >= (5, 23)


# ------------------------------------------------------------------------------------- accelerate
@contextmanager
def loaded(module: Any) -> Iterator[None]:
    """Loads a module's direct parameters to its device inside the block.

    accelerate's CPU offload keeps them on the meta device and loads them for `forward` only, but
    the methods that encode images are called outside `forward`. Submodules load their own.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
