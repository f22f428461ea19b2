"""Passes encoder outputs to the unmodified model, in the way of its transformers release.

From transformers 5.18 on, `forward` and `generate` take `mm_encoder_outputs`. In earlier releases
the model always calls its encoders. There, while a pruner is applied, the encoding methods are
replaced and return the outputs that the same thread has set.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from .. import releases
from ..methods import Replacement
from ..models import Family
from .threads import PerThread

#: modality to (retained tokens of each item, row of each item)
Counts = Mapping[str, tuple[list[int], list[int]]]


class EncoderOutputs:
    """Encoder outputs for one model.

    Args:
        model: the model; family: its family.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self.by_argument = releases.takes_encoder_outputs(model)
        self._model, self._base = model, family.base
        self._encoders = dict(family.encoders)
        self._replacements: dict[str, Replacement] = {}
        self._held: PerThread[dict[str, Any]] = PerThread()

    def install(self) -> None:
        if self.by_argument:
            return
        for modality, name in self._encoders.items():
            body = functools.partial(self._encode, modality)
            self._replacements[modality] = Replacement(self._base, name, body)

    def uninstall(self) -> None:
        for replacement in self._replacements.values():
            replacement.remove()

    def _encode(self, modality: str, *args: Any, **kwargs: Any) -> Any:
        held = (self._held.value or {}).get(modality)
        if held is None:
            return self._replacements[modality].original(*args, **kwargs)
        return held

    def repeated(self, outputs: Mapping[str, Any], counts: Counts, times: int) -> dict[str, Any]:
        """The outputs for `generate`, which repeats each row `times` times.

        Raises:
            ValueError: this release of transformers would mix up the images of a row.
        """
        if not self.by_argument:
            return {
                modality: _repeated(output, *counts[modality], times)
                for modality, output in outputs.items()
            }
        several = any(len(set(rows)) < len(rows) for _, rows in counts.values())
        if times > 1 and several and releases.mixes_repeated_images(self._model):
            raise ValueError(
                f"transformers {transformers.__version__} mixes up the images of a row of "
                f"{self._model.config.model_type} when generate repeats it (num_beams, "
                "num_return_sequences): call it without them, or use another version"
            )
        return dict(outputs)

    @contextmanager
    def given(
        self, outputs: Mapping[str, Any], encoder_inputs: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Arguments that pass the outputs to the model, valid inside the block.

        Args:
            outputs: modality to the pruned output of its encoder.
            encoder_inputs: the encoders' arguments, for releases in which the model needs them.
        """
        if self.by_argument:
            yield {"mm_encoder_outputs": dict(outputs)} if outputs else {}
            return
        with self._held.set(dict(outputs)):
            yield dict(encoder_inputs) if outputs else {}

    @contextmanager
    def withheld(self) -> Iterator[None]:
        """Inside the block no outputs are set, so that a nested call encodes its own images."""
        with self._held.set({}):
            yield


def _repeated(output: Any, counts: list[int], rows: list[int], times: int) -> Any:
    """The output for rows repeated in place; the images of a row stay together."""
    if times == 1:
        return output
    order = [
        item
        for row in sorted(set(rows))
        for _ in range(times)
        for item in range(len(rows))
        if rows[item] == row
    ]

    def repeat(features: Any) -> Any:
        if isinstance(features, Tensor) and features.dim() == 2:
            return torch.cat([features.split(counts)[item] for item in order])
        if isinstance(features, Tensor) and len(features) != len(counts):  # frames of videos
            frames = features.unflatten(0, (len(counts), -1))
            return frames[order].flatten(0, 1)
        return features[order] if isinstance(features, Tensor) else [features[i] for i in order]

    repeated = copy.copy(output)
    repeated.pooler_output = repeat(output.pooler_output)
    if getattr(output, "deepstack_features", None) is not None:
        repeated.deepstack_features = [repeat(layer) for layer in output.deepstack_features]
    return repeated
