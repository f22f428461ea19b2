"""Tiny random models of every family, with prompts and a separate pruned run.

The separate run does not use `vispruner`: attention weights come from an eager tower, the tokens
from the reference, and the language model runs on the retained embeddings without a cache.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from vispruner_cuda import reference

IMAGE, VIDEO, START, END = 199, 198, 197, 196  # special tokens of a vocabulary of 200
PAD = 0


@dataclass(frozen=True)
class Item:
    """An image or video of the gallery."""

    kind: str  # "image" or "video"
    number: int


def image(number: int) -> Item:
    return Item("image", number)


def video(number: int) -> Item:
    return Item("video", number)


Row = Sequence[int | Item]


@dataclass(frozen=True)
class Auto:
    """k="auto" in exact integers, independent of `vispruner`."""

    mass: float
    max_k: int

    def __mul__(self, pictures: int) -> Auto:
        return Auto(self.mass, self.max_k * pictures)

    def count(self, scores: Tensor) -> int:
        """k for scores (N,) float32, all finite and at least one above 0."""
        values = scores.clamp_min(0)
        weights = sorted((round(2**24 * w) for w in (values / values.max()).tolist()), reverse=True)
        sums = list(itertools.accumulate(weights))
        least = next(r for r, held in enumerate(sums, start=1) if held >= self.mass * sums[-1])
        return min(least, self.max_k)


def prune(feats: Tensor, scores: Tensor, k: int | Auto) -> Tensor:
    """(B, N) bool of the reference's selection for feats (B, N, C), scores (B, N)."""
    keep = torch.zeros(feats.shape[:2], dtype=torch.bool)
    for own, one, score in zip(keep, feats.float(), scores.float(), strict=True):
        count = k if isinstance(k, int) else k.count(score)
        own[reference.prune(one[None], score[None], count).indices[0]] = True
    return keep


def llama(**changes: Any) -> Any:
    shape = {
        "vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return transformers.LlamaConfig(**{**shape, **changes})


def clip(**changes: Any) -> Any:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
             "num_attention_heads": 4, "image_size": 84, "patch_size": 14}  # fmt: skip
    return transformers.CLIPVisionConfig(**{**shape, **changes})


def siglip() -> Any:
    return transformers.SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        image_size=84, patch_size=14, vision_use_head=False,
    )  # fmt: skip


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Tiny:
    """A family: builds its model, its prompts and the expected results."""

    name: ClassVar[str]
    options: ClassVar[dict[str, str]] = {}
    kinds: ClassVar[tuple[str, ...]] = ("image",)
    #: float64 except for rotary tables and scores; logits are of order 1
    tolerance: ClassVar[float] = 1e-5

    def config(self) -> Any:
        raise NotImplementedError

    def architecture(self) -> Any:
        raise NotImplementedError

    def build(self, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> Any:
        """A model with the same weights every time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = self.config()
            config._attn_implementation = attention
            model = self.architecture()(config).double().eval()
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.data.normal_(0, 0.15)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the grouped product has no float64
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = None  # answers have the requested length
        return model.to(dtype)

    # --------------------------------------------------------------------------------- prompts
    def tokens(self, item: Item) -> list[int]:
        """The item's tokens in a prompt."""
        return [IMAGE if item.kind == "image" else VIDEO] * self.length(item)

    def length(self, item: Item) -> int:
        raise NotImplementedError

    def media(self, items: Sequence[Item]) -> dict[str, Any]:
        """Pixels and their accompanying arguments."""
        raise NotImplementedError

    def ids(self, row: Row) -> list[int]:
        return [
            token
            for part in row
            for token in (self.tokens(part) if isinstance(part, Item) else [part])
        ]

    def inputs(self, rows: Sequence[Row], side: str = "left") -> dict[str, Any]:
        """The processor's output for a batch."""
        lists = [self.ids(row) for row in rows]
        width = max(map(len, lists))
        padded, mask = [], []
        for tokens in lists:
            pad = width - len(tokens)
            left, right = (pad, 0) if side == "left" else (0, pad)
            padded.append([PAD] * left + tokens + [PAD] * right)
            mask.append([0] * left + [1] * len(tokens) + [0] * right)
        items = [part for row in rows for part in row if isinstance(part, Item)]
        call = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
        return call | self.typed(call["input_ids"]) | (self.media(items) if items else {})

    def typed(self, ids: Tensor) -> dict[str, Tensor]:
        return {}

    # ------------------------------------------------------------------------ the separate run
    def choose(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        """(T,) bool over the item's placeholders, and (T', C) features of the retained ones."""
        raise NotImplementedError

    def chosen(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        """`choose`, cached per item."""
        known = self.__dict__.setdefault("_chosen", {})
        if (item, k) not in known:
            with torch.no_grad():
                known[item, k] = self.choose(item, k)
        return known[item, k]

    def mask(self, model: Any, ids: Tensor, embeds: Tensor) -> Any:
        """The attention mask of the shortened prompt, ids (1, W), and of the answer."""
        return torch.ones(embeds.shape[:2], dtype=torch.long)

    def reader(self, model: Any) -> Any:
        """The language model."""
        return model.model.language_model

    def deepstack(self, item: Item, k: int | Auto) -> list[Tensor] | None:
        return None

    def positions(self, model: Any, ids: Tensor, row: Row) -> Tensor | None:
        """(3, 1, L) positions of the unpruned prompt, None where positions are consecutive."""
        return None

    def logits(self, model: Any, row: Row, k: int | Auto, answer: Sequence[int]) -> Tensor:
        """(T, V) logits of the shortened prompt and the answer, without a cache.

        Args:
            model: an unpruned model.
        """
        ids = torch.tensor([self.ids(row)])
        items = [part for part in row if isinstance(part, Item)]
        embeds = model.get_input_embeddings()(ids).clone()
        keep = torch.ones(ids.shape[1], dtype=torch.bool)
        places = self.positions(model, ids, row)
        deep: list[list[Tensor]] = []
        start = 0
        for part in row:
            if not isinstance(part, Item):
                start += 1
                continue
            own = [i for i, t in enumerate(self.tokens(part)) if t in (IMAGE, VIDEO)]
            where = torch.tensor(own) + start
            stays, features = self.chosen(part, k)
            keep[where] = stays
            embeds[0, where[stays]] = features
            start += len(self.tokens(part))
            if (layers := self.deepstack(part, k)) is not None:
                deep.append(layers)
        visual = ((ids == IMAGE) | (ids == VIDEO))[:, keep]
        embeds = embeds[:, keep]
        more = torch.tensor([list(answer)], dtype=torch.long)
        embeds = torch.cat([embeds, model.get_input_embeddings()(more)], 1)
        extra: dict[str, Any] = {}
        if places is not None:
            places = places[:, :, keep]
            following = places[0, 0, -1] + 1 + torch.arange(more.shape[1])
            extra["position_ids"] = torch.cat([places, following.expand(3, 1, -1)], 2)
        if deep and items:
            blank = torch.zeros_like(more, dtype=torch.bool)
            extra["visual_pos_masks"] = torch.cat([visual, blank], 1)
            extra["deepstack_visual_embeds"] = [
                torch.cat(layer) for layer in zip(*deep, strict=True)
            ]
        mask = self.mask(model, ids[:, keep], embeds)
        hidden = self.reader(model)(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, **extra
        ).last_hidden_state
        return model.lm_head(hidden)[0]


class Llava(Tiny):
    name = "llava"
    layer = -2
    has_cls = True

    def config(self) -> Any:
        return transformers.LlavaConfig(
            vision_config=clip(), text_config=llama(), image_token_id=IMAGE,
            vision_feature_layer=self.layer, vision_feature_select_strategy="default",
        )  # fmt: skip

    def architecture(self) -> Any:
        return transformers.LlavaForConditionalGeneration

    def length(self, item: Item) -> int:
        return 36

    def media(self, items: Sequence[Item]) -> dict[str, Any]:
        return {"pixel_values": torch.stack([noise(i.number, 3, 84, 84) for i in items])}

    def patches(self, pixels: Tensor, tower: str = "vision_tower") -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) features, (B, 1, C) of [CLS], (B, N) scores, from an eager tower."""
        model = self.build(attention="eager")
        out = getattr(model.model, tower)(pixels, output_attentions=True, output_hidden_states=True)
        hidden, weights = out.hidden_states[self.layer], out.attentions[self.layer]
        if not self.has_cls:
            return hidden, hidden[:, :0], weights.float().mean((1, 2))
        return hidden[:, 1:], hidden[:, :1], weights.float()[:, :, 0, 1:].mean(1)

    def choose(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        feats, _, scores = self.patches(self.media([item])["pixel_values"])
        keep = prune(feats, scores, k)
        return keep[0], self.build().model.multi_modal_projector(feats)[keep]


class LlavaSiglip(Llava):
    name = "llava-siglip"
    layer = -1
    has_cls = False

    def config(self) -> Any:
        return transformers.LlavaConfig(
            vision_config=siglip(), text_config=llama(), image_token_id=IMAGE,
            vision_feature_layer=self.layer, vision_feature_select_strategy="full",
        )  # fmt: skip


class LlavaWithCls(Llava):
    name = "llava-full"

    def config(self) -> Any:
        config = super().config()
        config.vision_feature_select_strategy = "full"
        return config

    def length(self, item: Item) -> int:
        return 37

    def choose(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        feats, cls, scores = self.patches(self.media([item])["pixel_values"])
        keep = torch.cat([torch.ones(1, 1, dtype=torch.bool), prune(feats, scores, k)], 1)
        return keep[0], self.build().model.multi_modal_projector(torch.cat([cls, feats], 1))[keep]


PINPOINTS = [[84, 168], [168, 84], [168, 168]]
_SIZES = [(75, 135), (150, 142), (60, 40), (84, 168)]  # height, width


class LlavaNext(Llava):
    name = "llava-next"

    def config(self) -> Any:
        return transformers.LlavaNextConfig(
            vision_config=clip(), text_config=llama(), image_token_id=IMAGE,
            vision_feature_layer=-2, vision_feature_select_strategy="default",
            image_grid_pinpoints=PINPOINTS,
        )  # fmt: skip

    def architecture(self) -> Any:
        return transformers.LlavaNextForConditionalGeneration

    def modeling(self) -> Any:
        return importlib.import_module(self.architecture().__module__)

    def size(self, item: Item) -> tuple[int, int]:
        return _SIZES[item.number % len(_SIZES)]

    def tiles(self, item: Item) -> int:
        size = torch.tensor(self.size(item))
        return self.modeling().image_size_to_num_patches(size, PINPOINTS, 84)

    def unpadded(self, item: Item, tiles: Tensor) -> Tensor:
        """(tiles, 36) without the overview to the (H, W) of the tiled image."""
        size = torch.tensor(self.size(item))
        high, wide = self.modeling().get_anyres_image_grid_shape(size, PINPOINTS, 84)
        grid = tiles.view(high, wide, 6, 6).permute(0, 2, 1, 3).reshape(1, high * 6, wide * 6)
        return self.modeling().unpad_image(grid, size)[0]

    def length(self, item: Item) -> int:
        grid = self.unpadded(item, torch.zeros(self.tiles(item) - 1, 36))
        return 36 + grid.shape[0] * (grid.shape[1] + 1)

    def media(self, items: Sequence[Item]) -> dict[str, Any]:
        most = max(self.tiles(item) for item in items)
        return {
            "pixel_values": torch.stack([noise(i.number, most, 3, 84, 84) for i in items]),
            "image_sizes": torch.tensor([self.size(item) for item in items]),
        }

    def tile_choice(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        """(tiles, 36) bool and (tiles, 36, C) features."""
        pixels = self.media([item])["pixel_values"][0, : self.tiles(item)]
        feats, _, scores = self.patches(pixels)
        return prune(feats, scores, k), self.build().model.multi_modal_projector(feats)

    def whole(self, item: Item) -> Tensor:
        """(T, C) features of the unpruned image."""
        model = self.build().model
        return model.get_image_features(**self.media([item]), return_dict=True).pooler_output[0]

    def choose(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        keep, _ = self.tile_choice(item, k)
        grid = self.unpadded(item, keep[1:])
        lines = torch.cat([grid, torch.ones(grid.shape[0], 1, dtype=torch.bool)], 1)
        stays = torch.cat([keep[0], lines.flatten()])
        return stays, self.whole(item)[stays]


class LlavaNextTiles(LlavaNext):
    name = "llava-next-all"
    options: ClassVar[dict[str, str]] = {"tiles": "all"}

    def choose(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        keep, projected = self.tile_choice(item, k)
        features = projected[keep]
        return torch.arange(self.length(item)) < len(features), features


class LlavaOnevision(LlavaNext):
    name = "llava-onevision"
    kinds = ("image", "video")
    layer = -1
    has_cls = False

    def config(self) -> Any:
        return transformers.LlavaOnevisionConfig(
            vision_config=siglip(), text_config=llama(), image_token_id=IMAGE,
            video_token_id=VIDEO, vision_feature_layer=-1, vision_feature_select_strategy="full",
            image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_2",
        )  # fmt: skip

    def architecture(self) -> Any:
        return transformers.LlavaOnevisionForConditionalGeneration

    def frames(self, item: Item) -> Tensor:
        return noise(100 + item.number, 2, 3, 84, 84)

    def pooled(self, item: Item, grid: Tensor) -> Tensor:
        """Shrinks a large (H, W) map as the model does."""
        high, wide = grid.shape
        ratio = math.sqrt(high * wide / (2 * 36))
        if ratio <= 1.1:
            return grid
        size = [int(high // ratio), int(wide // ratio)]
        return F.interpolate(grid[None, None], size, mode="bilinear")[0, 0]

    def length(self, item: Item) -> int:
        if item.kind == "video":
            return len(self.frames(item)) * 9 + 1
        grid = self.unpadded(item, torch.zeros(self.tiles(item) - 1, 36))
        grid = self.pooled(item, grid)
        return 36 + grid.shape[0] * (grid.shape[1] + 1)

    def media(self, items: Sequence[Item]) -> dict[str, Any]:
        images = [item for item in items if item.kind == "image"]
        videos = [item for item in items if item.kind == "video"]
        media = super().media(images) if images else {}
        if videos:
            media["pixel_values_videos"] = torch.stack([self.frames(v) for v in videos])
        return media

    def choose(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        if item.kind == "video":
            return self.choose_video(item, k)
        pixels = self.media([item])["pixel_values"][0, : self.tiles(item)]
        _, _, scores = self.patches(pixels)
        packed = self.whole(item)
        overview = prune(packed[None, :36], scores[:1], k)[0]
        grid = self.pooled(item, self.unpadded(item, scores[1:]))
        high, wide = grid.shape
        rest = packed[36:].view(high, wide + 1, -1)[:, :wide].reshape(1, high * wide, -1)
        budget = k * (self.tiles(item) - 1)
        chosen = prune(rest, grid.flatten()[None], budget)[0].view(high, wide)
        lines = torch.cat([chosen, torch.ones(high, 1, dtype=torch.bool)], 1)
        stays = torch.cat([overview, lines.flatten()])
        return stays, packed[stays]

    def choose_video(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        frames = self.frames(item)
        _, _, scores = self.patches(frames)
        model = self.build().model
        features = model.get_video_features(frames[None], return_dict=True).pooler_output[0]
        small = F.interpolate(scores.view(-1, 1, 6, 6), [3, 3], mode="bilinear").view(-1, 9)
        if len(features) == len(frames) * 9:  # the model of 5.17 adds the line end later
            features = torch.cat([features, model.image_newline[None]])
        keep = prune(features[:-1].view(len(frames), 9, -1), small, k)
        stays = torch.cat([keep.flatten(), torch.ones(1, dtype=torch.bool)])
        return stays, features[stays]


class VideoLlava(Llava):
    name = "video-llava"
    kinds = ("image", "video")

    def config(self) -> Any:
        return transformers.VideoLlavaConfig(
            vision_config=clip(), text_config=llama(), image_token_index=IMAGE,
            video_token_index=VIDEO, vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )  # fmt: skip

    def architecture(self) -> Any:
        return transformers.VideoLlavaForConditionalGeneration

    def length(self, item: Item) -> int:
        return 36 if item.kind == "image" else 2 * 37

    def media(self, items: Sequence[Item]) -> dict[str, Any]:
        # the argument was renamed
        from inspect import signature

        names = signature(self.architecture().forward).parameters
        images = "pixel_values" if "pixel_values" in names else "pixel_values_images"
        media = {}
        for kind, name, shape in (
            ("image", images, (3, 84, 84)),
            ("video", "pixel_values_videos", (2, 3, 84, 84)),
        ):
            own = [noise(i.number, *shape) for i in items if i.kind == kind]
            if own:
                media[name] = torch.stack(own)
        return media

    def choose(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        (pixels,) = self.media([item]).values()
        projector = self.build().model.multi_modal_projector
        if item.kind == "image":
            feats, _, scores = self.patches(pixels, "image_tower")
            keep = prune(feats, scores, k)
            return keep[0], projector(feats)[keep]
        feats, cls, scores = self.patches(pixels[0], "video_tower")
        keep = torch.cat([torch.ones(2, 1, dtype=torch.bool), prune(feats, scores, k)], 1)
        return keep.flatten(), projector(torch.cat([cls, feats], 1))[keep]


_GRIDS = [(1, 8, 12), (1, 12, 8), (1, 6, 10), (1, 4, 4)]
_VIDEO_GRIDS = [(3, 4, 6), (2, 6, 4)]


class Qwen(Tiny):
    kinds = ("image", "video")
    patch = 14
    separate_frames = False  # whether each frame has separate start and end tokens

    def text(self) -> dict[str, Any]:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        return {
            "vocab_size": 200, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 4096, "rope_parameters": rope,
            "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip

    def special(self) -> dict[str, int]:
        return {"image_token_id": IMAGE, "video_token_id": VIDEO,
                "vision_start_token_id": START, "vision_end_token_id": END}  # fmt: skip

    def grid(self, item: Item) -> tuple[int, int, int]:
        grids = _GRIDS if item.kind == "image" else _VIDEO_GRIDS
        return grids[item.number % len(grids)]

    def length(self, item: Item) -> int:
        return math.prod(self.grid(item)) // 4

    def tokens(self, item: Item) -> list[int]:
        token = IMAGE if item.kind == "image" else VIDEO
        t = self.grid(item)[0]
        if self.separate_frames and item.kind == "video":
            return [x for i in range(t)
                    for x in [50 + i, START, *[token] * (self.length(item) // t), END]]  # fmt: skip
        return [START, *[token] * self.length(item), END]

    def media(self, items: Sequence[Item]) -> dict[str, Any]:
        media: dict[str, Any] = {}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            own = [item for item in items if item.kind == kind]
            if own:
                size = 6 * self.patch**2
                media[name] = torch.cat(
                    [noise(i.number, math.prod(self.grid(i)), size) for i in own]
                )
                media[f"{kind}_grid_thw"] = torch.tensor([self.grid(i) for i in own])
        return media

    def typed(self, ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}

    def positions(self, model: Any, ids: Tensor, row: Row) -> Tensor | None:
        items = [part for part in row if isinstance(part, Item)]
        grids = {k: v for k, v in self.media(items).items() if k.endswith("grid_thw")}
        kinds = self.typed(ids)["mm_token_type_ids"]
        return model.model.get_rope_index(ids, mm_token_type_ids=kinds, **grids)[0]

    def attention_of_last_block(self, item: Item) -> tuple[Tensor, Any]:
        """(T,) attention that each merged token receives, and the output of the encoder."""
        model = self.build(attention="eager")
        last = model.model.visual.blocks[-1].attn
        module = importlib.import_module(type(model.model.visual).__module__)
        original, seen = module.eager_attention_forward, []

        def spy(own: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(own, *args, **kwargs)
            if own is last:
                seen.append(result[1])
            return result

        module.eager_attention_forward = spy
        try:
            encode = getattr(model.model, f"get_{item.kind}_features")
            output = encode(*self.media([item]).values(), return_dict=True)
        finally:
            module.eager_attention_forward = original
        scores = torch.cat([w[0].float().mean((0, 1)) for w in seen]).view(-1, 4).mean(-1)
        return self.raster(item, scores), output

    def raster(self, item: Item, scores: Tensor) -> Tensor:
        return scores

    def stays(self, item: Item, k: int | Auto) -> tuple[Tensor, Any]:
        scores, output = self.attention_of_last_block(item)
        frames = self.grid(item)[0]
        feats = output.pooler_output[0].unflatten(0, (frames, -1))
        return prune(feats, scores.view(frames, -1), k).flatten(), output

    def choose(self, item: Item, k: int | Auto) -> tuple[Tensor, Tensor]:
        keep, output = self.stays(item, k)
        return keep, output.pooler_output[0][keep]


class Qwen2(Qwen):
    name = "qwen2-vl"

    def config(self) -> Any:
        vision = {"depth": 3, "embed_dim": 64, "num_heads": 4, "hidden_size": 64, "mlp_ratio": 2,
                  "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
        return transformers.Qwen2VLConfig(
            vision_config=vision, text_config=self.text(), **self.special()
        )

    def architecture(self) -> Any:
        return transformers.Qwen2VLForConditionalGeneration


class Qwen25(Qwen):
    name = "qwen2.5-vl"

    def config(self) -> Any:
        vision = {
            "depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
            "out_hidden_size": 64, "fullatt_block_indexes": [1, 3], "window_size": 56,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        }  # fmt: skip
        return transformers.Qwen2_5_VLConfig(
            vision_config=vision, text_config=self.text(), **self.special()
        )

    def architecture(self) -> Any:
        return transformers.Qwen2_5_VLForConditionalGeneration

    def raster(self, item: Item, scores: Tensor) -> Tensor:
        t, h, w = self.grid(item)
        h, w = h // 2, w // 2
        order = []  # windows of 2 x 2 merged tokens, row by row, frame by frame
        for frame in range(t):
            for top in range(0, h, 2):
                for left in range(0, w, 2):
                    order += [
                        frame * h * w + y * w + x
                        for y in range(top, min(top + 2, h))
                        for x in range(left, min(left + 2, w))
                    ]
        raster = torch.empty_like(scores)
        raster[torch.tensor(order)] = scores
        return raster


class Qwen3(Qwen):
    name = "qwen3-vl"
    patch = 16
    separate_frames = True

    def config(self) -> Any:
        vision = {
            "depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
            "out_hidden_size": 64, "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }  # fmt: skip
        text = self.text() | {"head_dim": 16}
        text["rope_parameters"]["mrope_interleaved"] = True
        return transformers.Qwen3VLConfig(vision_config=vision, text_config=text, **self.special())

    def architecture(self) -> Any:
        return transformers.Qwen3VLForConditionalGeneration

    def deepstack(self, item: Item, k: int | Auto) -> list[Tensor] | None:
        keep, output = self.stays(item, k)
        layers = output.deepstack_features
        return [(layer if isinstance(layer, Tensor) else torch.cat(list(layer)))[keep]
                for layer in layers]  # fmt: skip
