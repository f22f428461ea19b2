"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures of any size, merged 2 x 2, with grid positions.

The vision transformer has no [CLS]: a patch is scored by the attention it receives in the last
block with full attention, and the four scores of a merged token are averaged. Retained tokens keep
their time, height and width positions of the unpruned prompt.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..clock import Clock
from ..report import Kept
from ..selection import Budget
from ..taps import RotaryTap
from . import costs
from .base import Encoded, Family, PromptPositions, UnsupportedModelError, keep_rows, taken

_VIDEO_SECONDS = "second_per_grid_ts"  # for the positions of videos, not for their encoder


class QwenVL(Family):
    """`Qwen2VL...`, `Qwen2_5_VL...` and `Qwen3VLForConditionalGeneration`."""

    encoders: ClassVar[Mapping[str, str]] = {
        "image": "get_image_features",
        "video": "get_video_features",
    }

    model_types: ClassVar[tuple[str, ...]] = (
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "qwen3_vl_moe",
        "qwen3_5",
        "qwen3_5_moe",
    )
    harness: ClassVar[tuple[tuple[str, str, tuple[str, ...]], ...]] = (
        ("qwen2_vl", "Qwen2_VL", ("simple",)),
        ("qwen2_5_vl", "Qwen2_5_VL", ("simple", "chat")),
        ("qwen3_vl", "Qwen3_VL", ("simple", "chat")),
    )
    vllm: ClassVar[Mapping[str, str]] = {
        "Qwen2VLForConditionalGeneration": "qwen_vl:PrunedQwen2VL",
        "Qwen2_5_VLForConditionalGeneration": "qwen_vl:PrunedQwen25VL",
        "Qwen3VLForConditionalGeneration": "qwen_vl:PrunedQwen3VL",
        "Qwen3VLMoeForConditionalGeneration": "qwen_vl:PrunedQwen3VLMoe",
        "Qwen3_5ForConditionalGeneration": "qwen_vl:PrunedQwen35",
        "Qwen3_5MoeForConditionalGeneration": "qwen_vl:PrunedQwen35Moe",
    }
    has_grid_positions = True
    ragged = frozenset({"image", "video"})

    def __init__(self, model: Any, budget: Budget, **options: str) -> None:
        super().__init__(model, budget, **options)
        if "video" in self.encoders:
            self.parameters["video"] += (_VIDEO_SECONDS,)
        visual = self.base.visual
        blocks = visual.blocks
        full = getattr(visual, "fullatt_block_indexes", None)
        if full is not None and not len(full):
            raise UnsupportedModelError(
                "the vision transformer has no block with full attention: scores of "
                "different windows are not comparable"
            )
        self.windowed = full is not None
        self.attention = blocks[full[-1] if full is not None else -1].attn
        self.merge = int(visual.spatial_merge_size)

    @classmethod
    def picture(cls, config: Any, height: int, width: int) -> dict[str, Any]:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        vision = config.vision_config
        patch = int(vision.patch_size)
        factor = patch * int(vision.spatial_merge_size)
        # The limits of the published processors, in merged tokens.
        least = 64 if config.model_type.startswith("qwen3") else 4
        limits = {"min_pixels": least * factor**2, "max_pixels": 16384 * factor**2}
        rows, columns = (x // patch for x in smart_resize(height, width, factor, **limits))
        channels = 3 * int(vision.temporal_patch_size) * patch**2
        return {
            "pixel_values": torch.empty(rows * columns, channels, device="meta"),
            "image_grid_thw": torch.tensor([[1, rows, columns]]),
        }

    @classmethod
    def vision_flops(cls, config: Any, inputs: Mapping[str, Any], projected: int) -> int:
        return costs.merged_patches(config, inputs)

    @property
    def modeling(self) -> Any:
        """The module of transformers that the model is defined in."""
        return sys.modules[type(self.base.visual).__module__]

    def _grids(self, modality: str, inputs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        """(frames, rows, columns) of patches of each item."""
        grid = inputs.get(f"{modality}_grid_thw")
        if grid is None:
            raise ValueError(f"{modality}_grid_thw must come with the pixels of {modality}s")
        if not isinstance(grid, Tensor):
            raise ValueError(
                f"{modality}_grid_thw must be a tensor of shape (items, 3), got a "
                f"{type(grid).__name__}: pass what the processor returns with return_tensors='pt'"
            )
        return [(int(t), int(h), int(w)) for t, h, w in grid.tolist()]

    def placeholders(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        grids = self._grids(modality, inputs)
        patches = [t * h * w for t, h, w in grids]
        rows = len(inputs[str(self.pixels_name(modality, inputs))])
        if sum(patches) != rows:
            raise ValueError(
                f"{modality}_grid_thw describes {sum(patches)} patches, the pixels have {rows}"
            )
        return [count // self.merge**2 for count in patches]

    def kept(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        grids = self._grids(modality, inputs)
        return [t * self.budget.count(h * w // self.merge**2) for t, h, w in grids]

    def take(
        self, modality: str, inputs: Mapping[str, Any], items: Sequence[int]
    ) -> dict[str, Any]:
        name = str(self.pixels_name(modality, inputs))
        patches = [t * h * w for t, h, w in self._grids(modality, inputs)]
        parts = inputs[name].split(patches)
        fewer = {name: torch.cat([parts[item] for item in items]) if items else inputs[name][:0]}
        for other in (f"{modality}_grid_thw", _VIDEO_SECONDS):
            if other in inputs:
                fewer[other] = taken(inputs[other], items)
        return {**inputs, **fewer}

    def encode(self, modality: str, inputs: Mapping[str, Any], clock: Clock) -> Encoded:
        grids = self._grids(modality, inputs)
        arguments = {name: value for name, value in inputs.items() if name != _VIDEO_SECONDS}
        rotary = self.modeling.apply_rotary_pos_emb_vision
        with ExitStack() as stack:
            tap = RotaryTap(self.attention, rotary, stack)
            with clock("vision"):
                encoder = getattr(self.base, self.encoders[modality])
                output = encoder(**arguments, return_dict=True)
            with clock("score"):
                # Attention stays within a frame.
                scores = tap.scores([h * w for t, h, w in grids for _ in range(t)])
                scores = scores.view(-1, self.merge**2).mean(-1)
                if self.windowed:
                    scores = scores[self._raster_order(inputs[f"{modality}_grid_thw"])]
        with clock("select"):
            sizes = [(t, h // self.merge, w // self.merge) for t, h, w in grids]
            lengths = [h * w for t, h, w in sizes for _ in range(t)]
            counts = self.budget.counts(scores, lengths)
            frames = iter(counts)
            kept_of = [tuple(itertools.islice(frames, t)) for t, _, _ in sizes]
            after = [sum(own) for own in kept_of]
            features = torch.cat(list(output.pooler_output))
            kept, rows = self.budget.select_packed(features, scores, lengths, counts)
            output.pooler_output = kept.split(after)
            self._keep_deepstack(output, rows, after)

        items, start = [], 0
        for size, own, kept_counts in zip(sizes, rows.split(after), kept_of, strict=True):
            t, h, w = size
            cells = t * h * w
            items.append(
                Kept(
                    modality,
                    own - start,
                    size if modality == "video" else size[1:],
                    before=cells,
                    after=len(own),
                    scores=scores[start : start + cells],
                    lengths=(h * w,) * t,
                    ranked=tuple(map(self.budget.ranked, kept_counts)),
                )
            )
            start += cells
        return Encoded(output, keep_rows(rows, start), tuple(items))

    def _raster_order(self, grid: Tensor) -> Tensor:
        """Index of each merged token, in raster order, within the order of the windows."""
        visual = self.base.visual
        index, _ = self.modeling.get_vision_window_index(
            grid,
            spatial_merge_size=visual.spatial_merge_size,
            window_size=visual.window_size,
            patch_size=visual.patch_size,
            kwargs={},
        )
        return torch.argsort(index)

    @staticmethod
    def _keep_deepstack(output: Any, rows: Tensor, after: list[int]) -> None:
        """Qwen3-VL's features of earlier blocks: a tensor per layer, since 5.18 one per image."""
        layers = getattr(output, "deepstack_features", None)
        if layers is None:
            return
        kept = []
        for layer in layers:
            whole = layer if isinstance(layer, Tensor) else torch.cat(list(layer))
            own = whole[rows.to(whole.device)]  # the merger may be on another GPU
            kept.append(own if isinstance(layer, Tensor) else own.split(after))
        output.deepstack_features = kept

    # ------------------------------------------------------------------------------ the positions
    def positions(self, ids: Tensor, mask: Tensor, call: Mapping[str, Any]) -> PromptPositions:
        kinds = torch.zeros_like(ids)
        for kind, modality in enumerate(self.encoders, start=1):
            kinds = kinds.masked_fill(ids == self.token_id(modality), kind)
        accepted = inspect.signature(self.base.get_rope_index).parameters
        names = [name for name in ("image_grid_thw", "video_grid_thw", _VIDEO_SECONDS)
                 if name in accepted and call.get(name) is not None]  # fmt: skip
        positions, delta = self.base.get_rope_index(
            ids,
            mm_token_type_ids=kinds,
            attention_mask=mask,
            **{name: call[name] for name in names},
        )
        rope_end = delta[:, 0] + mask.long().sum(1)
        # The positions of text after a video do not depend on the video's duration.
        columns = torch.arange(ids.shape[1], device=ids.device)
        last = (columns * mask).argmax(1, keepdim=True)
        text = positions[0].gather(1, last)[:, 0] + 1
        return PromptPositions(
            positions, torch.where(kinds.gather(1, last)[:, 0] == 0, text, rope_end), rope_end
        )

    def set_rope_delta(self, delta: Tensor) -> None:
        self.base.rope_deltas = delta

    def rope_delta(self) -> Tensor | None:
        delta: Tensor | None = self.base.rope_deltas
        return delta

    def embeddings_of(self, ids: Tensor, outputs: Mapping[str, Any]) -> dict[str, Any]:
        ready = super().embeddings_of(ids, outputs)
        deep = {m: getattr(output, "deepstack_features", None) for m, output in outputs.items()}
        deep = {modality: layers for modality, layers in deep.items() if layers is not None}
        if not deep:
            return ready
        embeds = ready["inputs_embeds"]
        slots = {modality: (ids == self.token_id(modality)).to(embeds.device) for modality in deep}
        visual = torch.stack(list(slots.values())).any(0)
        ready["visual_pos_masks"] = visual
        ready["deepstack_visual_embeds"] = []
        for parts in zip(*deep.values(), strict=True):
            filled = torch.zeros_like(embeds)
            for modality, part in zip(deep, parts, strict=True):
                flat = part if isinstance(part, Tensor) else torch.cat(list(part))
                filled = filled.masked_scatter(slots[modality].unsqueeze(-1), flat.to(filled))
            ready["deepstack_visual_embeds"].append(filled[visual])
        return ready
