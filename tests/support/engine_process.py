"""Engines in separate processes: the configuration of vLLM cannot be undone."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from typing import Any
from unittest import mock

TESTS = Path(__file__).resolve().parents[1]
SITE = Path(__file__).with_name("engine_site")

#: Environment of all engines of the tests. Functions that vLLM compiles at their first call run in
#: Python, which is faster than compiling for a tiny model.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def environment(**changes: str) -> dict[str, str]:
    """The environment of a server: the current one, the shims, and the changes."""
    return _environment(**{"VLLM_CPU_KVCACHE_SPACE": "1", **changes})


def _environment(**changes: str) -> dict[str, str]:
    path = [str(SITE), str(TESTS), os.environ.get("PYTHONPATH", "")]
    own = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return {**os.environ, **own, **changes}


@dataclass(frozen=True)
class Answer:
    """The result of an engine for one request.

    Attributes:
        prompt: token ids of the prompt, placeholders included; tokens: of the answer.
        logprobs: of each token of the answer; the result of an engine with the pooling runner.
        cached: tokens of the prompt that came from the prefix cache.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    cached: int


def _record(folder: Path) -> None:
    """Saves, for every call by the model of this process: of a selection the arguments and the
    result, `choice*.pt`, and the positions (3, L) that a Qwen computes, `positions*.pt`."""
    import torch

    from vispruner.vllm.model import PrunedModel
    from vispruner.vllm.qwen_vl import _PrunedQwen

    folder.mkdir(exist_ok=True)
    choose, recompute = PrunedModel.choose, _PrunedQwen.recompute_mrope_positions
    number = itertools.count()

    @functools.wraps(choose)
    def recorded(self: Any, features: Any, scores: Any, lengths: Any, counts: Any) -> Any:
        kept, rows = choose(self, features, scores, lengths, counts)
        choice = {
            "features": features, "scores": scores, "rows": rows, "lengths": list(lengths),
            "counts": list(counts),
        }  # fmt: skip
        torch.save(choice, folder / f"choice{next(number):04}.pt")
        return kept, rows

    @functools.wraps(recompute)
    def positioned(self: Any, *args: Any, **named: Any) -> Any:
        result = recompute(self, *args, **named)
        torch.save(result[1], folder / f"positions{next(number):04}.pt")
        return result

    PrunedModel.choose = recorded  # type: ignore[method-assign]
    _PrunedQwen.recompute_mrope_positions = positioned  # type: ignore[method-assign]


def _use_what_is_imported() -> None:
    """Saves starts of Python, each of which would import vLLM again, in this process.

    vLLM inspects a model's class in a new process, to leave CUDA alone, and on a CPU spawns the
    workers of several ranks. Here the class is imported, and the ranks are forked: this process has
    one thread. An engine in a separate process, and servers that start as users start them, do
    not call this.
    """
    from vllm.model_executor.models import registry
    from vllm.utils import system_utils

    registry._run_in_subprocess = lambda inspect: inspect()
    gc.freeze()  # vLLM collects garbage several times, among all that is imported,
    gc.unfreeze = int  # type: ignore[assignment]  # also at the end
    system_utils._maybe_force_spawn = functools.partial(
        os.environ.update, VLLM_WORKER_MULTIPROC_METHOD="fork"
    )


def _serve(
    connection: Connection,
    options: dict[str, Any],
    variables: dict[str, str],
    record: Path | None,
    version: str | None,
) -> None:
    """The child: makes the engine, then answers lists of requests until there is None."""
    os.environ.update(variables)
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
        _use_what_is_imported()
    if version is not None:
        vllm.__version__ = version
    if record is not None:
        _record(record)

    try:
        engine = LLM(**options)
    except BaseException as error:
        connection.send(error if type(error) is ValueError else RuntimeError(repr(error)))
        raise
    connection.send(None)
    while (work := connection.recv()) is not None:
        requests, length, adapter, extra_args = work
        sampling = SamplingParams(
            temperature=0, max_tokens=length, ignore_eos=True, logprobs=0, extra_args=extra_args
        )
        if options.get("runner") == "pooling":
            pooled = engine.encode(requests, pooling_task=options["convert"])
            answers = [
                Answer(list(output.prompt_token_ids), [], output.outputs.data.tolist(), 0)
                for output in pooled
            ]
            connection.send((answers, {}))
            continue
        lora = LoRARequest("adapter", 1, str(adapter)) if adapter is not None else None
        try:
            outputs = engine.generate(requests, sampling, use_tqdm=False, lora_request=lora)
        except ValueError as error:
            connection.send(ValueError(str(error)))
            continue
        counted = {}
        if not options["disable_log_stats"]:
            for metric in engine.get_metrics():
                counted[metric.name] = counted.get(metric.name, 0) + getattr(metric, "value", 0)
        answers = [
            Answer(
                list(output.prompt_token_ids or ()),
                list(output.outputs[0].token_ids),
                [
                    step[token].logprob
                    for step, token in zip(
                        output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True
                    )
                ],
                output.num_cached_tokens or 0,
            )
            for output in outputs
        ]
        connection.send((answers, counted))


@contextlib.contextmanager
def _variables(changes: Mapping[str, str]) -> Iterator[None]:
    """Sets the environment of an engine for processes that are started in the block."""
    before = dict(os.environ)
    os.environ.update(_environment(**changes))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


#: Environment for model runner V2 on a CPU: Triton's interpreter (`engine_shims`).
RUNNER_V2 = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


#: What engines import, of vLLM alone: importing the plugin is a part of its tests.
_IMPORTED = [
    "vllm.entrypoints.llm",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    *(
        f"vllm.model_executor.models.{module}"
        for module in (
            "llava", "llava_next", "llava_onevision", "interns1", "qwen2_vl", "qwen2_5_vl",
            "qwen3_vl", "qwen3_vl_moe", "qwen3_5",
        )
    ),
]  # fmt: skip


@functools.cache
def _server(runner: str) -> ForkServer:
    """Engines are forked from a process that has imported vLLM and done nothing else.

    There is one for each model runner: vLLM looks for Triton when it is imported.
    """
    server = ForkServer()
    server.set_forkserver_preload(_IMPORTED)
    with _variables(RUNNER_V2 if runner == "V2" else {}):
        server.ensure_running()
    return server


def _start(runner: str, target: Callable[..., None], *args: Any) -> Any:
    """A process forked from the server of a runner."""
    process = multiprocessing.get_context("forkserver").Process(target=target, args=args)
    # The standard library supports one server; this is its request for a process.
    with mock.patch.object(
        multiprocessing.forkserver,
        "connect_to_new_process",
        _server(runner).connect_to_new_process,
    ):
        process.start()
    return process


def _run_server(options: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    with log.open("wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    _use_what_is_imported()
    from vllm.entrypoints.launchers.api_server.entry import main

    sys.argv = ["api_server", *options]
    main()


class ForkedServer:
    """The process of a server that begins with vLLM imported, for `engine_server.running`.

    Its engine is forked from it, so what a process must do itself, such as loading the plugin, is
    tested with servers that start as users start them.
    """

    def __init__(self, options: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._process = _start("V1", _run_server, list(options), log, dict(environment))
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)
        if self._process.is_alive():
            raise subprocess.TimeoutExpired("server", timeout or 0)


class Engine:
    """An offline engine.

    Args:
        model: directory of a checkpoint.
        pruning: its "vispruner" option, None for an engine that does not prune.
        plugin: whether the plugin is loaded at all.
        apart: whether the engine core runs in another process, as in a server.
        record: directory for the files of `_record`, numbered in order.
        version: reported as vLLM's.
        runner: "V1", or "V2": vLLM's default on GPUs, here with Triton's interpreter.
        pooling: `runner` and `convert` of vLLM, for an engine whose answers are embeddings.
        options: further arguments of `vllm.LLM`.

    Raises:
        ValueError, RuntimeError: the engine could not be made.
    """

    def __init__(
        self,
        model: Path,
        pruning: dict[str, Any] | None = None,
        *,
        plugin: bool = True,
        apart: bool = False,
        record: Path | None = None,
        version: str | None = None,
        runner: str = "V1",
        pooling: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        settings = {
            "model": str(model),
            "dtype": "float32",
            "max_model_len": 1024,
            "enforce_eager": True,
            "max_num_seqs": 4,
            "seed": 0,
            "disable_log_stats": True,
            # Every start fills the cache with zeros, and VLLM_CPU_KVCACHE_SPACE is in gigabytes.
            "kv_cache_memory_bytes": 2**25,
            "enable_prefix_caching": False,
            **options,
            **(pooling or {}),
        }
        if pruning is not None:
            settings["hf_overrides"] = {"vispruner": pruning}
        self._connection, child = multiprocessing.Pipe()
        cores = sorted(os.sched_getaffinity(0))
        ranks = range(
            options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
        )
        variables = {
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[i % len(cores)]) for i in ranks)
        }
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(apart))
        if not plugin:
            variables["VLLM_PLUGINS"] = ""
        self._process = _start(runner, _serve, child, settings, variables, record, version)
        child.close()
        try:
            problem = self._connection.recv()
        except EOFError:
            problem = RuntimeError("the engine's process ended")
        if problem is not None:
            self.close()
            raise problem

    def __call__(
        self,
        requests: Sequence[dict[str, Any]],
        length: int = 16,
        adapter: Path | None = None,
        extra_args: dict[str, Any] | None = None,
    ) -> list[Answer]:
        """Answers of `length` tokens; ValueError if a request is refused.

        Args:
            adapter: directory of a LoRA adapter to use, None for none.
            extra_args: of the sampling parameters.
        """
        self._connection.send((list(requests), length, adapter, extra_args))
        answers = self._connection.recv()
        if isinstance(answers, Exception):
            raise answers
        result: list[Answer]
        result, self._counted = answers
        return result

    def count(self, metric: str) -> float:
        """A counter of vLLM's after the last answers, of an engine with `disable_log_stats=False`.

        Raises:
            KeyError: it has no such counter.
        """
        return self._counted[metric]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
