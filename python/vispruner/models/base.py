"""The interface of a model family."""

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
    """Encoded and pruned images or videos of one call.

    Attributes:
        output: of the model's `get_image_features` or `get_video_features`, with only the retained
            tokens in `pooler_output` (and in `deepstack_features`).
        keep: (T,) bool over the placeholders of all items, in the order of the prompt.
        items: the retained tokens of each item.
    """

    output: Any
    keep: Tensor
    items: tuple[Kept, ...]


class PromptPositions(NamedTuple):
    """Positions in an unpruned prompt.

    Attributes:
        positions: (3, B, L) of each column.
        following: (B,) of the token after the prompt.
        rope_end: (B,) at which the model itself continues in a decoding loop without position ids;
            this may differ for videos.
    """

    positions: Tensor
    following: Tensor
    rope_end: Tensor


class Family(ABC):
    """How a family of models encodes pictures and places their tokens in the prompt.

    The pruner calls `inputs_of` to split the arguments of a call, `placeholders` to check the
    prompt before anything is computed, `encode`, and `positions`, in this order. Everything else is
    the same for all families. Register a subclass with `vispruner.register`.

    Args:
        model: the `...ForConditionalGeneration` model.
        budget: how many tokens to retain.

    Raises:
        UnsupportedModelError: the model has a setting that pruning does not support.
    """

    #: `config.model_type` of the models of this family
    model_types: ClassVar[tuple[str, ...]] = ()
    #: classes of lmms-eval that load these models: module, class, interfaces
    harness: ClassVar[tuple[tuple[str, str, tuple[str, ...]], ...]] = ()
    #: architecture in vLLM to the class of vispruner.vllm that replaces it, "module:class"
    vllm: ClassVar[Mapping[str, str]] = {}
    #: modality to the name of the base model's method that encodes it
    encoders: ClassVar[Mapping[str, str]] = {"image": "get_image_features"}
    #: additional options of `apply` with their allowed values, the default first
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    #: reason why `vispruner.prepare` is refused, None if it is supported
    not_prepared: ClassVar[str | None] = None
    #: modalities with separate features per picture, so that k="auto" can retain different numbers
    ragged: ClassVar[frozenset[str]] = frozenset()
    #: arguments of the encoders that only the host reads: reading them from a GPU would wait for it
    on_host: ClassVar[frozenset[str]] = frozenset()
    #: whether tokens have a time, height and width (then `positions` is not None)
    has_grid_positions: ClassVar[bool] = False

    def __init__(self, model: Any, budget: Budget, **options: str) -> None:
        self.base: Any = model.base_model
        self.config: Any = model.config
        self.budget = budget
        if budget.auto and not self.ragged:
            raise UnsupportedModelError(
                f"k='auto' cannot be used with {self.config.model_type}, whose pictures must all "
                "have the same number of tokens: give k or ratio"
            )
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

        # In some releases the encoders of videos and images both name the pixels "pixel_values";
        # the model has another name for those of videos.
        self._own_names = {}
        if "video" in self.parameters and "image" in self.parameters:
            first, *rest = self.parameters["video"]
            if first in self.parameters["image"]:
                self.parameters["video"] = (VIDEO_PIXELS, *rest)
                self._own_names = {VIDEO_PIXELS: first}

    def encoder_arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the model under the names of the encoding method."""
        return {self._own_names.get(name, name): value for name, value in inputs.items()}

    # ----------------------------------------------------------------------- the call's arguments
    def pixels_name(self, modality: str, call: Mapping[str, Any]) -> str | None:
        """The argument that holds the pixels of a modality, None if the call has none."""
        for name in self.parameters[modality]:
            if name.startswith("pixel_values") and call.get(name) is not None:
                return name if len(call[name]) else None
        return None

    def inputs_of(self, modality: str, call: Mapping[str, Any]) -> dict[str, Any] | None:
        """The arguments of a call for the encoder of a modality, None without pixels."""
        if self.pixels_name(modality, call) is None:
            return None
        given = {
            name: call[name] for name in self.parameters[modality] if call.get(name) is not None
        }
        read = self.on_host & given.keys()
        return given | {name: given[name].cpu() for name in read if isinstance(given[name], Tensor)}

    def check_budget(self, modality: str) -> None:
        """Raises ValueError if the model cannot take as many tokens as the budget chooses."""
        if self.budget.auto and modality not in self.ragged:
            raise ValueError(
                f"k='auto' cannot be used with {modality}s in {self.config.model_type}, whose "
                "pictures must all have the same number of tokens: give k or ratio"
            )

    def check_continued(self) -> None:  # noqa: B027 (most need no check)
        """Raises ValueError if the model would read new pictures after a cache wrongly."""

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
            name: taken(value, items)
            if isinstance(value, (Tensor, list, tuple)) and len(value) == count
            else value
            for name, value in inputs.items()
        }

    @property
    def arguments(self) -> set[str]:
        """Names of all arguments of the encoders."""
        return {name for names in self.parameters.values() for name in names}

    @property
    def language_model(self) -> Any:
        """The part that reads the prompt."""
        return self.base.language_model

    def attention_config(self) -> Any:
        """The configuration with the attention implementation of the encoder's layers."""
        return self.config.vision_config

    def sample(self, height: int, width: int) -> dict[str, Any]:
        """The encoder's arguments for a picture of this size with random pixels."""
        reference = next(self.base.parameters())
        device = _offloaded_to(self.base) if reference.is_meta else reference.device
        dtype = reference.dtype if reference.dtype.is_floating_point else torch.float32
        generator = torch.Generator().manual_seed(0)
        pixels = next(name for name in self.parameters["image"] if name.startswith("pixel_values"))
        inputs = {}
        for name, value in self.picture(self.config, height, width).items():
            own = pixels if name == "pixel_values" else name
            made = torch.randn(value.shape, generator=generator) if value.is_meta else value
            inputs[own] = made.to(device, dtype if value.is_meta else value.dtype)
        return inputs

    # ------------------------------------------------------------------- from a configuration alone
    @classmethod
    def picture(cls, config: Any, height: int, width: int) -> dict[str, Any]:
        """The processor's output for one picture, with pixels on the meta device.

        Args:
            config: of the model; height, width: pixels of the picture.

        Raises:
            ValueError: the picture is too small or narrow for the model.
        """
        raise NotImplementedError(f"{cls.__name__} does not implement picture()")

    @classmethod
    def vision_flops(cls, config: Any, inputs: Mapping[str, Any], projected: int) -> int:
        """Floating-point operations of the encoder with its projector.

        Args:
            config: of the model; inputs: of its encoder, as from `picture`.
            projected: patches that reach the projector.
        """
        raise NotImplementedError(f"{cls.__name__} does not implement vision_flops()")

    @classmethod
    def projected_patches(cls, config: Any, inputs: Mapping[str, Any]) -> int:
        """Patches that reach the projector unpruned, 0 if `vision_flops` does not need it."""
        return 0

    # ------------------------------------------------------------------------------- the encoding
    @abstractmethod
    def placeholders(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        """Placeholders of each image or video in an unpruned prompt, from shapes alone.

        Raises:
            ValueError: the inputs do not match the model or the budget.
        """

    @abstractmethod
    def kept(self, modality: str, inputs: Mapping[str, Any]) -> list[int]:
        """Retained placeholders of each image or video, from shapes alone.

        An upper bound if the number depends on which tokens are retained.
        """

    def projected(self, modality: str, inputs: Mapping[str, Any]) -> int | None:
        """Patches that reach the projector, None if pruning comes after it."""
        return None

    @abstractmethod
    def encode(self, modality: str, inputs: Mapping[str, Any], clock: Clock) -> Encoded:
        """Runs the encoder and selects tokens by the budget.

        Times the phases "vision", "score" and "select" with the clock.
        """

    # ------------------------------------------------------------------------------ the positions
    def positions(
        self, ids: Tensor, mask: Tensor, call: Mapping[str, Any]
    ) -> PromptPositions | None:
        """Positions in the unpruned prompt, for models where they are not consecutive.

        Args:
            ids: (B, L) prompt with all its placeholders; mask: (B, L) its attention mask.
            call: the call's arguments.

        Returns:
            The positions, or None: the tokens of the shortened prompt then get consecutive
            positions, as in the method for LLaVA.
        """
        return None

    def set_rope_delta(self, delta: Tensor) -> None:  # noqa: B027 (most models have none)
        """Called with the RoPE delta (B, 1), which the model adds to the number of cached tokens.

        Calls that continue with the cache after `remove()` depend on it.
        """

    def rope_delta(self) -> Tensor | None:
        """The model's current RoPE delta (B, 1): position minus number of tokens."""
        return None

    def embeddings_of(self, ids: Tensor, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the language model: the shortened prompt with its visual features.

        Args:
            ids: (B, W) shortened prompt; outputs: modality to the pruned output of its encoder.
        """
        embeds: Tensor = self.base.get_input_embeddings()(ids)
        for modality, output in outputs.items():
            features = flat_features(output.pooler_output).to(embeds.device, embeds.dtype)
            slots = (ids == self.token_id(modality)).unsqueeze(-1).to(embeds.device)
            embeds = embeds.masked_scatter(slots, features)
        return {"inputs_embeds": embeds}


def _offloaded_to(module: Any) -> torch.device:
    """The device that accelerate loads offloaded weights to; "meta" if it loads none."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "meta"))


def taken(values: Any, items: Sequence[int]) -> Any:
    """Some entries of a tensor, list or tuple with one entry per item."""
    return values[list(items)] if isinstance(values, Tensor) else [values[item] for item in items]


def flat_features(features: Tensor | Sequence[Tensor]) -> Tensor:
    """(T, C) from the features of all items, as one tensor or one per item."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    return torch.cat(list(features), dim=0)


def without_repeats(values: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The first counts[i] rows of each picture's values (P, k, ...): those that `Budget.select`
    did not repeat."""
    return [own[:count] for own, count in zip(values, counts, strict=True)]


def packed(values: Tensor, counts: Sequence[int]) -> Tensor:
    """(T, ...): the first counts[i] rows of each picture's values (P, k, ...)."""
    if min(counts, default=0) == values.shape[1]:
        return values.flatten(0, 1)
    return torch.cat(without_repeats(values, counts))


def keep_rows(rows: Tensor, total: int) -> Tensor:
    """(total,) bool, True at rows."""
    keep = torch.zeros(total, dtype=torch.bool, device=rows.device)
    return keep.index_fill_(0, rows, True)
