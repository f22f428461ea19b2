"""Qwen2-VL to Qwen3.5: pictures of any size, merged 2 x 2, with unpruned positions.

Scores and selection are those of `vispruner.models.qwen_vl`: the attention that patches receive in
the last block with full attention, averaged over the four patches of a merged token. Each frame of
a video (each pair that the model merges in time) is a separate picture.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeProcessingInfo,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl_moe import (
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeProcessingInfo,
)
from vllm.model_executor.models.vision import run_dp_sharded_mrope_vision_model
from vllm.multimodal.processing import PromptUpdateDetails
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.utils.torch_utils import async_tensor_h2d

from .. import selection
from ..models import UnsupportedModelError
from ..selection import Budget
from .config import KEY
from .model import (
    AttentionTap,
    PrunedModel,
    counts_of,
    encoder_batches,
    over_all_heads,
)
from .positions import CHANNELS, LIMIT, Unpruned, with_places, without_places, write_places
from .processing import RETAINED, PrunedInfo, PrunedProcessor, register_processor

Grid = tuple[int, int, int]  # frames, rows and columns of patches


def _grids(grid_thw: Any) -> list[Grid]:
    return [(int(t), int(h), int(w)) for t, h, w in torch.as_tensor(grid_thw).tolist()]


def _always() -> bool:
    return True


def _positions_are_recomputed(vllm_config: VllmConfig) -> bool:
    """Whether the model runner recomputes positions; V1 on a CPU does not, up to 0.33."""
    if vllm_config.use_v2_model_runner or not current_platform.is_cpu():
        return True
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load = inspect.unwrap(CPUModelRunner.load_model)
    return "is_multimodal_pruning_enabled" in load.__code__.co_names


_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class _Processor(PrunedProcessor):
    def retained(self, processed: Mapping[str, Any], budget: Budget) -> dict[str, list[int]]:
        merged = self.info.get_hf_config().vision_config.spatial_merge_size ** 2
        return {
            modality: [
                budget.count(h * w // merged)
                for _, h, w in _grids(processed[f"{modality}_grid_thw"])
            ]
            for modality, pixels in _PIXELS.items()
            if processed.get(pixels) is not None
        }

    def shortened(self, tokens: Any, retained: int, item: Mapping[str, Any]) -> Any:
        if "video_grid_thw" not in item:
            return tokens[:retained]
        if isinstance(tokens, list):  # Qwen2.5-VL: frame after frame
            ((frames, _, _),) = _grids(item["video_grid_thw"].data.view(1, 3))
            return tokens[: frames * retained]
        video = self.info.get_hf_config().video_token_id
        kept, run = [], 0
        for token in tokens.full:  # Qwen3-VL: each frame between a time and an end token
            run = run + 1 if token == video else 0
            if run <= retained:
                kept.append(token)
        return PromptUpdateDetails.select_token_id(kept, video)

    def ahead(self, retained: int, item: Mapping[str, Any]) -> int:
        modality = "video" if "video_grid_thw" in item else "image"
        ((frames, height, width),) = _grids(item[f"{modality}_grid_thw"].data.view(1, 3))
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        size = (frames, height // merge, width // merge)
        return self.positions(size, item) - frames * retained

    def positions(self, size: Grid, item: Mapping[str, Any]) -> int:
        """Positions that an image or video takes: the length of its longest side.

        Args:
            size: frames, rows and columns of merged tokens; item: its processed fields.
        """
        _, height, width = size
        if "video_grid_thw" not in item:
            return max(height, width)
        (times,) = _times_of_frames(
            self.info.get_hf_config(), item.get("second_per_grid_ts"), [size]
        )
        return max(height, width, int(times[-1]) + 1)

    def check_tokens(self, tokens: Sequence[int], places: Sequence[Any]) -> None:
        # `write_places` finds the tokens of pictures by their ids.
        config = self.info.get_hf_config()
        end = max(place.start_idx + place.length for place in places)
        text: list[int | None] = list(tokens[:end])
        for place in places:
            text[place.start_idx : place.start_idx + place.length] = [None] * place.length
        for token in (config.image_token_id, config.video_token_id):
            if token in text:
                name = self.info.get_tokenizer().decode([token])
                raise ValueError(
                    f"{KEY}: the text before a picture has the token {name!r}, which stands for a "
                    "picture: write it in another way, or after the pictures"
                )

    def check_positions(self, ahead: int) -> None:
        model_config = self.info.ctx.model_config
        there = min(_rotary_positions(model_config.hf_config), LIMIT)
        if ahead + model_config.max_model_len > there:
            raise ValueError(
                f"{KEY}: the pictures of this prompt take {ahead} positions more than tokens, and "
                f"--max-model-len {model_config.max_model_len} leaves "
                f"{there - model_config.max_model_len} of {there}: send fewer pictures, or keep "
                "more of each"
            )


def _rotary_positions(hf_config: Any) -> int:
    """A lower bound of the positions that a language model has rotary embeddings for."""
    # vLLM's factor for video pruning, whose positions are those of the unpruned prompt as well.
    return 4 * int(hf_config.get_text_config().max_position_embeddings)


def _times_of_frames(hf_config: Any, seconds: Any, sizes: Sequence[Grid]) -> list[Tensor]:
    """Offset of each frame from the first, in positions, (t,) int64 per video.

    With the arithmetic of `get_mrope_input_positions`, for models that read videos frame by frame.

    Args:
        seconds: between frames, of each video; None if the model does not use them.
    """
    per_second = getattr(hf_config.vision_config, "tokens_per_second", 1.0)
    seconds = getattr(seconds, "data", seconds)  # a field of an item, or of a batch
    steps = [1.0] * len(sizes) if seconds is None else torch.as_tensor(seconds).view(-1).tolist()
    return [
        (torch.arange(t).double() * (step * per_second)).long()
        for (t, _, _), step in zip(sizes, steps, strict=True)
    ]


class _Scored:
    """A vision transformer whose tokens carry their scores in extra channels, for gathering over
    ranks.

    The bits of a float32 score take as many channels as needed in the type of the tokens.
    """

    def __init__(
        self, visual: Any, encode: Callable[[Tensor, Sequence[Grid]], tuple[Tensor, Tensor]]
    ) -> None:
        self.parameters, self._encode = visual.parameters, encode
        self.spatial_merge_size = visual.spatial_merge_size
        dtype = next(visual.parameters()).dtype
        self.out_hidden_size = visual.out_hidden_size + torch.float32.itemsize // dtype.itemsize

    def __call__(self, pixels: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        tokens, scores = self._encode(pixels, [(t, h, w) for t, h, w in grids])
        return torch.cat([tokens, scores.unsqueeze(1).view(tokens.dtype)], 1)


def _without_scores(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and scores from the output of a _Scored."""
    channels = torch.float32.itemsize // tokens.dtype.itemsize
    scores = tokens[:, -channels:].contiguous().view(torch.float32)
    return tokens[:, :-channels], scores.squeeze(1)


class _PrunedQwen(PrunedModel):
    """Shared by all generations."""

    drafts = ("ngram",)
    no_other_drafts = "the look-ahead of a draft model would shift the positions of retained tokens"
    config: Any
    visual: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # The runner recomputes positions only if vLLM's own video pruning is on. It is off here, so
        # only the method that the runner calls to check is overridden, for this configuration and
        # before the model sizes its rotary tables by it.
        multimodal = vllm_config.model_config.multimodal_config
        object.__setattr__(multimodal, "is_multimodal_pruning_enabled", _always)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for module in self.modules():
            if isinstance(module, MRotaryEmbedding):
                there, needed = len(module.cos_sin_cache), _rotary_positions(self.config)
                if there < needed:
                    raise UnsupportedModelError(
                        f"{KEY}: the rotary embedding has {there} positions, and positions of a "
                        f"pruned prompt go up to {needed}"
                    )

    @classmethod
    def check(cls, hf_config: Any) -> None:
        full = getattr(hf_config.vision_config, "fullatt_block_indexes", None)
        if full is not None and not len(full):
            raise UnsupportedModelError(
                f"{KEY}: the vision transformer has no block with full attention: scores of "
                "different windows do not compare"
            )

    @classmethod
    def refused_options(cls, vllm_config: VllmConfig) -> dict[str, tuple[bool, str]]:
        multimodal = vllm_config.model_config.multimodal_config
        return {
            **super().refused_options(vllm_config),
            "--video-pruning-rate": (
                bool(multimodal.video_pruning_rate),
                "a video cannot be pruned twice",
            ),
            "--enable-prompt-embeds": (
                vllm_config.model_config.enable_prompt_embeds,
                "embeddings of a prompt have no positions of a picture's tokens",
            ),
            "pipeline parallelism": (
                vllm_config.parallel_config.pipeline_parallel_size > 1,
                "only its first stage has the positions of retained tokens",
            ),
            "model runner V1 on this vLLM's CPU backend": (
                not _positions_are_recomputed(vllm_config),
                "it never updates positions",
            ),
            "compile_mm_encoder": (
                vllm_config.compilation_config.compile_mm_encoder,
                "a compiled encoder does not call the hook that reads its attention",
            ),
        }

    # ----------------------------------------------------------------------------- the embeddings
    def embed_multimodal(self, **kwargs: Any) -> Any:
        """(T, C + CHANNELS) of the retained tokens of each image and video."""
        retained = {modality: kwargs.pop(name, None) for modality, name in RETAINED.items()}
        embeddings: list[Tensor] = []
        inputs: Mapping[str, Any] = self._parse_and_validate_multimodal_inputs(**kwargs)
        for name, given in inputs.items():
            modality = name.removesuffix("s")
            if retained[modality] is not None:
                embeddings += self._pruned(modality, given, counts_of(retained[modality]))
            else:  # embeddings passed by the client
                encode = getattr(self, f"_process_{modality}_input")
                embeddings += [without_places(item) for item in encode(given)]
        return tuple(embeddings)

    def _pruned(self, modality: str, given: Any, counts: list[int]) -> list[Tensor]:
        """(T, C + CHANNELS) of each item, with these numbers of retained tokens per picture."""
        merge = int(self.visual.spatial_merge_size)
        grids = _grids(given[f"{modality}_grid_thw"])
        sizes = [(t, h // merge, w // merge) for t, h, w in grids]
        lengths = [t * h * w for t, h, w in sizes]
        times = self._times(given, sizes)
        pixels = given[_PIXELS[modality]].split([length * merge**2 for length in lengths])
        embeddings: list[Tensor] = []
        for part in encoder_batches(lengths, self.encoder_tokens):
            whole, scores = self._encode(torch.cat(pixels[part]), grids[part])
            # The features of earlier blocks that Qwen3-VL appends are not used for selection.
            main = whole[:, : self.config.get_text_config().hidden_size]
            items = list(zip(sizes[part], counts[part], strict=True))
            _, rows = self.choose(
                main,
                scores,
                [h * w for (t, h, w), _ in items for _ in range(t)],
                [count for (t, _, _), count in items for _ in range(t)],
            )
            of_items = [t * count for (t, _, _), count in items]
            starts = itertools.accumulate(lengths[part], initial=0)
            kept = zip(rows.split(of_items), starts, sizes[part], times[part], strict=False)
            for own, start, (_, height, width), time in kept:
                where = own - start
                frame, cell = where // (height * width), where % (height * width)
                offsets = async_tensor_h2d(time, device=frame.device)  # the host does not wait
                place = [offsets[frame], cell // width, cell % width]
                embeddings.append(with_places(whole[own], torch.stack(place, 1)))
        return embeddings

    def _times(self, given: Any, sizes: Sequence[Grid]) -> list[Tensor]:
        """Offset of each frame from the first, in positions, (t,) int64 per item."""
        return _times_of_frames(self.config, given.get("second_per_grid_ts"), sizes)

    def _encode(self, pixels: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, Tensor]:
        """Runs the vision transformer, on every rank or (`--mm-encoder-tp-mode data`) each picture
        on one rank.

        Args:
            pixels: (patches, values) of images or videos; grids: of each.

        Returns:
            (T, C) merged tokens and (T,) float32 attention received within the picture.
        """
        if not self.use_data_parallel:
            return self._encode_here(pixels, grids)
        scored = _Scored(self.visual, self._encode_here)
        of_items = run_dp_sharded_mrope_vision_model(
            scored, pixels, [list(grid) for grid in grids], rope_type="rope_3d"
        )
        return _without_scores(torch.cat(list(of_items)))

    def _encode_here(self, pixels: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, Tensor]:
        """`_encode` of this rank's pictures."""
        blocks = self.visual.blocks
        last = getattr(self.visual, "fullatt_block_indexes", [len(blocks) - 1])[-1]
        attention = blocks[last].attn
        with AttentionTap(attention.attn) as tap:
            encoded = self.visual(pixels, [list(grid) for grid in grids])
        q, k = (x.squeeze(0) for x in tap.take())  # (patches, H, D), rotary embedding applied
        pictures = (h * w for t, h, w in grids for _ in range(t))
        bounds = list(itertools.accumulate(pictures, initial=0))
        scale = attention.hidden_size_per_attention_head**-0.5
        with self.timing("scoring"):
            scores = selection.received_attention(q, k, scale, bounds)
            scores = over_all_heads(scores, attention.tp_size)
            scores = scores.view(-1, self.visual.spatial_merge_size**2).mean(-1)
            scores = self._in_raster_order(scores, grids)
        return encoded, scores

    def _in_raster_order(self, scores: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Reorders scores (T,) of merged tokens from the order of the blocks to that of the
        embeddings."""
        return scores

    # ------------------------------------------------------------------------------ the positions
    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Positions (3, L) of a pruned prompt, and the RoPE delta of the answer.

        Exact except for the height and width of retained tokens, which `recompute_mrope_positions`
        sets when the images have been encoded.
        """
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        visual = (self.config.image_token_id, self.config.video_token_id)
        pictures = [self._picture(feature) for feature in features]
        unpruned = Unpruned.of(input_tokens, features, pictures, visual)
        positions, ahead = super().get_mrope_input_positions(unpruned.tokens, unpruned.features)
        missing = len(unpruned.tokens) - len(input_tokens)
        return positions[:, unpruned.columns], ahead + missing

    def _picture(self, feature: Any) -> tuple[int, int]:
        """Retained tokens and all tokens of each picture of an image or video."""
        ((_, h, w),) = _grids(feature.data[f"{feature.modality}_grid_thw"].data.view(1, 3))
        whole = h * w // int(self.visual.spatial_merge_size) ** 2
        kept = feature.data.get(RETAINED[feature.modality])
        return (whole if kept is None else int(kept.data)), whole

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Called by the runner before each step of a prompt.

        Returns:
            The embeddings without their extra channels, the positions (3, L), and the RoPE delta.
        """
        with gpu_sync_allowed():  # the host needs the RoPE delta
            if multimodal_embeddings:
                visual = (self.config.image_token_id, self.config.video_token_id)
                mrope_positions = write_places(
                    input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens, visual
                )
            ahead = int(mrope_positions.max()) + 1 - mrope_positions.shape[1]
        return [x[:, :-CHANNELS] for x in multimodal_embeddings], mrope_positions, ahead


class _Info2(PrunedInfo, Qwen2VLProcessingInfo):
    pass


class _Processor2(_Processor, Qwen2VLMultiModalProcessor):
    pass


class _Info25(PrunedInfo, Qwen2_5_VLProcessingInfo):
    pass


class _Processor25(_Processor, Qwen2_5_VLMultiModalProcessor):
    pass


class _Processor3(_Processor, Qwen3VLMultiModalProcessor):
    def positions(self, size: Grid, item: Mapping[str, Any]) -> int:
        frames, height, width = size  # each frame is a picture, its time is text
        return frames * max(height, width)


class _Info3(PrunedInfo, Qwen3VLProcessingInfo):
    pass


class _Info3Moe(PrunedInfo, Qwen3VLMoeProcessingInfo):
    pass


class _Info35(PrunedInfo, Qwen3_5ProcessingInfo):
    pass


class _Info35Moe(PrunedInfo, Qwen3_5MoeProcessingInfo):
    pass


@register_processor(_Info2, _Processor2)
class PrunedQwen2VL(_PrunedQwen, Qwen2VLForConditionalGeneration):
    """`Qwen2VLForConditionalGeneration` with k visual tokens per image or frame."""

    stock = Qwen2VLForConditionalGeneration
    supports_multimodal_pruning = True  # so that the runner recomputes positions


@register_processor(_Info25, _Processor25)
class PrunedQwen25VL(_PrunedQwen, Qwen2_5_VLForConditionalGeneration):
    """`Qwen2_5_VLForConditionalGeneration` with k visual tokens per image or frame."""

    stock = Qwen2_5_VLForConditionalGeneration

    def _in_raster_order(self, scores: Tensor, grids: Sequence[Grid]) -> Tensor:
        # The blocks process the patches window by window.
        orders = []
        for (t, h, w), start in zip(
            grids, itertools.accumulate((t * h * w for t, h, w in grids), initial=0), strict=False
        ):
            index, _ = self.visual.get_window_index_thw(t, h, w)
            orders.append(index + start // self.visual.spatial_merge_unit)
        order = async_tensor_h2d(torch.cat(orders), device=scores.device)
        return torch.empty_like(scores).scatter_(0, order, scores)


class _Experts(_PrunedQwen):
    """The models with a mixture of experts."""

    @classmethod
    def refused_options(cls, vllm_config: VllmConfig) -> dict[str, tuple[bool, str]]:
        return {
            **super().refused_options(vllm_config),
            "LoRA": (
                vllm_config.lora_config is not None,
                "adapters of experts run on GPUs only and are untested there",
            ),
        }


class _PrunedQwen3(_PrunedQwen):
    """The models with Qwen3-VL's vision transformer and prompts."""

    def _times(self, given: Any, sizes: Sequence[Grid]) -> list[Tensor]:
        # The time of a frame is text before it.
        return [torch.zeros(t, dtype=torch.long) for t, _, _ in sizes]


@register_processor(_Info3, _Processor3)
class PrunedQwen3VL(_PrunedQwen3, Qwen3VLForConditionalGeneration):
    """`Qwen3VLForConditionalGeneration` with k visual tokens per image or frame."""

    stock = Qwen3VLForConditionalGeneration


@register_processor(_Info3Moe, _Processor3)
class PrunedQwen3VLMoe(_Experts, _PrunedQwen3, Qwen3VLMoeForConditionalGeneration):
    """`Qwen3VLMoeForConditionalGeneration` with k visual tokens per image or frame."""

    stock = Qwen3VLMoeForConditionalGeneration


@register_processor(_Info35, _Processor3)
class PrunedQwen35(_PrunedQwen3, Qwen3_5ForConditionalGeneration):
    """`Qwen3_5ForConditionalGeneration` with k visual tokens per image or frame."""

    stock = Qwen3_5ForConditionalGeneration


@register_processor(_Info35Moe, _Processor3)
class PrunedQwen35Moe(_Experts, _PrunedQwen3, Qwen3_5MoeForConditionalGeneration):
    """`Qwen3_5MoeForConditionalGeneration` with k visual tokens per image or frame."""

    stock = Qwen3_5MoeForConditionalGeneration
