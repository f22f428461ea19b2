"""LLaVA-NeXT: an image has an overview and tiles, without padding and with line ends."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..clock import Clock
from ..report import Kept
from ..selection import Budget
from ..taps import in_this_thread
from .base import Encoded, UnsupportedModelError, packed, taken
from .towers import TowerFamily


class TiledFamily(TowerFamily):
    """Images cut into tiles that the model packs into one sequence."""

    on_host = frozenset({"image_sizes"})

    def __init__(self, model: Any, budget: Budget, **options: str) -> None:
        super().__init__(model, budget, **options)
        self._refuse_cls({})

    @classmethod
    def picture(cls, config: Any, height: int, width: int) -> dict[str, Any]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        side = config.vision_config.image_size
        tiles = image_size_to_num_patches([height, width], config.image_grid_pinpoints, side)
        return {
            "pixel_values": torch.empty(1, tiles, 3, side, side, device="meta"),
            "image_sizes": torch.tensor([[height, width]]),
        }

    @property
    def modeling(self) -> Any:
        """The module of transformers that the model is defined in."""
        return sys.modules[type(self.base).__module__]

    def _refuse_cls(self, inputs: Mapping[str, Any]) -> None:
        if self.extra("image", inputs):
            raise UnsupportedModelError(
                "vision_feature_select_strategy='full' adds [CLS] to the grid of patches: use "
                "'default'"
            )

    def tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        """Tiles of each image, the overview included."""
        sizes = inputs.get("image_sizes")
        if sizes is None:
            raise ValueError("image_sizes must come with pixel_values")
        self._refuse_cls(inputs)
        return [
            self.modeling.image_size_to_num_patches(
                size, self.config.image_grid_pinpoints, self.config.vision_config.image_size
            )
            for size in sizes
        ]

    def take(
        self, modality: str, inputs: Mapping[str, Any], items: Sequence[int]
    ) -> dict[str, Any]:
        if modality != "image":
            return super().take(modality, inputs, items)
        pixels = inputs["pixel_values"]
        if pixels.dim() == 5:
            pixels = pixels[list(items)]
        else:  # the tiles of all images, one after the other
            parts = pixels.split(self.tiles(inputs))
            pixels = torch.cat(taken(parts, items))
        sizes = taken(inputs["image_sizes"], items)
        return {**inputs, "pixel_values": pixels, "image_sizes": sizes}

    def check_pixels(self, pixels: Tensor, tiles: list[int]) -> None:
        """Raises ValueError unless the pixels have the tiles that the image sizes require."""
        if pixels.dim() == 5:
            fits = len(pixels) == len(tiles) and max(tiles, default=0) <= pixels.shape[1]
        else:
            fits = len(pixels) == sum(tiles)
        if not fits:
            raise ValueError(
                f"pixel_values of shape {tuple(pixels.shape)} do not have the {tiles} tiles that "
                "image_sizes require"
            )

    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches of a tile."""
        vision = self.config.vision_config
        side = int(vision.image_size) // int(vision.patch_size)
        return side, side

    def pack(
        self, channels: list[Tensor], inputs: Mapping[str, Any], line_end: Tensor
    ) -> list[Tensor]:
        """Packs channels (tiles, N, c) of each image like its features, to (T, c)."""
        packed, _ = self.base.pack_image_features(
            channels,
            inputs["image_sizes"],
            vision_feature_select_strategy=self.setting("vision_feature_select_strategy", inputs),
            image_newline=line_end,
        )
        return list(packed)

    def _blank(self, tiles: list[int], inputs: Mapping[str, Any]) -> list[Tensor]:
        """Packed images with 1 at line ends and 0 at patches, (T, 1) each."""
        rows, columns = self.patches()
        blank = [torch.zeros(count, rows * columns, 1) for count in tiles]
        return self.pack(blank, inputs, torch.ones(1))

    def packed_lengths(self, tiles: list[int], inputs: Mapping[str, Any]) -> list[int]:
        """Tokens of each image in an unpruned prompt."""
        return [len(image) for image in self._blank(tiles, inputs)]

    def line_ends(self, tiles: list[int], inputs: Mapping[str, Any]) -> list[int]:
        """Tokens of each image that end a line of patches."""
        return [int(image.sum()) for image in self._blank(tiles, inputs)]


class LlavaNext(TiledFamily):
    """`LlavaNextForConditionalGeneration` with a CLIP tower.

    k tokens of each tile are selected. With `tiles="unpad"` (the default), selected tokens on
    padding are removed and the lines of the tiled image keep their ends, as in the unpruned model.
    With `tiles="all"`, an image has exactly tiles x k tokens and no line ends, as in the authors'
    code.
    """

    model_types = ("llava_next",)
    vllm: ClassVar[Mapping[str, str]] = {
        "LlavaNextForConditionalGeneration": "llava_next:PrunedLlavaNext"
    }
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"tiles": ("unpad", "all")}
    ragged = frozenset({"image"})

    def placeholders(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        tiles = self.tiles(inputs)
        self.check_pixels(inputs["pixel_values"], tiles)
        lengths = self.packed_lengths(tiles, inputs)
        if self.chosen["tiles"] == "all" and not self.budget.auto:  # else after the scores
            for item, counts in enumerate(zip(self._chosen(tiles), lengths, strict=True)):
                self._check_fits(f"image {item}", *counts)
        return lengths

    def _check_fits(self, image: str, wanted: int, length: int) -> None:
        """Raises ValueError if tiles="all" gives an image more tokens than it has placeholders."""
        if wanted > length:
            setting = "mass or max_k" if self.budget.auto else "k"
            raise ValueError(
                f"tiles='all' gives {image} {wanted} tokens, more than the {length} of the "
                f"unpruned model: lower {setting} or use tiles='unpad'"
            )

    def _chosen(self, tiles: list[int]) -> list[int]:
        """Selected patches of each image, including those on padding."""
        rows, columns = self.patches()
        return [count * self.budget.count(rows * columns) for count in tiles]

    def kept(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        tiles = self.tiles(inputs)
        counts = self._chosen(tiles)
        if self.chosen["tiles"] == "all":
            return counts
        lengths = self.packed_lengths(tiles, inputs)
        ends = self.line_ends(tiles, inputs)
        # Tokens on padding are removed, selected or not.
        return [min(n + end, length) for n, end, length in zip(counts, ends, lengths, strict=True)]

    def projected(self, modality: str, inputs: Mapping[str, Any]) -> int:
        return sum(self._chosen(self.tiles(inputs)))

    def encode(self, modality: str, inputs: Mapping[str, Any], clock: Clock) -> Encoded:
        patches = self.patches()[0] * self.patches()[1]
        indices = scores = projected = torch.empty(0)
        counts: list[int] = []

        def prune(features: Tensor, attention: Tensor) -> Tensor:
            nonlocal indices, scores, counts
            kept, indices, counts = self.select(features, attention)
            scores = attention
            return kept

        def spread(module: nn.Module, args: object, output: Tensor) -> Tensor:
            """Fills dropped patches with zeros, because packing needs whole tiles."""
            nonlocal projected
            projected = output
            first = patches * torch.arange(len(output), device=indices.device).unsqueeze(1)
            rows = packed(indices + first, counts).to(output.device)
            empty = output.new_zeros((len(output) * patches, output.shape[-1]))
            whole = empty.index_copy(0, rows, packed(output, counts))
            return whole.unflatten(0, (-1, patches))

        handle = self.base.multi_modal_projector.register_forward_hook(in_this_thread(spread))
        try:
            with self.projecting(modality, inputs, clock, prune), clock("vision"):
                output = self.base.get_image_features(**inputs, return_dict=True)
        finally:
            handle.remove()
        with clock("select"):
            return self._packed(output, indices, counts, scores, projected, inputs)

    def _packed(
        self,
        output: Any,
        indices: Tensor,
        counts: list[int],
        scores: Tensor,
        projected: Tensor,
        inputs: Mapping[str, Any],
    ) -> Encoded:
        """The retained tokens of each image, and their placeholders.

        Args:
            indices: (tiles of all images, k) selected patches; counts: their number per tile.
            scores: (tiles, N) of all patches; projected: (tiles, k, C) features of the selected.
        """
        grid = self.patches()
        patches = grid[0] * grid[1]
        tiles = self.tiles(inputs)
        # Two channels, packed like the features: 1 for a selected patch, and 1 + its index.
        chosen = torch.zeros((len(indices), patches), dtype=torch.float64, device=indices.device)
        chosen.scatter_(1, indices, 1.0)
        numbers = torch.arange(
            1, max(tiles) * patches + 1, device=chosen.device, dtype=chosen.dtype
        )
        channels = [
            torch.stack([own, numbers[: own.numel()].view_as(own)], -1)
            for own in chosen.split(tiles)
        ]
        line_end = torch.tensor([1.0, 0.0], dtype=torch.float64, device=chosen.device)
        features, keep, items = [], [], []
        remaining = iter(counts)
        tiled = [list(itertools.islice(remaining, count)) for count in tiles]
        marked = self.pack(channels, inputs, line_end)
        whole = zip(
            output.pooler_output,
            marked,
            channels,
            projected.split(tiles),
            scores.split(tiles),
            tiled,
            self._remaining(marked),
            strict=True,
        )
        for image, marks, own, alone, score, own_counts, (tokens, ends) in whole:
            if self.chosen["tiles"] == "all":
                self._check_fits("an image", sum(own_counts), len(marks))
                features.append(packed(alone, own_counts))
                where = _true(own[..., 0].flatten() > 0.5, sum(own_counts))
                stays = torch.arange(len(marks), device=marks.device) < len(features[-1])
            else:
                stays = marks[:, 0] > 0.5
                rows = _true(stays, tokens)
                features.append(image[rows.to(image.device)])
                where = marks[rows, 1].long().sort().values[ends:] - 1
            keep.append(stays)
            items.append(
                Kept(
                    "image",
                    where,
                    (len(own), *grid),
                    before=len(stays),
                    after=len(features[-1]),
                    scores=score.flatten(),
                    lengths=(patches,) * len(own),
                    ranked=tuple(map(self.budget.ranked, own_counts)),
                )
            )
        output.pooler_output = features
        return Encoded(output, torch.cat(keep), tuple(items))

    @staticmethod
    def _remaining(marked: list[Tensor]) -> list[tuple[int, int]]:
        """Remaining tokens of each image, and those of them that end a line: one wait for all."""
        counts = [
            torch.stack([(own[:, 0] > 0.5).sum(), ((own[:, 0] > 0.5) & (own[:, 1] < 0.5)).sum()])
            for own in marked
        ]
        return [(tokens, ends) for tokens, ends in torch.stack(counts).tolist()]


def _true(mask: Tensor, count: int) -> Tensor:
    """The indices of the `count` True elements of a mask; unlike nonzero without a wait."""
    return (~mask).int().argsort(stable=True)[:count]
