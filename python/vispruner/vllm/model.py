"""The part of the workers between the encoder and the language model, shared by all families."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group, tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.models.adapters import as_embedding_model, as_seq_cls_model

from .compatibility import refuse_unsupported
from .config import KEY, Mixin, Pruning
from .timing import Timing

logger = init_logger(f"vllm.plugins.{KEY}")  # below "vllm", whose handlers it uses


class AttentionTap:
    """Records the queries and keys of one attention layer of an encoder.

    The hook is active inside its `with` block only. The queries and keys are computed in any case,
    and the attention kernel does not change.

    Args:
        attention: vLLM's `MMEncoderAttention` of the layer.
    """

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention
        self._seen: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> AttentionTap:
        self._handle = self._attention.register_forward_pre_hook(self._before, with_kwargs=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("query", "key"), args, strict=False)) | kwargs
        self._seen = given["query"], given["key"]

    def take(self) -> tuple[Tensor, Tensor]:
        """The queries and keys of the last pass, of this rank's heads."""
        if self._seen is None:
            raise RuntimeError(f"{KEY}: the encoder ran without calling the attention that is read")
        seen, self._seen = self._seen, None
        return seen


def _adapted(stock: type[Any], vllm_config: VllmConfig) -> Any:
    """vLLM's class with its adapter for pooling, which made a subclass of the pruned class."""
    adapters = {"embed": as_embedding_model, "classify": as_seq_cls_model}
    adapter = adapters.get(vllm_config.model_config.convert_type)
    return stock if adapter is None else adapter(stock)


def encoder_batches(tokens: Sequence[int], limit: int) -> Iterator[slice]:
    """Splits images into runs of at most `limit` tokens, or of one image that has more.

    The scheduler counts retained tokens, so it sends up to N / k times the images that the
    encoder's memory was planned for.
    """
    start = held = 0
    for index, count in enumerate(tokens):
        if index > start and held + count > limit:
            yield slice(start, index)
            start, held = index, 0
        held += count
    if start < len(tokens):
        yield slice(start, len(tokens))


class PrunedModel(Mixin):
    """Mixin for a model class of vLLM, as its first base.

    Attributes:
        stock: vLLM's own class, which is built if the engine does not prune.
        drafts: methods of speculative decoding that can be used, and why no others can.
        pruning: the engine's options.
        encoder_tokens: visual tokens that the encoder may process at once.
        timing: of this worker.
    """

    stock: ClassVar[type[Any]]
    drafts: ClassVar[tuple[str, ...]] = ("ngram", "eagle")
    no_other_drafts: ClassVar[str] = "others are untested with pruning"
    pruning: Pruning
    encoder_tokens: int
    timing: Timing

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        if Pruning.of(vllm_config.model_config.hf_config) is None:
            stock = cls.stock if "stock" in vars(cls) else _adapted(cls.stock, vllm_config)
            return stock(vllm_config=vllm_config, prefix=prefix)
        new: Any = super().__new__
        if new is object.__new__:
            return new(cls)
        return new(cls, vllm_config=vllm_config, prefix=prefix)  # vLLM's for quantized models

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        refuse_unsupported()
        self.check(vllm_config.model_config.hf_config)
        self.check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        pruning = Pruning.of(vllm_config.model_config.hf_config)
        assert pruning is not None
        self.pruning = pruning
        self.encoder_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.timing = Timing(
            vllm_config.model_config.served_model_name,
            vllm_config.device_config.device,
            counted=get_tp_group().rank_in_group == 0,
        )
        logger.info_once("Pruning visual tokens: %s", pruning)

    @classmethod
    def check(cls, hf_config: Any) -> None:
        """Raises UnsupportedModelError for a model that cannot be pruned."""

    @classmethod
    def check_engine(cls, vllm_config: VllmConfig) -> None:
        """Raises ValueError for options of the engine that pruning does not support."""
        for option, (used, why) in cls.refused_options(vllm_config).items():
            if used:
                raise ValueError(f"{KEY}: {option} cannot be used with {cls.stock.__name__}: {why}")

    @classmethod
    def refused_options(cls, vllm_config: VllmConfig) -> dict[str, tuple[bool, str]]:
        """Options that cannot be used: name, whether it is set, reason."""
        lora, speculative = vllm_config.lora_config, vllm_config.speculative_config
        return {
            f"speculative decoding other than {' and '.join(cls.drafts)}": (
                speculative is not None and speculative.method not in cls.drafts,
                cls.no_other_drafts,
            ),
            "--enable-tower-connector-lora": (
                lora is not None and lora.enable_tower_connector_lora,
                "it counts unpruned tokens",
            ),
            "cudagraph_mm_encoder": (
                vllm_config.compilation_config.cudagraph_mm_encoder,
                "a graph of the encoder does not call the hook that reads its attention",
            ),
        }

    def choose(
        self, features: Tensor, scores: Tensor, lengths: Sequence[int], counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Chooses the tokens of packed pictures, the same on every rank.

        Args:
            features: (T, C); scores: (T,) float32.
            lengths: tokens of each picture, which may be 0; counts: tokens to keep of each.

        Returns:
            (T', C) retained features and (T',) int64 ascending rows of features.
        """
        group = get_tp_group()
        pictures = [(own, count) for own, count in zip(lengths, counts, strict=True) if own]
        lengths, counts = [own for own, _ in pictures], [count for _, count in pictures]
        with self.timing("selection"):
            kept, rows = self.pruning.budget.select_packed(features, scores, lengths, counts)
            if group.world_size > 1:
                # Equal features and scores give equal tokens. But kernels on different ranks may
                # return different bits, and ranks that disagree on a token would cause no error.
                rows = group.broadcast(rows.contiguous())
                kept = features[rows]
        self.timing.record(len(lengths), len(features), len(rows))
        return kept, rows


def over_all_heads(scores: Tensor, ranks: int) -> Tensor:
    """The mean over all heads, from the means over each rank's heads."""
    return scores if ranks == 1 else tensor_model_parallel_all_reduce(scores) / ranks


def counts_of(retained: Any) -> list[int]:
    """The field RETAINED of a batch of images as vLLM passes it: a tensor, or one per image."""
    if isinstance(retained, Tensor):
        return [int(count) for count in retained.flatten().tolist()]
    return [int(count) for item in retained for count in torch.as_tensor(item).flatten().tolist()]


__all__ = [
    "AttentionTap",
    "PrunedModel",
    "counts_of",
    "encoder_batches",
    "over_all_heads",
]
