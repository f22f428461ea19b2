"""Names that move between releases of transformers: the one place that knows more than one of them.

Inside this package an argument has the newest name. What comes from a caller, and what goes to a
model, passes through here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

#: The keys and values so far, as an argument and in an output: since 5.24, and before.
_CACHE_NAMES = ("cache", "past_key_values")

#: The release that is supported from, and the newest one that the tests have passed on.
OLDEST, TESTED = (5, 17), (5, 24)


@functools.cache
def version() -> tuple[int, int]:
    """Major and minor of the installed transformers."""
    import transformers

    major, minor, *_ = transformers.__version__.split(".")
    return int(major), int(minor)


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function, or what it wraps, has a parameter of that name."""
    return name in inspect.signature(function).parameters


# ------------------------------------------------------------------------------------- the cache
def canonical(call: Mapping[str, Any]) -> dict[str, Any]:
    """A caller's arguments, those that are None left out, the cache under the name "cache"."""
    named = {name: value for name, value in call.items() if value is not None}
    found = [named.pop(name) for name in _CACHE_NAMES if name in named]
    return named | ({"cache": found[0]} if found else {})


def spelled(call: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments for a `forward` of this release: the cache under the name that it takes.

    Args:
        call: arguments with the names of `canonical`.
        function: a `forward`; `generate` takes what the model's `forward` takes.
    """
    named = dict(call)
    if "cache" in named and not takes(function, "cache"):
        named["past_key_values"] = named.pop("cache")
    return named


def cache_in(output: Any) -> Any:
    """The cache in what `forward` or `generate` returned, None if there is none."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    if isinstance(output, Mapping):
        return next((output[name] for name in _CACHE_NAMES if output.get(name) is not None), None)
    return None


def cached_columns(cache: Any) -> int:
    """Columns of a prompt that a cache holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def cached_rows(cache: Any) -> int | None:
    """Rows of a batch that a cache holds, None if it does not say."""
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.dim() == 4:
            return int(keys.shape[0])
    return None


# ----------------------------------------------------------------------------------- the encoders
def encoder_layers(tower: Any) -> Any:
    """The layers of a vision tower, which earlier releases have one module deeper."""
    encoder = getattr(tower, "vision_model", tower).encoder
    return encoder.layers if hasattr(encoder, "layers") else encoder.layer


def takes_encoder_outputs(model: Any) -> bool:
    """Whether images can be handed over encoded, as `mm_encoder_outputs`: since 5.18."""
    return takes(model.forward, "mm_encoder_outputs")


def takes_chunked_images() -> bool:
    """Whether a prompt with images is prefilled in chunks correctly: since 5.23."""
    return version() >= (5, 23)


def mixes_repeated_images() -> bool:
    """Whether generate mixes up the images of a row that it repeats, pruned or not: 5.18."""
    return version() == (5, 18)


def masks_images_behind_a_cache() -> bool:
    """Whether Gemma 3 lets tokens of a new image see each other behind a cache.

    It does in 5.23 and does not in 5.17; releases between them are not relied on.
    """
    return version() >= (5, 23)


# ------------------------------------------------------------------------------------- accelerate
@contextmanager
def loaded(module: Any) -> Iterator[None]:
    """While open, the parameters of a module itself are on its device.

    accelerate's CPU offload keeps them on the meta device and loads them around `forward`; the
    methods that encode images are called outside it. Submodules load their own.
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
