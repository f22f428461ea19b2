"""What a model family has to say for its images to be pruned."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..clock import Clock
from ..report import Kept
from ..selection import Budget

#: the pixels of a video, in the arguments of a model
VIDEO_PIXELS = "pixel_values_videos"


class UnsupportedModelError(ValueError):
    """A model, or a setting of one, that cannot be pruned; the message is one line."""


@dataclass(frozen=True)
class Encoded:
    """Images or videos of one call, encoded and pruned.

    Attributes:
        output: what the model's `get_image_features` or `get_video_features` returned, with only
            the kept tokens in `pooler_output` (and in `deepstack_features`).
        keep: (T,) bool over the placeholders of all items, in the order of the prompt.
        items: what was kept of each item.
    """

    output: Any
    keep: Tensor
    items: tuple[Kept, ...]


class Places(NamedTuple):
    """Positions in an unpruned prompt.

    Attributes:
        positions: (3, B, L) of each column.
        following: (B,) of the token that comes after the prompt.
        rope_end: (B,) where the model itself goes on in a decoding loop without position ids, which
            for videos may be another place.
    """

    positions: Tensor
    following: Tensor
    rope_end: Tensor


class Family(ABC):
    """How one family of models encodes pictures and lays their tokens out in the prompt.

    The pruner calls, in this order: `inputs_of` to split the arguments of a call, `placeholders` to
    check the prompt before anything is computed, `encode`, and `positions`. Everything else is the
    same for all families. A subclass is added with `vispruner.register`.

    Args:
        model: the `...ForConditionalGeneration` model.
        budget: how much to keep.

    Raises:
        UnsupportedModelError: the model has a setting that pruning cannot serve.
    """

    #: `config.model_type` of the models of this family
    model_types: ClassVar[tuple[str, ...]] = ()
    #: classes of lmms-eval that load them: module, class, interfaces
    harness: ClassVar[tuple[tuple[str, str, tuple[str, ...]], ...]] = ()
    #: architecture in vLLM to the class of vispruner.vllm that takes its place, "module:class"
    vllm: ClassVar[Mapping[str, str]] = {}
    #: modality to the name of the base model's method that encodes it
    encoders: ClassVar[Mapping[str, str]] = {"image": "get_image_features"}
    #: options of `apply` beyond the budget, with their allowed values, the default first
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    #: why `vispruner.prepare` is refused, None where it is not
    not_prepared: ClassVar[str | None] = None
    #: whether tokens have a time, height and width (then `positions` is not None)
    has_grid_positions: ClassVar[bool] = False

    def __init__(self, model: Any, budget: Budget, **options: str) -> None:
        self.base: Any = model.base_model
        self.config: Any = model.config
        self.budget = budget
        for name, value in options.items():
            allowed = self.options.get(name)
            if allowed is None:
                raise UnsupportedModelError(
                    f"{name}={value!r} is not an option of {self.config.model_type}"
                )
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        self.chosen = {name: values[0] for name, values in self.options.items()} | options
        self.parameters = {
            modality: tuple(
                name
                for name in inspect.signature(getattr(self.base, method)).parameters
                if name not in ("kwargs", "input_ids")
            )
            for modality, method in self.encoders.items()
        }

        # Some releases name the pixels of a video "pixel_values" in its encoder, as those of an
        # image; the model has another name for them.
        self._own_names = {}
        if "video" in self.parameters and "image" in self.parameters:
            first, *rest = self.parameters["video"]
            if first in self.parameters["image"]:
                self.parameters["video"] = (VIDEO_PIXELS, *rest)
                self._own_names = {VIDEO_PIXELS: first}

    def encoder_arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the model as the method that encodes names them."""
        return {self._own_names.get(name, name): value for name, value in inputs.items()}

    # ----------------------------------------------------------------------- the call's arguments
    def pixels_name(self, modality: str, call: Mapping[str, Any]) -> str | None:
        """The argument that holds the pixels of a modality, None if the call has none."""
        for name in self.parameters[modality]:
            if name.startswith("pixel_values") and call.get(name) is not None:
                return name if len(call[name]) else None
        return None

    def inputs_of(self, modality: str, call: Mapping[str, Any]) -> dict[str, Any] | None:
        """The arguments of a call that belong to the encoder of a modality, None without pixels."""
        if self.pixels_name(modality, call) is None:
            return None
        names = self.parameters[modality]
        return {name: call[name] for name in names if call.get(name) is not None}

    def check_continued(self) -> None:  # noqa: B027 (most have nothing to say)
        """Raises ValueError where new pictures behind a cache would be read wrongly."""

    def token_id(self, modality: str) -> int:
        """The placeholder of a modality in the prompt."""
        return int(getattr(self.config, f"{modality}_token_id"))

    def take(
        self, modality: str, inputs: Mapping[str, Any], items: Sequence[int]
    ) -> dict[str, Any]:
        """The encoder's arguments for some of the items only."""
        name = self.pixels_name(modality, inputs)
        assert name is not None
        count = len(inputs[name])
        return {
            name: value[list(items)] if isinstance(value, Tensor) and len(value) == count else value
            for name, value in inputs.items()
        }

    @property
    def arguments(self) -> set[str]:
        """Names of all arguments that belong to an encoder."""
        return {name for names in self.parameters.values() for name in names}

    @property
    def language_model(self) -> Any:
        """The part that reads the prompt."""
        return self.base.language_model

    def attention_config(self) -> Any:
        """The configuration that tells the encoder's layers how to attend."""
        return self.config.vision_config

    def sample(self, height: int, width: int) -> dict[str, Any]:
        """The encoder's arguments for a picture of random pixels of that size."""
        reference = next(self.base.parameters())
        dtype = reference.dtype if reference.dtype.is_floating_point else torch.float32
        generator = torch.Generator().manual_seed(0)
        pixels = next(name for name in self.parameters["image"] if name.startswith("pixel_values"))
        inputs = {}
        for name, value in self.picture(self.config, height, width).items():
            own = pixels if name == "pixel_values" else name
            made = torch.randn(value.shape, generator=generator) if value.is_meta else value
            inputs[own] = made.to(self.base.device, dtype if value.is_meta else value.dtype)
        return inputs

    # ------------------------------------------------------------------- from a configuration alone
    @classmethod
    def picture(cls, config: Any, height: int, width: int) -> dict[str, Any]:
        """What the model's processor makes of one picture, its pixels on the meta device.

        Args:
            config: of the model; height, width: pixels of the picture.

        Raises:
            ValueError: the picture is too small or narrow for the model.
        """
        raise NotImplementedError(f"{cls.__name__} does not tell the shapes of a picture")

    @classmethod
    def vision_flops(cls, config: Any, inputs: Mapping[str, Any], projected: int) -> int:
        """Floating-point operations of the encoder with its projector.

        Args:
            config: of the model; inputs: of its encoder, as from `picture`.
            projected: patches that reach the projector.
        """
        raise NotImplementedError(f"{cls.__name__} does not count its operations")

    @classmethod
    def projected_patches(cls, config: Any, inputs: Mapping[str, Any]) -> int:
        """Patches that reach the projector unpruned, 0 where `vision_flops` knows."""
        return 0

    # ------------------------------------------------------------------------------- the encoding
    @abstractmethod
    def placeholders(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        """Placeholders of each image or video in an unpruned prompt, from shapes alone.

        Raises:
            ValueError: the inputs do not fit the model or the budget.
        """

    @abstractmethod
    def kept(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        """Placeholders of each image or video that stay, from shapes alone.

        An upper bound where the number depends on which tokens are kept.
        """

    def projected(self, modality: str, inputs: Mapping[str, Any]) -> int | None:
        """Patches that reach the projector, None where pruning comes after it."""
        return None

    @abstractmethod
    def encode(self, modality: str, inputs: Mapping[str, Any], clock: Clock) -> Encoded:
        """Runs the encoder and keeps the tokens that the budget allows.

        The clock is told about the phases "vision", "score" and "select".
        """

    # ------------------------------------------------------------------------------ the positions
    def positions(self, ids: Tensor, mask: Tensor, call: Mapping[str, Any]) -> Places | None:
        """Positions in the unpruned prompt, for models where they are more than a count of columns.

        Args:
            ids: (B, L) prompt with all its placeholders; mask: (B, L) its attention mask.
            call: the arguments that belong to it.

        Returns:
            The positions, or None: the tokens of the shortened prompt are then counted anew, which
            is what the method does for LLaVA.
        """
        return None

    def set_rope_delta(self, delta: Tensor) -> None:  # noqa: B027 (most have nothing to do)
        """Called with (B, 1), how far positions are ahead of the number of tokens kept.

        For those who go on with the cache after `remove()`: the model adds it to the number of
        cached tokens.
        """

    def rope_delta(self) -> Tensor | None:
        """(B, 1): how far positions are ahead of the number of tokens, as the model has it now."""
        return None

    def embeddings_of(self, ids: Tensor, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the language model: the shortened prompt with its visual tokens filled in.

        Args:
            ids: (B, W) shortened prompt; outputs: modality to the pruned output of its encoder.
        """
        embeds: Tensor = self.base.get_input_embeddings()(ids)
        for modality, output in outputs.items():
            features = flat_features(output.pooler_output).to(embeds.device, embeds.dtype)
            slots = (ids == self.token_id(modality)).unsqueeze(-1).to(embeds.device)
            embeds = embeds.masked_scatter(slots, features)
        return {"inputs_embeds": embeds}


def flat_features(features: Tensor | Sequence[Tensor]) -> Tensor:
    """(T, C) of the features of all items, as one tensor or one an item."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat(list(features), dim=0)


def keep_rows(rows: Tensor, total: int) -> Tensor:
    """(total,) bool, True at rows."""
    keep = torch.zeros(total, dtype=torch.bool, device=rows.device)
    return keep.index_fill_(0, rows, True)
