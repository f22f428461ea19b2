"""Arguments of `generate` that depend on the length or content of the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import releases
from ..clock import Clock, Prefill
from ..models import Family
from .cache import layout_of


class PromptStreamer:
    """Passes the full prompt to a streamer instead of the shortened one."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self._streamer, self._prompt = streamer, prompt
        self._started = False

    def put(self, value: Tensor) -> None:
        self._streamer.put(value if self._started else self._prompt.cpu())
        self._started = True

    def end(self) -> None:
        self._streamer.end()


class Generation:
    """A running call of generate.

    Args:
        clock: with the phase "prefill" open; None if nothing is pruned.
        columns: columns of the prompt that the cache does not hold yet.
        pixels: whether generate itself passes pixels to `forward`, as in releases without
            `mm_encoder_outputs`.
    """

    def __init__(self, clock: Clock | None, columns: int, *, pixels: bool) -> None:
        self._prefill = None if clock is None else Prefill(clock, columns)
        self._pixels_expected = pixels
        self._pixels: Any = None

    def owns(self, pixels: Any) -> bool:
        """Whether a forward belongs to this call, by its pixels (None without).

        Without a cache, generate passes the same tensor again.
        """
        if pixels is None:
            return True
        if self._pixels_expected and self._pixels is None:
            self._pixels = pixels
        return pixels is self._pixels

    def read(self, call: Mapping[str, Any]) -> None:
        """Called after every forward of this call."""
        if self._prefill is not None and self._prefill.read(call):
            self._prefill = None


def setting(model: Any, call: Mapping[str, Any], name: str) -> Any:
    """A setting of generate: the argument, the caller's generation_config, the model's."""
    if call.get(name) is not None:
        return call[name]
    for config in (call.get("generation_config"), model.generation_config):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def expansion(model: Any, call: Mapping[str, Any]) -> int:
    """Number of repetitions of each row in generate."""
    names = ("num_beams", "num_return_sequences")
    return max(int(setting(model, call, name) or 1) for name in names)


def infer_mask(model: Any, call: dict[str, Any]) -> None:
    """Derives a missing mask from the padding token, as generate itself does."""
    ids = call.get("input_ids")
    if ids is None or call.get("attention_mask") is not None:
        return
    pad, eos = (setting(model, call, f"{name}_token_id") for name in ("pad", "eos"))
    ends = eos if isinstance(eos, list) else [eos]
    if isinstance(pad, int) and pad not in ends:
        call["attention_mask"] = ids.ne(pad).long()


def shift_lengths(model: Any, call: dict[str, Any], shift: int) -> None:
    """Adjusts lengths that include the prompt, which refer to the full prompt."""
    for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if setting(model, call, new) is not None:
            continue
        length = setting(model, call, name)
        default = {"max_length": 20, "min_length": 0}[name]
        explicit = call.get(name) is not None or length not in (None, default)
        if explicit and length is not None:
            call[name] = max(0, int(length) + shift)


def check_chunks(model: Any, family: Family, call: Mapping[str, Any], *, pictures: bool) -> None:
    """Checks prefill in chunks.

    Args:
        model: the model; family: its family; call: the arguments; pictures: whether it has any.

    Raises:
        ValueError: transformers would compute wrong answers.
    """
    size = setting(model, call, "prefill_chunk_size")
    if size is None:
        return
    if pictures and not releases.takes_chunked_images():
        raise ValueError("prefill_chunk_size with images needs transformers 5.23 or newer")
    cache = call.get("cache")
    rewritten = pictures or layout_of(cache) is not None
    if rewritten and family.has_grid_positions and releases.cached_columns(cache):
        raise ValueError(
            f"prefill_chunk_size={size} cannot be used behind a cache with "
            f"{model.config.model_type}, whose positions transformers would take from the "
            "beginning of the prompt: omit it"
        )
