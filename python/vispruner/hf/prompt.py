"""Rewrites a call: encodes and prunes its pictures, and shortens its prompt.

There are four steps: `_read` separates cached and new columns, `_place` assigns pictures to rows
(before anything is computed), `_encode` runs the encoders, and `_shorten` removes the columns of
dropped tokens from all arguments that have the prompt's columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import releases
from ..clock import Clock
from ..models import Encoded, Family
from ..report import Kept, Report
from . import arguments, generation, rope_delta
from .arranged import Arranger
from .cache import layout_of
from .encoder_outputs import Counts
from .labels import Columns
from .layout import Layout, Padding, check_inside, padding_at_ends, rows_of_items, shorten
from .past import Past, SplitCall
from .positions import check_packing, shortened_positions, step_positions


@dataclass(frozen=True)
class Prepared:
    """A prompt without the placeholders of dropped tokens.

    Attributes:
        inputs: the call's arguments for the unmodified model, without those of the encoders.
        outputs: modality to the pruned output of its encoder.
        layout: the columns of the shortened prompt, including cached ones; None where the cache's
            layout does not change.
        columns: of the new part of the prompt, before and after.
        encoder_inputs: the encoders' arguments.
        counts: modality to (retained tokens of each item, row of each item).
        report: the retained tokens, None if nothing was encoded.
        clock: the phases so far.
    """

    inputs: dict[str, Any]
    clock: Clock
    outputs: dict[str, Any] = field(default_factory=dict)
    layout: Layout | None = None
    columns: Columns | None = None
    encoder_inputs: dict[str, Any] = field(default_factory=dict)
    counts: Counts = field(default_factory=dict)
    report: Report | None = None


@dataclass(frozen=True)
class _Placed:
    """The places of the new pictures in the new columns.

    Attributes:
        visual: modality to the arguments of its encoder, for new pictures only.
        slots: modality to (B, S) bool, its placeholders.
        rows: modality to the row of each new picture.
        valid: tokens of each row, without padding.
        padding: the padding at the ends of the rows.
    """

    visual: dict[str, dict[str, Any]]
    slots: dict[str, Tensor]
    rows: dict[str, list[int]]
    valid: list[int]
    padding: Padding


class Rewriter:
    """Rewrites the calls of one model.

    Args:
        model: the model; family: its family.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self._model, self._family = model, family
        self._arranger = Arranger(model, family)

    def rewrite(self, call: dict[str, Any], *, whole: bool) -> Prepared | None:
        """Encodes the images of a call and shortens its prompt; None if there is nothing to do.

        Args:
            call: arguments by their canonical names.
            whole: input_ids may include the cached part (generate), instead of new tokens only
                (forward).

        Raises:
            ValueError: arguments are inconsistent or cannot be pruned; nothing has been computed.
        """
        turn = self._read(call, whole=whole)
        if turn is None:
            return None
        if not turn.visual and not whole and self._mask_matches_cache(turn):
            return self._step(turn)
        if isinstance(call.get("logits_to_keep"), Tensor):
            raise ValueError("logits_to_keep must be an int when images are pruned, got a tensor")
        clock = Clock(self._model.device)
        with clock("rewrite"):
            placed = self._place(turn)
        encoded = self._encode(placed, clock)
        with clock("rewrite"):
            return self._shorten(turn, placed, encoded, clock)

    def prepare(self, call: dict[str, Any]) -> Prepared | None:
        """`rewrite` of a new prompt for callers who continue with the language model.

        Their steps count positions by columns or by the mask, so the prompt must do so as well.
        """
        done = self.rewrite(call, whole=False)
        own = self._family.has_grid_positions or call.get("position_ids") is not None
        if done is None or done.layout is None or own or releases.cached_columns(call.get("cache")):
            return done
        inputs = {name: value for name, value in done.inputs.items() if name != "position_ids"}
        return replace(done, inputs=inputs, layout=replace(done.layout, behind=None))

    # ---------------------------------------------------------------------- 1. cached, new columns
    def _read(self, call: dict[str, Any], *, whole: bool) -> SplitCall | None:
        visual = arguments.visual_inputs(self._family, call)
        ids: Tensor | None = call.get("input_ids")
        cache = call.get("cache")
        if not visual and (layout_of(cache) is None or not releases.cached_columns(cache)):
            if ids is not None and not releases.cached_columns(cache):
                arguments.check_no_placeholders(self._family, ids)
            return None
        if ids is None:  # text after a pruned prompt
            ids = self._stand_in(call, whole=whole)
        if ids is None:
            return None
        call = arguments.in_rows(call, ids, grid=self._family.has_grid_positions)
        if visual:
            arguments.check_packed_lengths(call)
        mask = arguments.mask_of(call)
        delta = rope_delta.of_cache(self._family, cache, ids, mask, whole=whole)
        past = Past.of(cache, ids, mask, whole=whole, rope_delta=delta)
        turn = SplitCall(call, whole, visual, past, past.new(ids), past.new_mask(ids, mask))
        if past.layout.inside:
            self._check_inside(turn, past.mask.shape[1] + turn.ids.shape[1])
        return turn

    def _check_inside(self, turn: SplitCall, columns: int) -> None:
        """Checks padding between the tokens of a row, for a model that reads up to `columns`."""
        if turn.whole:
            columns += generation.setting(self._model, turn.call, "max_new_tokens") or 0
        check_inside(self._family.config, columns)

    def _stand_in(self, call: Mapping[str, Any], *, whole: bool) -> Tensor | None:
        """Token ids in the place of inputs_embeds; None if there are none either.

        Raises:
            ValueError: for generate, which may or may not repeat the cached part.
        """
        embeds: Tensor | None = call.get("inputs_embeds")
        if embeds is None:
            return None
        if whole:
            raise ValueError(
                "generate cannot continue a pruned prompt with inputs_embeds: pass input_ids"
            )
        return torch.full(embeds.shape[:2], self._arranger.pad_id(), device=embeds.device)

    @staticmethod
    def _mask_matches_cache(turn: SplitCall) -> bool:
        """Whether it is a step of a custom decoding loop whose mask, if any, matches the cache."""
        if turn.call.get("attention_mask") is not None:
            return turn.past.mask_is_short
        return not turn.past.layout.padded

    def _step(self, turn: SplitCall) -> Prepared | None:
        positions = step_positions(self._family, turn.call, turn.past, turn.mask)
        if positions is None:
            return None
        return Prepared(turn.call | {"position_ids": positions}, Clock(self._model.device))

    # ------------------------------------------------------------------------ 2. pictures and rows
    def _place(self, turn: SplitCall) -> _Placed:
        family, modalities = self._family, list(self._family.encoders)
        slots = {m: turn.ids == family.token_id(m) for m in modalities}
        old_ids = turn.past.old(turn.call.get("input_ids", turn.ids))
        stats = [turn.mask.sum(1), *padding_at_ends(turn.mask)]
        for m in modalities:
            hidden = (slots[m] & ~turn.mask).sum(1)
            stats += [slots[m].sum(1), (old_ids == family.token_id(m)).sum(1), hidden]
        valid, first, last, *found = torch.stack(stats).tolist()  # the only synchronization
        visual, rows = {}, {}
        for i, modality in enumerate(modalities):
            here, before, hidden = found[3 * i : 3 * i + 3]
            if modality in turn.visual:
                if sum(hidden):
                    raise ValueError(
                        f"attention_mask hides {sum(hidden)} {modality} placeholders: remove the "
                        f"{modality} and its placeholders from the prompt"
                    )
                family.check_budget(modality)
                inputs, rows[modality] = self._assign(modality, turn.visual[modality], here, before)
                if rows[modality]:
                    visual[modality] = inputs
                    if turn.past.columns:
                        self._family.check_continued()
            # In a decoding loop, the model itself may have generated a placeholder.
            elif sum(here) and (turn.whole or not turn.past.columns):
                raise ValueError(
                    f"the prompt has {sum(here)} {modality} placeholders but no {modality}s "
                    "were passed"
                )
        # On the right only if all padding is there, and the last columns have no special meaning:
        # generate continues them, and logits_to_keep counts from them.
        ends = turn.whole or bool(turn.call.get("logits_to_keep"))
        left = ends or not any(last) or any(first)
        return _Placed(visual, slots, rows, valid, Padding(first, last, left))

    def _assign(
        self, modality: str, inputs: dict[str, Any], here: list[int], before: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        """The images that need encoding, and the row of each.

        Args:
            inputs: the encoder's arguments.
            here: placeholders in the new columns of each row; before: in those of the cache.

        Raises:
            ValueError: placeholders and images do not match.
        """
        sizes = self._family.placeholders(modality, inputs)
        if not sum(before) or sum(sizes) != sum(before) + sum(here):
            return inputs, rows_of_items(sizes, here, modality)
        # These are all images of the conversation; the cached ones need no encoding.
        every = [a + b for a, b in zip(before, here, strict=True)]
        fresh = _fresh_items(sizes, rows_of_items(sizes, every, modality), before)
        sizes = [sizes[item] for item in fresh]
        rows = rows_of_items(sizes, here, modality)
        return self._family.take(modality, inputs, fresh) if fresh else inputs, rows

    # ---------------------------------------------------------------------------- 3. the encoders
    def _encode(self, placed: _Placed, clock: Clock) -> dict[str, Encoded]:
        with releases.loaded(self._family.base):
            return {m: self._family.encode(m, inputs, clock) for m, inputs in placed.visual.items()}

    # ------------------------------------------------------------------- 4. the remaining columns
    def _shorten(
        self, turn: SplitCall, placed: _Placed, encoded: Mapping[str, Encoded], clock: Clock
    ) -> Prepared:
        past = turn.past
        dropped = torch.zeros_like(turn.ids, dtype=torch.bool)
        lost = [0] * len(placed.valid)
        for modality, part in encoded.items():
            away = ~part.keep.to(turn.ids.device)
            dropped |= torch.zeros_like(dropped).masked_scatter_(placed.slots[modality], away)
            for item, row in zip(part.items, placed.rows[modality], strict=True):
                lost[row] += item.before - item.after
        length, left = turn.ids.shape[1], placed.padding.left
        width = placed.padding.width(length, lost)
        new = shorten(turn.mask, dropped, width, left=left)
        remaining = (valid - less for valid, less in zip(placed.valid, lost, strict=True))
        new = replace(new, padded=min(remaining) < width)
        # Columns that pruning added to a row, or removed.
        filled = [width - (length - less) for less in lost]
        if any(filled):
            inside = max(filled) > 0 and (past.columns > 0 or not left)
            behind = torch.tensor(filled, device=turn.ids.device)
            new = replace(new, behind=behind, inside=inside)
        if past.columns and new.inside:
            self._check_inside(turn, past.mask.shape[1] + width)
        check_packing(turn.call, new)
        columns = Columns(new, turn.mask, dropped)
        inputs = self._arranger.arranged(turn, columns)
        own = self._family.arguments
        shown = {name: value for name, value in turn.call.items() if name not in own}
        for encoder_inputs in placed.visual.values():
            shown |= encoder_inputs
        found = shortened_positions(
            self._family,
            shown,
            past,
            new,
            turn.ids,
            turn.mask,
            dropped,
            left=left,
            whole=turn.whole,
        )
        layout = past.layout.append(new, past.gap) if past.columns else new
        if found is not None:
            inputs["position_ids"], following = found
            layout = replace(layout, next_position=following)
        items: tuple[Kept, ...] = sum((part.items for part in encoded.values()), ())
        cached = past.mask.shape[1]
        return Prepared(
            {name: value for name, value in inputs.items() if name not in own},
            clock,
            {modality: part.output for modality, part in encoded.items()},
            layout,
            columns,
            {name: value for part in placed.visual.values() for name, value in part.items()},
            {
                m: ([item.after for item in part.items], placed.rows[m])
                for m, part in encoded.items()
            },
            Report(items, past.columns + turn.ids.shape[1], cached + width, clock)
            if items
            else None,
        )


def _fresh_items(sizes: list[int], rows: list[int], cached: list[int]) -> list[int]:
    """Items whose placeholders come after the first `cached` ones of their row."""
    seen = dict.fromkeys(rows, 0)
    fresh = []
    for item, (size, row) in enumerate(zip(sizes, rows, strict=True)):
        if seen[row] >= cached[row]:
            fresh.append(item)
        seen[row] += size
    return fresh
