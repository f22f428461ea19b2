"""Prunes the images of a transformers model at the boundary of its forward and generate.

The encoder runs, the kept tokens are chosen, the placeholders of the others are taken out of the
prompt, and the unmodified model gets the shorter prompt with the kept features. Nothing inside the
model changes: caches, beams, sampling and attention kernels see an ordinary, shorter prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .budget import Budget
from .handover import Handover, Method
from .layout import Layout, rows_of_items, shorten
from .models import UnsupportedModelError, family_of
from .past import Past
from .phases import Clock, Prefill
from .report import Kept, Report

_CACHE_ATTRIBUTE = "_vispruner_layout"  # on a cache: a deep copy of it keeps what it holds
_MODEL_ATTRIBUTE = "_vispruner_pruner"


@dataclass(frozen=True)
class Prepared:
    """A prompt without the placeholders of dropped tokens.

    Attributes:
        inputs: the call's arguments for the unmodified model, without those of the encoders.
        outputs: modality to the pruned output of its encoder, for `mm_encoder_outputs`.
        layout: the columns of the whole shortened prompt, those in the cache included.
        encoder_inputs: the encoders' arguments, as they were encoded.
        counts: modality to (tokens kept of each item, row of each item).
        clock: the phases so far.
    """

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    layout: Layout
    encoder_inputs: dict[str, Any]
    counts: dict[str, tuple[list[int], list[int]]]
    clock: Clock


class _PromptStreamer:
    """Shows a streamer the prompt that the caller passed instead of the shortened one."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self._streamer, self._prompt = streamer, prompt
        self._started = False

    def put(self, value: Tensor) -> None:
        self._streamer.put(value if self._started else self._prompt.cpu())
        self._started = True

    def end(self) -> None:
        self._streamer.end()


def _layout_of(cache: Any) -> Layout | None:
    return getattr(cache, _CACHE_ATTRIBUTE, None)


def _cached(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


class Pruner:
    """Pruning applied to one model; made by :func:`apply`.

    Attributes:
        model: the model.
        budget: how much is kept.
        last: what the last call with images did, None before there was one.
    """

    def __init__(self, model: Any, budget: Budget, **options: str) -> None:
        family = family_of(model)
        if not callable(getattr(model, "generate", None)) or model.base_model is model:
            raise UnsupportedModelError(
                f"pass the whole ...ForConditionalGeneration model, not a {type(model).__name__}"
            )
        if getattr(model, _MODEL_ATTRIBUTE, None) is not None:
            raise ValueError("this model is pruned already: call remove() on its pruner first")
        for part in (model.config, model.config.get_text_config()):
            attention = str(getattr(part, "_attn_implementation", None))
            if attention.startswith("paged"):
                raise UnsupportedModelError(
                    f"attention implementation {attention!r} packs requests by itself: use sdpa, "
                    "eager or flash_attention_2"
                )
        self.model = model
        self.budget = budget
        self.last: Report | None = None
        self._family = family(model, budget, **options)
        self._handover = Handover(model, self._family)
        self._generating = False
        self._prefill: Prefill | None = None
        self._pending: Layout | None = None
        # From here on nothing can fail.
        self._generate = model.generate
        self._had_own_generate = "generate" in vars(model)
        model.generate = Method(model.generate, self._pruned_generate)
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]
        self._handover.install()
        setattr(model, _MODEL_ATTRIBUTE, self)

    def remove(self) -> None:
        """Gives the model back as it was. Harmless the second time."""
        if getattr(self.model, _MODEL_ATTRIBUTE, None) is not self:
            return
        for handle in self._handles:
            handle.remove()
        self._handover.uninstall()
        if self._had_own_generate:
            self.model.generate = self._generate
        else:
            del self.model.generate
        delattr(self.model, _MODEL_ATTRIBUTE)

    def __enter__(self) -> Pruner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    # ------------------------------------------------------------------------------- the surface
    def prepare(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See :func:`prepare`."""
        call = {name: value for name, value in inputs.items() if value is not None}
        prepared = self._prepare(call, whole=False)
        if prepared is None:
            raise ValueError("inputs hold no images: there is nothing to prune")
        ready = dict(prepared.inputs)
        if ready.get("past_key_values") is not None:
            setattr(ready["past_key_values"], _CACHE_ATTRIBUTE, prepared.layout)
        ids = ready.pop("input_ids")
        for name in ("mm_token_type_ids", "token_type_ids"):  # the language model takes neither
            ready.pop(name, None)
        return ready | self._family.embeddings_of(ids, prepared.outputs)

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._generating:
            return None
        call = self._bind(module.forward, args, kwargs)
        if call.get("mm_encoder_outputs") is not None:
            return None
        prepared = self._prepare(call, whole=False)
        if prepared is None:
            return None
        self._pending = prepared.layout
        return (), prepared.inputs | self._handover.give(prepared, times=1)

    def _after_forward(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._prefill is not None and self._prefill.read(kwargs):
            self._prefill = None
        if self._generating or self._pending is None:
            return
        layout, self._pending = self._pending, None
        self._handover.take_back()
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = getattr(output, "past_key_values", None)
        if cache is None and isinstance(output, tuple):
            cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
        if cache is not None:
            setattr(cache, _CACHE_ATTRIBUTE, layout)

    def _pruned_generate(self, *args: Any, **kwargs: Any) -> Any:
        call = self._bind(self._generate, args, kwargs)
        if call.get("inputs") is not None:
            call["input_ids"] = call.pop("inputs")
        cache = call.get("past_key_values")
        before = _layout_of(cache)
        chunk = self._generation_setting(call, "prefill_chunk_size")
        if chunk is not None and self._has_pixels(call) and not self._handover.takes_chunks:
            raise ValueError("prefill_chunk_size with images needs transformers 5.23 or newer")
        with torch.no_grad():
            self._infer_mask(call)
            prepared = None
            if call.get("mm_encoder_outputs") is None:
                prepared = self._prepare(call, whole=True)
        if prepared is None:
            return self._run_generate(args, kwargs)
        ids: Tensor = call["input_ids"]
        ready = dict(prepared.inputs)
        columns = ready["input_ids"].shape[1]
        self._shift_lengths(ready, columns - ids.shape[1])
        if ready.get("streamer") is not None:
            ready["streamer"] = _PromptStreamer(ready["streamer"], ids)
        if before is not None:
            delattr(cache, _CACHE_ATTRIBUTE)  # inside generate it is an ordinary cache
        try:
            ready |= self._handover.give(prepared, times=self._expansion(ready))
            self._prefill = Prefill(prepared.clock, columns - _cached(cache))
            with prepared.clock("prefill"):
                output = self._run_generate((), ready)
        except BaseException:
            if before is not None:
                setattr(cache, _CACHE_ATTRIBUTE, before)
            raise
        finally:
            self._prefill = None
            self._handover.take_back()
        sequences = output if isinstance(output, Tensor) else output.sequences
        times = sequences.shape[0] // ids.shape[0]
        prompt = ids.to(sequences.device).repeat_interleave(times, 0)
        # Callers cut the prompt off by the length that they passed.
        whole = torch.cat([prompt, sequences[:, columns:]], 1)
        layout = prepared.layout.repeat(times)
        filled = cache if isinstance(output, Tensor) else output.get("past_key_values", cache)
        if filled is not None:
            setattr(filled, _CACHE_ATTRIBUTE, layout)
        if isinstance(output, Tensor):
            return whole
        output.sequences = whole
        return output

    def _run_generate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._generating = True
        try:
            return self._generate(*args, **kwargs)
        finally:
            self._generating = False

    # ------------------------------------------------------------------------ arguments of a call
    def _has_pixels(self, call: Mapping[str, Any]) -> bool:
        family = self._family
        return any(family.pixels_name(modality, call) for modality in family.encoders)

    @staticmethod
    def _bind(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Positional arguments by their names."""
        if not args:
            return dict(kwargs)
        names = [name for name in inspect.signature(function).parameters if name != "self"]
        return dict(zip(names, args, strict=False)) | kwargs

    def _generation_setting(self, call: Mapping[str, Any], name: str) -> Any:
        if call.get(name) is not None:
            return call[name]
        for config in (call.get("generation_config"), self.model.generation_config):
            if getattr(config, name, None) is not None:
                return getattr(config, name)
        return None

    def _expansion(self, call: Mapping[str, Any]) -> int:
        """How often generate repeats each row."""
        names = ("num_beams", "num_return_sequences")
        return max(int(self._generation_setting(call, name) or 1) for name in names)

    def _infer_mask(self, call: dict[str, Any]) -> None:
        """Tells padding by the token where no mask is given, as generate itself does."""
        ids = call.get("input_ids")
        if ids is None or call.get("attention_mask") is not None:
            return
        pad, eos = (self._generation_setting(call, f"{name}_token_id") for name in ("pad", "eos"))
        ends = eos if isinstance(eos, list) else [eos]
        if isinstance(pad, int) and pad not in ends:
            call["attention_mask"] = ids.ne(pad).long()

    def _shift_lengths(self, call: dict[str, Any], shift: int) -> None:
        """Lengths that count the prompt are meant for the prompt that the caller passed."""
        for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if self._generation_setting(call, new) is not None:
                continue
            length = self._generation_setting(call, name)
            default = {"max_length": 20, "min_length": 0}[name]
            explicit = call.get(name) is not None or length not in (None, default)
            if explicit and length is not None:
                call[name] = max(0, int(length) + shift)

    def _pad_id(self) -> int:
        taken = {self._family.token_id(modality) for modality in self._family.encoders}
        pad = getattr(self.model.generation_config, "pad_token_id", None)
        candidates = [pad] if isinstance(pad, int) else []
        return next(token for token in [*candidates, *range(len(taken) + 1)] if token not in taken)

    # --------------------------------------------------------------------------------- the prompt
    def _prepare(self, call: dict[str, Any], *, whole: bool) -> Prepared | None:
        """Encodes the images of a call and shortens its prompt; None if there is nothing to do.

        Args:
            call: arguments by name.
            whole: input_ids may begin with what the cache holds (generate), instead of holding
                new tokens only (forward).
        """
        family = self._family
        ids: Tensor | None = call.get("input_ids")
        cache = call.get("past_key_values")
        layout = _layout_of(cache)
        visual = {
            modality: inputs
            for modality in family.encoders
            if (inputs := family.inputs_of(modality, call)) is not None
        }
        if call.get("inputs_embeds") is not None:
            if visual:
                raise ValueError(
                    "pruning needs input_ids beside the pixels, got inputs_embeds: call "
                    "vispruner.prepare, or leave the pixels out"
                )
            return None
        if ids is None:
            return None
        cached = _cached(cache)
        if cached == 0:
            layout = None
        if not visual and layout is None:
            if cached == 0:
                self._no_placeholders(ids)
            return None

        # 1. What is in the cache, and what is new.
        mask: Tensor | None = call.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask must have shape (B, L) to be pruned, got {tuple(mask.shape)}"
            )
        past = Past.of(layout, cached, ids, mask, whole=whole, offset=family.offset())
        new_ids, new_mask = past.new(ids), past.new_mask(ids, mask)
        if not visual and not whole:  # a step of somebody's own decoding loop
            knows_the_cache = past.mask_is_short if mask is not None else not past.layout.padded
            if knows_the_cache:
                return None
        if isinstance(call.get("logits_to_keep"), Tensor):
            raise ValueError("logits_to_keep must be an int when images are pruned, got a tensor")

        # 2. Which image belongs to which row, before anything is computed.
        slots = {m: new_ids == family.token_id(m) for m in family.encoders}
        old_ids = past.old(ids)
        stats = [new_mask.sum(1), new_mask[:, -1].long(), *(s.sum(1) for s in slots.values())]
        stats += [(old_ids == family.token_id(m)).sum(1) for m in family.encoders]
        valid, last, *found = torch.stack(stats).tolist()  # the one time that the host waits
        rows: dict[str, list[int]] = {}
        for i, modality in enumerate(family.encoders):
            here, before = found[i], found[len(slots) + i]
            if modality in visual:
                visual[modality], rows[modality] = self._assign(
                    modality, visual[modality], here, before
                )
                if not rows[modality]:
                    del visual[modality]
            # (In a decoding loop the model itself may have said one.)
            elif sum(here) and (whole or not cached):
                raise ValueError(
                    f"the prompt has {sum(here)} {modality} placeholders but no {modality}s "
                    "were passed"
                )

        # 3. The encoders.
        clock = Clock(self.model.device)
        encoded = {m: family.encode(m, inputs, clock) for m, inputs in visual.items()}

        # 4. The columns that stay.
        with clock("rewrite"):
            dropped = torch.zeros_like(new_ids, dtype=torch.bool)
            kept = list(valid)
            for modality, part in encoded.items():
                away = ~part.keep.to(new_ids.device)
                dropped |= torch.zeros_like(dropped).masked_scatter_(slots[modality], away)
                for item, row in zip(part.items, rows[modality], strict=True):
                    kept[row] -= item.before - item.after
            width = max(kept) + new_ids.shape[1] - max(valid)
            new = shorten(new_mask.bool() & ~dropped, width, left=all(last))
            new = replace(new, padded=min(kept) < width)
            inputs = self._arranged(call, past, new, new_ids, dropped, whole=whole)
            shown = {
                name: value
                for name, value in call.items()
                if not any(name in names for names in family.parameters.values())
            }
            for own in visual.values():
                shown |= own
            positions = self._positions(shown, past, new, new_ids, new_mask)
            new_layout = past.layout.append(new, past.gap) if past.columns else new
            if positions is not None:
                inputs["position_ids"], following = positions
                new_layout = replace(new_layout, next_position=following)
            for modality in family.encoders:
                for name in family.parameters[modality]:
                    inputs.pop(name, None)
        items: tuple[Kept, ...] = sum((part.items for part in encoded.values()), ())
        if items:
            self.last = Report(
                items=items,
                prompt_before=past.columns + new_ids.shape[1],
                prompt_after=cached + width,
                _clock=clock,
            )
        return Prepared(
            inputs,
            {modality: part.output for modality, part in encoded.items()},
            new_layout,
            {name: value for part in visual.values() for name, value in part.items()},
            {m: ([item.after for item in part.items], rows[m]) for m, part in encoded.items()},
            clock,
        )

    def _assign(
        self, modality: str, inputs: dict[str, Any], here: list[int], before: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        """The images that need encoding, and the row that each of them belongs to.

        Args:
            inputs: the encoder's arguments.
            here: placeholders in the new columns of each row; before: in those of the cache.

        Raises:
            ValueError: placeholders and images disagree.
        """
        sizes = self._family.placeholders(modality, inputs)
        if sum(before) and sum(sizes) == sum(before) + sum(here):
            # All images of the conversation: those in the cache need no encoding.
            every = [a + b for a, b in zip(before, here, strict=True)]
            fresh = _fresh_items(sizes, rows_of_items(sizes, every, modality), before)
            inputs = self._family.take(modality, inputs, fresh)
            sizes = [sizes[item] for item in fresh]
        elif sum(before) and not sum(here):
            sizes = []  # the same images again, in another form
        return inputs, rows_of_items(sizes, here, modality)

    def _no_placeholders(self, ids: Tensor) -> None:
        """A fresh prompt without pixels has no placeholders."""
        if torch.compiler.is_compiling():  # looking would break the graph
            return
        for modality in self._family.encoders:
            slots = int((ids == self._family.token_id(modality)).sum())
            if slots:
                raise ValueError(
                    f"the prompt has {slots} {modality} placeholders but no {modality}s were passed"
                )

    def _arranged(
        self,
        call: Mapping[str, Any],
        past: Past,
        new: Layout,
        new_ids: Tensor,
        dropped: Tensor,
        *,
        whole: bool,
    ) -> dict[str, Any]:
        """The call's arguments with their columns taken out."""
        inputs = dict(call)
        pad = self._pad_id()
        short = new.take(new_ids.masked_fill(dropped, pad))
        if whole and past.full_ids:
            old = past.old(call["input_ids"])
            for modality in self._family.encoders:
                # They are in the cache; a placeholder is to be filled.
                old = old.masked_fill(old == self._family.token_id(modality), pad)
            short = torch.cat([past.shorten(old), short], 1)
        inputs["input_ids"] = short
        whole_mask = torch.cat([past.mask, new.mask.to(past.mask.dtype)], 1)
        if call.get("attention_mask") is not None:
            inputs["attention_mask"] = whole_mask.to(call["attention_mask"].dtype)
        elif whole or past.columns or new.padded:
            inputs["attention_mask"] = whole_mask.long()
        for name, fill in (("labels", -100), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
            value = call.get(name)
            if value is None:
                continue
            taken = new.take(past.new(value).masked_fill(dropped, fill))
            if whole and past.full_ids:
                taken = torch.cat([past.shorten(past.old(value)), taken], 1)
            inputs[name] = taken
        return inputs

    def _positions(
        self,
        call: Mapping[str, Any],
        past: Past,
        new: Layout,
        new_ids: Tensor,
        new_mask: Tensor,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Position ids of the shortened prompt's new columns, and the position after them.

        Where the model has rows for time, height and width, a first row counts the tokens that are
        there: transformers reads a gap in it as the border of two packed sequences.
        """
        given: Tensor | None = call.get("position_ids")
        if given is not None and given.dim() == 2:
            return new.take(past.new(given)), None
        found = self._family.positions(new_ids, new_mask, call)
        if found is None:
            return (new.take(past.new(given)), None) if given is not None else None
        positions, following, resumed = found
        start = past.next_position()
        if start is not None:
            positions = positions + start[None, :, None]
            following, resumed = following + start, resumed + start
        if given is not None:
            positions = past.new(given)[-3:]
        everything = torch.cat([past.mask.bool(), new.mask], 1)
        text = (everything.long().cumsum(1) - 1).masked_fill(~everything, 0)
        text = text[:, past.mask.shape[1] :]
        self._family.follow((resumed - everything.sum(1)).unsqueeze(1))
        return torch.cat([text[None], new.take(positions)]), following


def _fresh_items(sizes: list[int], rows: list[int], cached: list[int]) -> list[int]:
    """Items whose placeholders come after the `cached` ones of their row."""
    seen = dict.fromkeys(rows, 0)
    fresh = []
    for item, (size, row) in enumerate(zip(sizes, rows, strict=True)):
        if seen[row] >= cached[row]:
            fresh.append(item)
        seen[row] += size
    return fresh


def apply(
    model: Any,
    k: int | None = None,
    *,
    ratio: float | None = None,
    important_ratio: float = 0.5,
    step: int = 8,
    **options: str,
) -> Pruner:
    """Makes a transformers model prune its images, until `remove()` or the end of a `with` block.

    The model's `forward` and `generate` keep their signatures and take the same inputs as before;
    `generate` returns sequences that begin with the prompt as it was passed.

    Args:
        model: a `...ForConditionalGeneration` model of a supported family.
        k: tokens to keep of every image (of every tile of a tiled one, every frame of a video).
        ratio: or the share of tokens to keep, in (0, 1], where images differ in size.
        important_ratio: share of the kept tokens chosen by attention, in [0, 1].
        step: tokens that the deduplication drops a round.
        **options: of the family, such as `tiles="all"` for LLaVA-NeXT.

    Raises:
        TypeError, ValueError: on a bad argument, or if the model is pruned already.
        UnsupportedModelError: (a ValueError) the model cannot be pruned.

    The model is as before if an error is raised.
    """
    return Pruner(model, Budget(k, ratio, important_ratio, step), **options)


def prepare(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Pruned inputs of the language model, for callers who run it themselves.

    Args:
        model: a model with a pruner applied.
        inputs: what the processor made: input_ids (B, L), attention_mask, pixel_values, labels...

    Returns:
        Arguments of `model.model.language_model`: `inputs_embeds` (B, W, C), `attention_mask` and,
        where the family has them, `position_ids` and deepstack features. `labels`, where they were
        passed, come back shortened as well.

    Raises:
        ValueError: the model has no pruner, or the inputs do not fit together.
    """
    pruner = getattr(model, _MODEL_ATTRIBUTE, None)
    if pruner is None:
        raise ValueError("this model is not pruned: call vispruner.apply(model, k=...) first")
    return pruner.prepare(inputs)


__all__ = ["Prepared", "Pruner", "apply", "prepare"]
