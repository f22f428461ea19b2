"""Visual token pruning in vLLM: an out-of-tree plugin.

vLLM finds :func:`register` through its entry point, so installing the package is enough. An engine
prunes with this option:

    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{"vispruner": {"k": 64}}'

Without it, vLLM builds its own classes and no code of this package runs. docs/serving.md
has the options, the limits and the supported versions.

- `config`: options of engines and requests;
- `processing`: the front end, which builds the shortened prompt before any image is encoded;
- `model`: shared by the workers of all families: scores, selection, tensor parallelism;
- `llava`, `llava_next`, `llava_onevision`, `internvl`, `qwen_vl`: one module per family, named by
  the family's file in `models`;
- `requests`: k of a request in `vllm_xargs`; `guard`: errors where an option would be ignored;
- `metrics`, `timing`, `headers`: counters, logs and response headers;
- `compatibility`: the versions of vLLM that these modules support.
"""

from __future__ import annotations

import functools
from typing import Any


def architectures() -> dict[str, str]:
    """Architecture to the class of this package that replaces it, "module:class"."""
    from ..models import families

    places: dict[str, str] = {}
    for family in families().values():
        places.update(vars(family).get("vllm", {}))
    return places


def _refuse(problem: str) -> None:
    """Rejects engines with the pruning option, and no others.

    As `guard.install_engine_check`, which cannot be imported without the operators' library.
    """
    from vllm import ModelRegistry

    inspect = ModelRegistry.inspect_model_cls

    @functools.wraps(inspect)
    def inspected(architectures: Any, model_config: Any) -> Any:
        if getattr(model_config.hf_config, "vispruner", None) is not None:
            raise RuntimeError(f"vispruner: cannot prune: {problem}")
        return inspect(architectures, model_config)

    ModelRegistry.inspect_model_cls = inspected


def register() -> None:
    """Registers the pruning classes in place of vLLM's; the entry point of group
    `vllm.general_plugins`.

    vLLM calls it in every process, in some more than once, before CUDA may be initialized, so it
    only registers names. On an unsupported version of vLLM, stand-in classes serve unpruned as
    before and reject an engine with the pruning option.
    """
    from vllm import ModelRegistry

    try:
        from .compatibility import version_problem
        from .guard import install_engine_check, install_request_checks

        places = architectures()
    except ImportError as error:  # of the operators' library, for example
        _refuse(str(error))
        return
    refuse = version_problem() is not None
    install_engine_check(places)
    if not refuse:
        install_request_checks()
    for architecture, place in places.items():
        where = f"compatibility:{architecture}" if refuse else place
        ModelRegistry.register_model(architecture, f"{__name__}.{where}")


__all__ = ["architectures", "register"]
