"""Hands encoded images to the unmodified model, in the way its version of transformers takes them.

From transformers 5.18 on, `forward` and `generate` take `mm_encoder_outputs`. Before, the model
encodes what it is given: there, while a pruner is applied, the methods that encode return what was
handed over.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .models import Family
    from .pruner import Prepared


def transformers_version() -> tuple[int, int]:
    """Major and minor."""
    import transformers

    major, minor, *_ = transformers.__version__.split(".")
    return int(major), int(minor)


class Method:
    """A replacement of one method of one object: its signature, and another body.

    An object rather than a closure, so that a deep copy of the model calls into the copy.
    """

    def __init__(self, original: Any, body: Any) -> None:
        functools.update_wrapper(self, original)
        self._body = body

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._body(*args, **kwargs)


class Handover:
    """The way into one model.

    Args:
        model: the model; family: its family.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self.by_argument = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
        self._base = family.base
        self._encoders = dict(family.encoders)
        self._originals: dict[str, Any] = {}
        self._held: dict[str, Any] = {}

    @property
    def takes_chunks(self) -> bool:
        """Whether a prompt with images is prefilled in chunks correctly: not before 5.23."""
        return transformers_version() >= (5, 23)

    def install(self) -> None:
        if self.by_argument:
            return
        for modality, name in self._encoders.items():
            original = self._originals[modality] = getattr(self._base, name)
            setattr(self._base, name, Method(original, functools.partial(self._encode, modality)))

    def uninstall(self) -> None:
        for modality in self._originals:
            delattr(self._base, self._encoders[modality])
        self._originals.clear()

    def _encode(self, modality: str, *args: Any, **kwargs: Any) -> Any:
        held = self._held.get(modality)
        return self._originals[modality](*args, **kwargs) if held is None else held

    def give(self, prepared: Prepared, *, times: int) -> dict[str, Any]:
        """Arguments for the model that carry the encoded images.

        Args:
            prepared: the prompt and the pruned outputs of the encoders.
            times: how often generate will repeat each row.
        """
        if not prepared.outputs:
            return {}
        if self.by_argument:
            several = any(len(set(rows)) < len(rows) for _, rows in prepared.counts.values())
            if times > 1 and several and transformers_version() < (5, 19):
                raise ValueError(
                    "transformers 5.18 mixes up the images of a row when generate repeats it "
                    "(num_beams, num_return_sequences): use another version"
                )
            return {"mm_encoder_outputs": dict(prepared.outputs)}
        self._held = {
            modality: _repeated(output, *prepared.counts[modality], times)
            for modality, output in prepared.outputs.items()
        }
        return prepared.encoder_inputs

    def take_back(self) -> None:
        """After the call, whether it worked or not."""
        self._held = {}


def _repeated(output: Any, counts: list[int], rows: list[int], times: int) -> Any:
    """The output for rows repeated in place: the images of a row stay together."""
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
