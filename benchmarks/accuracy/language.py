"""Stages 2 and 3: projector and language model learn to answer; the tower is frozen.

Several questions are packed after one image. Each attends to the image and itself, but not to other
questions, and all start at the same position.

Stage 2 ("language") uses all tokens. It compresses their position ids at random, as if there were
fewer tokens before the question. Otherwise the model would learn that questions start at one
position, which pruning changes. Stage 3 ("subset") uses random subsets, so that the model learns to
answer from fewer tokens. Each image has a random preference for objects, from none to strong, which
is not one of the rules compared later.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vispruner.embedded import scenes

from .data import IGNORED, Batch, Packed, normalize, pack, stack_pixels
from .model import BOS, word_tokenizer
from .recipe import Recipe
from .training import Task, autocast, device

_COMPACT_SHARE = 0.4  # share of the images with unchanged positions in stage 2
_LARGEST_PREFERENCE = 6.0  # added to the Gumbel noise of object patches in stage 3
_VALIDATION = 128


def packed_mask(packed: Packed, visual: int) -> Tensor:
    """(B, 1, L, L) additive mask of L = 1 + visual + T tokens."""
    batch, text = packed.ids.shape
    prefix = 1 + visual
    length = prefix + text
    allowed = torch.zeros(batch, length, length, dtype=torch.bool, device=packed.ids.device)
    allowed[:, :, :prefix] = True
    allowed[:, prefix:, prefix:] = packed.block[:, :, None] == packed.block[:, None]
    allowed &= torch.ones_like(allowed[0]).tril()
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, -torch.inf)[
        :, None
    ]


def text_logits(
    model: Any,
    features: Tensor,
    packed: Packed,
    positions: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """(M, words) logits of the M tokens of `packed` with a label, in order.

    Args:
        features: (B, k, C) of the tower.
        positions: (B, k) position ids of the features, by default 1 to k.
        start: (B,) position id of the questions' first tokens, by default k + 1.
    """
    batch, visual = features.shape[:2]
    at = features.device
    if positions is None:
        positions = torch.arange(1, 1 + visual, device=at).expand(batch, -1)
    if start is None:
        start = torch.full((batch,), 1 + visual, device=at)
    language = model.model.language_model
    embed = language.get_input_embeddings()
    parts = [
        embed(torch.full((batch, 1), BOS, device=at)),
        model.model.multi_modal_projector(features).to(embed.weight.dtype),
        embed(packed.ids),
    ]
    first = torch.zeros(batch, 1, dtype=torch.long, device=at)
    hidden = language(
        inputs_embeds=torch.cat(parts, 1),
        attention_mask=packed_mask(packed, visual).to(embed.weight.dtype),
        position_ids=torch.cat([first, positions, packed.position + start[:, None]], 1),
        use_cache=False,
    ).last_hidden_state[:, 1 + visual :]
    logits: Tensor = model.lm_head(hidden[packed.labels != IGNORED])
    return logits.float()


def right_answers(
    model: Any,
    features: Tensor,
    packed: Packed,
    positions: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """(B, Q) whether greedy decoding gives exactly the answer; False after the last question.

    Every token of the answer, and its end, must be the most likely one given the tokens before it,
    which is the condition for greedy decoding to produce it.
    """
    logits = text_logits(model, features, packed, positions, start)
    answer = packed.labels != IGNORED
    wrong = torch.zeros_like(answer)
    wrong[answer] = logits.argmax(-1) != packed.labels[answer]
    questions = int(packed.block.max()) + 1
    mine = packed.block[..., None] == torch.arange(questions, device=packed.block.device)
    return mine.any(1) & ~(mine & wrong[..., None]).any(1)


def tower_features(model: Any, pixels: Tensor) -> Tensor:
    """(B, N, C) patch features of the feature layer; pixels uint8."""
    with torch.no_grad(), autocast():
        states = model.model.vision_tower(normalize(pixels), output_hidden_states=True)
    return states.hidden_states[model.config.vision_feature_layer][:, 1:].float()


class LanguageTask(Task):
    """Trains projector and language model on all tokens."""

    name = "language"

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.module = model
        model.model.vision_tower.requires_grad_(False)
        if recipe.compile:  # in place, so that names in checkpoints do not change
            model.model.language_model.compile(dynamic=True)
        self._recipe = recipe

    def losses(self, batch: Batch, noise: torch.Generator) -> dict[str, Tensor]:
        features = tower_features(self.module, batch.pixels)
        features, positions, start = self.show(features, batch, noise)
        with autocast():
            logits = text_logits(self.module, features, batch.packed, positions, start)
        labels = batch.packed.labels
        return {"answers": F.cross_entropy(logits, labels[labels != IGNORED])}

    def show(
        self, features: Tensor, batch: Batch, noise: torch.Generator
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Features, positions, and start of the questions, for `text_logits`."""
        images, patches = features.shape[:2]
        squeezed = torch.randint(3, patches + 1, (images,), generator=noise)
        compact = torch.rand(images, generator=noise) < _COMPACT_SHARE
        count = torch.where(compact, patches, squeezed).to(features.device)
        order = torch.arange(patches, device=features.device)
        return features, 1 + order * count[:, None] // patches, 1 + count

    def evaluate(self) -> dict[str, float]:
        """Accuracy with all tokens, and with a random third of them."""
        recipe = self._recipe
        drawn = [scenes.draw(i, recipe.style, split="validation") for i in range(_VALIDATION)]
        packed = pack([scene.asked for scene in drawn], word_tokenizer(recipe.style))
        packed = Packed(*(part.to(device()) for part in vars(packed).values()))
        asked = sum(len(scene.asked) for scene in drawn)
        features = tower_features(self.module, stack_pixels(drawn).to(device()))
        third = recipe.patches // 3
        chance = torch.rand(features.shape[:2], generator=torch.Generator().manual_seed(0))
        kept = chance.topk(third).indices.sort().values.to(device())
        fewer = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
        with autocast():
            figures = {
                name: right_answers(self.module, shown, packed).sum().item() / asked
                for name, shown in (("all", features), ("random_third", fewer))
            }
        return {name: round(value, 4) for name, value in figures.items()}


class SubsetTask(LanguageTask):
    """Continues training on random subsets of the tokens."""

    name = "subset"

    def show(
        self, features: Tensor, batch: Batch, noise: torch.Generator
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        recipe = self._recipe
        if torch.rand((), generator=noise) >= recipe.subset_share:
            return features, None, None
        pick = int(torch.randint(len(recipe.subset_tokens), (), generator=noise))
        chance = torch.rand(features.shape[:2], generator=noise).clamp(1e-6, 1 - 1e-6)
        gumbel = -torch.log(-torch.log(chance)).to(features.device)
        preference = _LARGEST_PREFERENCE * torch.rand(len(features), 1, generator=noise)
        score = gumbel + preference.to(features.device) * (batch.patches.owner > 0)
        kept = score.topk(recipe.subset_tokens[pick]).indices.sort().values
        return features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1])), None, None
