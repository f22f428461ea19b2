"""Pruning options of an engine and of its requests."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import vispruner_cuda

from ..selection import Budget

#: The key of the engine's options in `--hf-overrides`, and of a request's in `mm_processor_kwargs`.
KEY = "vispruner"

#: Base of the mixins for classes of vLLM, which are not typed.
Mixin: Any = object

_CAPS = {"k": "max_k", "ratio": "max_ratio"}
_BUDGET = tuple(field.name for field in fields(Budget) if field.name not in ("mass", "max_k"))


def _budget(options: Mapping[str, Any]) -> Budget:
    """A Budget; an invalid one is a ValueError that names its source."""
    if options.get("k") == "auto":
        raise ValueError(
            f"{KEY}: k='auto' cannot be used with vLLM, which schedules a prompt before its "
            "pictures are encoded and needs their number of tokens: give k or ratio"
        )
    try:
        return Budget(**options)
    except (TypeError, ValueError) as error:
        message = str(error).replace(" or 'auto'", "")  # which is refused here
        raise ValueError(f"{KEY}: {message}") from None


def _options(raw: object, allowed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{KEY}: expected an object such as {{'k': 64}}, got {raw!r}")
    unknown = sorted(set(raw) - set(allowed))
    if unknown:
        raise ValueError(f"{KEY}: unknown option {unknown[0]!r}; known: {', '.join(allowed)}")
    return dict(raw)


@dataclass(frozen=True)
class Pruning:
    """The pruning of one engine.

    Attributes:
        budget: tokens kept per picture unless a request sets another number.
        cap: the maximum for a request, which memory is planned for.
    """

    budget: Budget
    cap: Budget

    @classmethod
    def of(cls, hf_config: Any) -> Pruning | None:
        """The pruning options of an engine, None without them.

        Args:
            hf_config: the model's configuration with `--hf-overrides` applied. Under the key
                "vispruner" it holds the arguments of `vispruner.apply` (`k` or `ratio`,
                `method` and its parameters) and, if requests may set more than that, `max_k` or
                `max_ratio`.

        Raises:
            ValueError: an option is unknown or out of bounds.
        """
        raw = getattr(hf_config, KEY, None)
        if raw is None:
            return None
        options = _options(raw, (*_BUDGET, *_CAPS.values()))
        caps = {cap: options.pop(cap, None) for cap in _CAPS.values()}
        budget = _budget(options)
        unit = "ratio" if budget.k is None else "k"
        own, other = _CAPS[unit], _CAPS["k" if unit == "ratio" else "ratio"]
        if caps[other] is not None:
            raise ValueError(f"{KEY}: {other} goes with {other[4:]}, this engine has {unit}")
        if caps[own] is None:
            return cls(budget, budget)
        cap = _budget({**options, unit: caps[own]})
        if getattr(cap, unit) < options[unit]:
            raise ValueError(f"{KEY}: {own}={caps[own]} is less than {unit}={options[unit]}")
        return cls(budget, cap)

    def for_request(self, mm_kwargs: Mapping[str, object]) -> Budget:
        """The budget of a request, per picture.

        Args:
            mm_kwargs: its `mm_processor_kwargs`; under the key "vispruner" they may hold k (or
                ratio, if the engine has a ratio), up to the engine's cap.

        Raises:
            ValueError: an invalid option, or more than the cap; the server answers with HTTP 400.
        """
        raw = mm_kwargs.get(KEY)
        if raw is None:
            return self.budget
        unit = "ratio" if self.budget.k is None else "k"
        options = _options(raw, (unit,))
        if not options:
            return self.budget
        own = {name: getattr(self.budget, name) for name in _BUDGET if name not in _CAPS}
        budget = _budget({**own, **options})
        most = getattr(self.cap, unit)
        if getattr(budget, unit) > most:
            raise ValueError(f"{KEY}: {unit}={options[unit]} is more than this engine's {most}")
        return budget


def nested_names(options: object, parent: str = "") -> Iterator[str]:
    """Names in nested options, such as "text_config.dtype"; not those in this package's."""
    for name, value in options.items() if isinstance(options, Mapping) else ():
        yield f"{parent}{name}"
        if f"{parent}{name}" != KEY:
            yield from nested_names(value, f"{parent}{name}.")


def meant(names: Iterable[object]) -> list[str]:
    """Names that mean an option of this package: they begin with its key, or misspell one.

    Args:
        names: without or, as from `nested_names`, with those of the mappings that they are in.
    """
    known = (KEY, *(f"{KEY}{option}" for option in ("k", "ratio")))

    def ours(name: str) -> bool:
        plain = name.rpartition(".")[2].lower().replace("_", "").replace("-", "")
        return plain.startswith(KEY) or bool(difflib.get_close_matches(plain, known, cutoff=0.85))

    return [name for name in map(str, names) if ours(name)]


def without_key(mm_kwargs: Mapping[str, object]) -> dict[str, object]:
    """A request's `mm_processor_kwargs` without this package's, for the processor of
    transformers."""
    return {name: value for name, value in mm_kwargs.items() if name != KEY}


def identity(budget: Budget) -> str:
    """The options that determine the pruning of an image, as part of cache keys."""
    return f"{vispruner_cuda.__version__} {budget!r}"
