"""The front end: the number of placeholders of an image in a prompt, before it is encoded.

The number of retained tokens follows from the size of an image, so the prompt has its short length
from the beginning: scheduling, chunked prefill, the KV cache and the usage counts of the API all
use it. The number is passed to the workers in a separate field of each image.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import ProcessorInputs, PromptUpdate, PromptUpdateDetails

from ..selection import Budget
from . import metrics
from .compatibility import refuse_unsupported
from .config import KEY, Mixin, Pruning, identity, without_key
from .requests import forget

#: modality to the field of its items with the numbers of retained tokens per picture
RETAINED = {"image": "vispruner_retained", "video": "vispruner_retained_video"}

_laid_out: ContextVar[list[metrics.Pruned]] = ContextVar("vispruner_laid_out")
#: Hashes of the current prompt's items that were not in vLLM's cache of sent items.
_new: ContextVar[list[str]] = ContextVar("vispruner_new")


@dataclass
class _Shortened(PromptUpdateDetails):
    """Placeholders of a pruned item, with the counts that they were made from.

    vLLM's caches of processed items keep the placeholders and drop the rest, so the counts of a
    cached item are stored here.

    Attributes:
        ahead: positions that the item takes beyond one per placeholder.
    """

    pruned: metrics.Pruned | None = None
    ahead: int = 0


def _embedded(details: PromptUpdateDetails) -> int:
    """The number of placeholders that embeddings replace."""
    if details.is_embed is None:
        return len(details.full)
    return int(details.is_embed(details.full).sum())


def _details(tokens: Any) -> PromptUpdateDetails:
    if isinstance(tokens, PromptUpdateDetails):
        return tokens
    return PromptUpdateDetails.from_seq(tokens)


class PrunedInfo(Mixin):
    """Mixin for a `ProcessingInfo` of vLLM, as its first base, for an engine that prunes.

    Attributes:
        pruning: the engine's options.
    """

    ctx: Any
    pruning: Pruning

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        refuse_unsupported()
        pruning = Pruning.of(ctx.model_config.hf_config)
        assert pruning is not None
        self.pruning = pruning
        modalities = RETAINED.keys() & self.get_supported_mm_limits().keys()
        metrics.install(ctx.model_config, pruning.budget, modalities)

    def get_hf_processor(self, **kwargs: object) -> Any:
        return super().get_hf_processor(**without_key(kwargs))

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """The largest image at the cap, which vLLM sizes its encoder cache and budget for."""
        most = super().get_mm_max_tokens_per_item(seq_len, mm_counts)
        if self.ctx.get_mm_config().enable_mm_embeds:  # embeddings from clients are not pruned
            return {**(most or {}), "image": max(self.most_retained(), self.get_max_image_tokens())}
        return {**(most or {}), "image": self.most_retained()}

    def most_retained(self) -> int:
        """Tokens of the largest image at the cap."""
        return self.pruning.cap.count(self.get_max_image_tokens())


class PrunedProcessor(Mixin):
    """Mixin for a `MultiModalProcessor` of vLLM, as its first base, whose `info` is a PrunedInfo.

    A family defines in `retained` the number of tokens of each item and, if an item is not one
    picture, in `shortened` its remaining placeholders.
    """

    info: Any

    def retained(self, processed: Mapping[str, Any], budget: Budget) -> dict[str, list[int]]:
        """Retained tokens per picture, of every item of a modality.

        Args:
            processed: output of the processor of transformers for images and videos; a modality
                whose embeddings were passed by the client is not in the result.
        """
        raise NotImplementedError

    def shortened(self, tokens: Any, retained: int, item: Mapping[str, Any]) -> Any:
        """The placeholders of an item with `retained` tokens per picture.

        Args:
            tokens: its placeholders in the unpruned prompt, from vLLM's own processor.
            item: its processed fields.
        """
        return tokens[:retained]

    def ahead(self, retained: int, item: Mapping[str, Any]) -> int:
        """Positions that an item takes beyond one per placeholder; arguments as for `shortened`."""
        return 0

    def check_tokens(self, tokens: Sequence[int], places: Sequence[Any]) -> None:
        """Raises ValueError for a prompt whose text has placeholders.

        Args:
            tokens: of the prompt; places: vLLM's `PlaceholderFeaturesInfo` of all its items.
        """

    def check_positions(self, ahead: int) -> None:
        """Raises ValueError for a prompt whose positions the model has no rotary embedding for.

        Args:
            ahead: positions beyond one per token, of all its items.
        """

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        # The caches of processed images, encoder outputs and prefixes, and external stores that
        # share them, must not mix up different prunings of an image.
        budget = self.info.pruning.for_request(inputs.hf_processor_mm_kwargs)
        named = {**inputs.hf_processor_mm_kwargs, KEY: identity(budget)}
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=named))
        if (cache := inputs.cache) is not None:
            items = itertools.chain(*hashes.values())
            _new.set([item for item in items if not cache.is_cached_item(item)])
        return hashes

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        processed = super()._apply_hf_processor_main(mm_items, without_key(hf_kwargs))
        counts = self.retained(processed, self.info.pruning.for_request(hf_kwargs))
        for modality, of_items in counts.items():
            processed[RETAINED[modality]] = torch.tensor(of_items)
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        own = {
            name: MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
            for modality, name in RETAINED.items()
        }
        return {**fields, **own}

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """vLLM's result, with the counts of its pruned items under this package's key."""
        _new.set([])
        try:
            prompt = super().apply(inputs, timing_ctx)
        except Exception:
            forget(inputs.cache, _new.get())
            raise
        prompt[KEY] = _laid_out.get()
        return prompt

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        contents = [
            updates[0].content
            for of_items in mm_res.prompt_updates.values()
            for updates in of_items
            if updates
        ]
        short = [own for own in contents if isinstance(own, _Shortened)]
        _laid_out.set([own.pruned for own in short if own.pruned])
        tokens, places = super()._maybe_apply_prompt_updates(mm_items, mm_res)
        self.check_positions(sum(max(0, own.ahead) for own in short))
        if short:
            self.check_tokens(tokens, [place for items in places.values() for place in items])
        return tokens, places

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        budget = self.info.pruning.for_request(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)

        def shorter(modality: str, whole: Callable[[int], Any]) -> Callable[[int], Any]:
            def replacement(index: int) -> Any:
                item = out_mm_kwargs[modality][index]
                count = item.get(RETAINED[modality])
                tokens = whole(index)
                if count is None:
                    return tokens
                retained = count.data.tolist()
                short = _details(self.shortened(tokens, retained, item))
                before, kept = _embedded(_details(tokens)), _embedded(short)
                pruned = metrics.Pruned(modality, budget, before, kept)
                return _Shortened(short.full, short.is_embed, pruned, self.ahead(retained, item))

            return replacement

        return [
            replace(update, replacement=shorter(update.modality, update.replacement))
            for update in updates
        ]


_Model = TypeVar("_Model", bound=type[Any])


def register_processor(
    info: type[PrunedInfo], processor: type[PrunedProcessor]
) -> Callable[[_Model], _Model]:
    """Class decorator that sets how the front end builds prompts for a PrunedModel.

    Without the option, the model has vLLM's own front end, from vLLM's factories.
    """

    def decorate(model: _Model) -> _Model:
        stock = model.stock._processor_factory

        def make_info(ctx: Any) -> Any:
            if Pruning.of(ctx.model_config.hf_config) is None:
                return stock.info(ctx)
            model.check(ctx.model_config.hf_config)
            return info(ctx)

        def make_processor(own: Any, dummy_inputs: Any) -> Any:
            make: Any = processor if isinstance(own, PrunedInfo) else stock.processor
            return make(own, dummy_inputs)

        decorated: _Model = MULTIMODAL_REGISTRY.register_processor(
            make_processor, info=make_info, dummy_inputs=stock.dummy_inputs
        )(model)
        return decorated

    return decorate


__all__ = ["RETAINED", "PrunedInfo", "PrunedProcessor", "register_processor"]
