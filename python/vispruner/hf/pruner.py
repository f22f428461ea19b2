"""Prunes the images of a transformers model at the boundary of its forward and generate.

The encoder runs, tokens are selected, the placeholders of the others are removed from the prompt,
and the unmodified model gets the shorter prompt with the retained features. Nothing inside the
model changes: caches, beams, sampling and attention kernels see an ordinary, shorter prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .. import releases
from ..methods import Replacement
from ..models import Family, UnsupportedModelError, check_scores, family_of, whole_model
from ..report import Report
from ..selection import Budget
from . import arguments, generation
from .cache import forget, layout_of, remember, remembered_if_interrupted
from .encoder_outputs import EncoderOutputs
from .generation import Generation, PromptStreamer
from .labels import Columns, check_kept, with_restored_logits
from .prompt import Prepared, Rewriter
from .rope_delta import noted
from .threads import PerThread

MODEL_ATTRIBUTE = "_vispruner_pruner"
_LOGITS = ("kept", "prompt")


class Pruner:
    """Pruning applied to one model; created by `vispruner.apply`.

    Several threads may call the model at the same time, as without pruning.

    Attributes:
        model: the model.
        budget: the number of tokens to retain.
        last: report of the last completed call with images, in any thread; None before the first.
    """

    def __init__(
        self,
        model: Any,
        budget: Budget,
        *,
        logits: str | None = None,
        check: bool = False,
        **options: str,
    ) -> None:
        if logits is not None and logits not in _LOGITS:
            raise ValueError(f"logits must be one of {', '.join(_LOGITS)}, got {logits!r}")
        model = whole_model(model)
        if getattr(model, MODEL_ATTRIBUTE, None) is not None:
            raise ValueError("this model is already pruned: call remove() on its pruner first")
        family = family_of(model)(model, budget, **options)
        if check:
            check_scores(family)
        self.model = model
        self._budget = budget
        self.last: Report | None = None
        self._logits = logits
        self._family: Family = family
        self._rewriter = Rewriter(model, family)
        self._outputs = EncoderOutputs(model, family)
        self._generation: PerThread[Generation] = PerThread()
        self._columns: PerThread[Columns] = PerThread()
        self._warned: set[str] = set()
        # The code below cannot fail.
        self._replacements = [
            Replacement(model, "generate", self._pruned_generate),
            Replacement(model, "forward", self._pruned_forward),
            Replacement(model, "_replicate_for_data_parallel", self._refuse_replicas),
        ]
        self._generate, self._forward, _ = (one.original for one in self._replacements)
        self._outputs.install()
        setattr(model, MODEL_ATTRIBUTE, self)

    @property
    def budget(self) -> Budget:
        """The number of tokens to retain; `apply` again to change it."""
        return self._budget

    @budget.setter
    def budget(self, value: Any) -> None:
        raise AttributeError(
            f"budget cannot be set, got {value!r}: call remove() and vispruner.apply again"
        )

    def remove(self) -> None:
        """Restores the model. Further calls have no effect."""
        if getattr(self.model, MODEL_ATTRIBUTE, None) is not self:
            return
        for replacement in self._replacements:
            replacement.remove()
        self._outputs.uninstall()
        delattr(self.model, MODEL_ATTRIBUTE)

    def __enter__(self) -> Pruner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        """A pruner is saved with its model, without the last report."""
        return vars(self) | {"last": None}

    @staticmethod
    def _refuse_replicas() -> None:
        raise UnsupportedModelError(
            "nn.DataParallel copies the model but not its pruning: use DistributedDataParallel, or "
            "one device (CUDA_VISIBLE_DEVICES=0)"
        )

    # ---------------------------------------------------------------------------- the public API
    def prepare(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See `vispruner.prepare`."""
        if self._family.not_prepared is not None:
            raise UnsupportedModelError(
                f"the inputs of a {self.model.config.model_type} cannot be prepared, "
                f"{self._family.not_prepared}: call the model"
            )
        with self._outputs.withheld():
            prepared = self._rewriter.prepare(releases.canonical(inputs))
        if prepared is None:
            raise ValueError("inputs hold no images: there is nothing to prune")
        self._note(prepared)
        ready, cache = dict(prepared.inputs), prepared.inputs.get("cache")
        if cache is not None and prepared.layout is not None:
            remember(cache, prepared.layout)
        ids = ready.pop("input_ids")
        for name in ("mm_token_type_ids", "token_type_ids"):  # the language model takes neither
            ready.pop(name, None)
        ready = releases.spelled(ready, self._family.language_model.forward)
        with releases.loaded(self._family.base):
            return ready | self._family.embeddings_of(ids, prepared.outputs)

    def labels(self, labels: Tensor) -> Tensor:
        """Converts labels of the full prompt to labels for the returned logits.

        For losses and metrics outside the model. Labels of dropped tokens are removed.

        Args:
            labels: (B, L) int64 for the last `forward` or `prepare` of this thread; label t belongs
                to token t.

        Returns:
            (B, W) int64 for W columns of logits; labels itself if nothing was pruned, or if the
            logits have the columns of the full prompt.

        Raises:
            ValueError: labels and the input_ids of that call differ in shape.
        """
        columns = self._columns.value
        if columns is None:
            return labels
        if labels.shape != columns.mask.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, the last prompt of this thread had "
                f"{tuple(columns.mask.shape)}: pass the labels of that call"
            )
        return columns.labels(labels)

    def _rewrite(self, call: dict[str, Any], *, whole: bool) -> Prepared | None:
        with self._outputs.withheld():  # the encoders run even inside a call with encoder outputs
            return self._rewriter.rewrite(call, whole=whole)

    def _note(self, prepared: Prepared | None) -> None:
        self._columns.value = None if prepared is None else prepared.columns
        if prepared is not None and prepared.report is not None:
            self.last = prepared.report

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)

    # --------------------------------------------------------------------------------- forward
    def _pruned_forward(self, *args: Any, **kwargs: Any) -> Any:
        call = arguments.bound(self._forward, args, kwargs)
        running = None if torch.compiler.is_compiling() else self._generation.value
        if self._is_plain(call, running):
            output = self._forward(*args, **kwargs)
            if running is not None:
                running.read(call)
            return output
        # Not is_exporting(): in torch 2.10, it is true in every graph.
        if getattr(torch.compiler, "_is_exporting_flag", False) or torch._C._get_tracing_state():
            raise UnsupportedModelError(
                "a pruned model cannot be exported, because the shortened prompt depends on the "
                "values of input_ids: export the language model, and call vispruner.prepare"
            )
        with self._generation.set(None), self._outputs.withheld():  # not those of an outer call
            return self._prune_and_forward(args, kwargs, call)

    def _is_plain(self, call: Mapping[str, Any], running: Generation | None) -> bool:
        """Whether it is a step of generate or of a compiled graph, without pruning."""
        if layout_of(call.get("cache")) is not None:
            return False
        if torch.compiler.is_compiling() or running is not None:
            names = [self._family.pixels_name(m, call) for m in self._family.encoders]
            pixels = next((call[name] for name in names if name is not None), None)
            return pixels is None if running is None else running.owns(pixels)
        return False

    def _prune_and_forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], call: dict[str, Any]
    ) -> Any:
        if call.get("mm_encoder_outputs"):
            self._warn_of_encoder_outputs()
            self._note(None)
            return noted(self._family, call, lambda: self._forward(*args, **kwargs))
        kept = call.get("logits_to_keep")
        if self._logits == "prompt" and isinstance(kept, int):
            del call["logits_to_keep"]  # taken from the restored logits
        prepared = self._rewrite(call, whole=False)
        if prepared is None:
            if not torch.compiler.is_compiling():
                self._note(None)
            return noted(self._family, call, lambda: self._forward(*args, **kwargs))
        keep = int(kept or 0)
        if keep > 1 and self._logits is None and prepared.columns is not None:
            check_kept(prepared.columns, keep)
        in_prompt = self._logits_in_prompt(call, keep, pruned=prepared.report is not None)
        restored = in_prompt and prepared.columns is not None
        self._note(prepared)
        if restored:
            self._columns.value = None  # labels match without conversion
        inputs = prepared.inputs
        if keep:
            inputs = inputs | {"logits_to_keep": 0 if restored else keep}
        cache = call.get("cache")
        with (
            remembered_if_interrupted(cache, prepared.layout),
            self._outputs.given(prepared.outputs, prepared.encoder_inputs) as given,
        ):
            output = self._forward(**releases.spelled(inputs, self._forward), **given)
        cache = releases.cache_in(output) if cache is None else cache
        if cache is not None and prepared.layout is not None:
            remember(cache, prepared.layout)
        if restored:
            assert prepared.columns is not None
            return with_restored_logits(output, prepared.columns, keep)
        return output

    def _logits_in_prompt(self, call: Mapping[str, Any], keep: int, *, pruned: bool) -> bool:
        """Whether logits are returned in the columns of the full prompt.

        Without `logits` in `apply`, they are in evaluation with labels, so that a `Trainer`'s
        `predict` and `compute_metrics` compare the same columns. In training the model computes
        the loss, and logits of dropped columns would only cost memory.

        Raises:
            ValueError: training on pictures without labels in the call and without `logits`: a
                loss outside the model would compare different columns.
        """
        if self._logits is not None or keep:
            return self._logits == "prompt"
        has_labels = any(call.get(name) is not None for name in ("labels", "shift_labels"))
        if pruned and self.model.training and torch.is_grad_enabled() and not has_labels:
            raise ValueError(
                "training without labels in the call: logits have the columns of the shortened "
                "prompt, which a loss outside the model does not expect; pass logits='prompt' to "
                "vispruner.apply for logits in the columns of input_ids, or logits='kept' and "
                "shorten the labels with pruner.labels(labels)"
            )
        return has_labels and not self.model.training

    def _warn_of_encoder_outputs(self) -> None:
        self._warn_once("mm_encoder_outputs are used unpruned: pass the pixels to prune them")

    # -------------------------------------------------------------------------------- generate
    def _pruned_generate(self, *args: Any, **kwargs: Any) -> Any:
        call = arguments.bound(self._generate, args, kwargs)
        if call.get("inputs") is not None:
            call["input_ids"] = call.pop("inputs")
        with torch.no_grad():
            prepared = self._prepare_generate(call)
        if prepared is None:
            with self._outputs.withheld(), self._generation.set(Generation(None, 0, pixels=False)):
                return noted(self._family, call, lambda: self._generate(*args, **kwargs))
        ids, cache = call["input_ids"], call.get("cache")
        ready = dict(prepared.inputs)
        columns = ready["input_ids"].shape[1]
        generation.shift_lengths(self.model, ready, columns - ids.shape[1])
        if ready.get("streamer") is not None:
            ready["streamer"] = PromptStreamer(ready["streamer"], ids)
        times = generation.expansion(self.model, ready)
        outputs = self._outputs.repeated(prepared.outputs, prepared.counts, times)
        running = Generation(
            prepared.clock,
            columns - releases.cached_columns(cache),
            pixels=bool(outputs) and not self._outputs.by_argument,
        )
        layout = None if prepared.layout is None else prepared.layout.repeat(times)
        before = layout_of(cache)
        forget(cache)  # an ordinary cache inside generate
        try:
            with (
                remembered_if_interrupted(cache, layout),
                self._outputs.given(outputs, prepared.encoder_inputs) as given,
                self._generation.set(running),
                prepared.clock("prefill"),
            ):
                output = self._generate(**releases.spelled(ready, self._forward), **given)
        except BaseException:
            if before is not None and layout_of(cache) is None:
                remember(cache, before)
            raise
        self._note(prepared)
        return self._with_full_prompt(output, ids, columns, prepared, cache)

    def _prepare_generate(self, call: dict[str, Any]) -> Prepared | None:
        generation.infer_mask(self.model, call)
        if call.get("mm_encoder_outputs"):
            self._warn_of_encoder_outputs()
            return None
        pictures = bool(arguments.visual_inputs(self._family, call))
        generation.check_chunks(self.model, self._family, call, pictures=pictures)
        return self._rewrite(call, whole=True)

    @staticmethod
    def _with_full_prompt(
        output: Any, ids: Tensor, columns: int, prepared: Prepared, cache: Any
    ) -> Any:
        """The output of generate, with sequences that begin with the full prompt."""
        sequences = output if isinstance(output, Tensor) else output.sequences
        times = sequences.shape[0] // ids.shape[0]
        prompt = ids.to(sequences.device).repeat_interleave(times, 0)
        # Callers cut off the prompt by the length of their input.
        whole = torch.cat([prompt, sequences[:, columns:]], 1)
        filled = releases.cache_in(output)
        filled = cache if filled is None else filled
        if filled is not None and prepared.layout is not None:
            remember(filled, prepared.layout.repeat(times))
        if isinstance(output, Tensor):
            return whole
        output.sequences = whole
        return output
