"""Visual token pruning in vLLM: an out-of-tree plugin.

vLLM finds :func:`register` by its entry point, so installing the package is enough. An engine
prunes when it is told to:

    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{"vispruner": {"k": 64}}'

Without that option it builds vLLM's own classes and nothing of this package runs. docs/serving.md
has the options, the limits and the supported versions.

- `config`: what an engine and a request may ask for;
- `processing`: the front end, which lays out the shortened prompt before any image is encoded;
- `model`: what the workers share: scores, the choice, tensor parallelism;
- `llava`, `llava_next`, `llava_onevision`, `internvl`, `qwen_vl`: one module per family, named by
  the family's file in `models`;
- `requests`: k of a request in `vllm_xargs`; `guard`: errors where an option would be ignored;
- `metrics`, `timing`, `headers`: what operators and clients see;
- `compatibility`: the versions of vLLM whose internals these modules know.
"""

from __future__ import annotations


def architectures() -> dict[str, str]:
    """Architecture to the class of this package that takes its place, "module:class"."""
    from ..models import families

    places: dict[str, str] = {}
    for family in families().values():
        places.update(vars(family).get("vllm", {}))
    return places


def register() -> None:
    """Puts the pruning classes before vLLM's own; the entry point of group `vllm.general_plugins`.

    vLLM calls it in every process, some of them more than once, and before CUDA may be touched: it
    only notes names. On a version of vLLM that is not supported the classes are stand-ins that
    serve unpruned as before and refuse an engine that asks for pruning.
    """
    from vllm import ModelRegistry

    from .compatibility import version_problem
    from .guard import install_engine_check, install_request_checks

    refuse = version_problem() is not None
    places = architectures()
    install_engine_check(places)
    if not refuse:
        install_request_checks()
    for architecture, place in places.items():
        where = f"compatibility:{architecture}" if refuse else place
        ModelRegistry.register_model(architecture, f"{__name__}.{where}")


__all__ = ["architectures", "register"]
