"""vLLM's OpenAI server in a separate process, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import openai


@dataclass(frozen=True)
class Server:
    """A running server and its address."""

    url: str

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def async_client(self, timeout: float) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=timeout
        )

    def metrics(self) -> str:
        """The content of /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            text: str = response.read().decode()
        return text

    def post(self, path: str) -> None:
        """Posts to an endpoint without arguments; raises unless it succeeds."""
        call = urllib.request.Request(f"{self.url}{path}", method="POST")
        with urllib.request.urlopen(call, timeout=30):
            pass

    def metric(self, name: str, **labels: str) -> float:
        """The sum of all samples of a metric with these labels, 0 if there are none."""
        from prometheus_client.parser import text_string_to_metric_families

        return sum(
            sample.value
            for family in text_string_to_metric_families(self.metrics())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False


class Process(Protocol):
    """The part of `subprocess.Popen` that is used."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> object: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


def new_process(options: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process:
    """Starts a server as users do."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


@contextlib.contextmanager
def running(
    options: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    patience: float,
    start: Callable[[Sequence[str], Path, Mapping[str, str]], Process] = new_process,
) -> Iterator[Server]:
    """Runs a server on a free port inside the block.

    Args:
        options: of the server, including the model.
        log: file for its output.
        environment: of its process.
        patience: maximum seconds for its start.
        start: starts its process, with these options, log and environment.

    Raises:
        RuntimeError: it did not start; the message includes the end of the log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start(["--host", "127.0.0.1", "--port", str(port), *options], log, environment)
    server = Server(f"http://127.0.0.1:{port}")
    try:
        until = time.monotonic() + patience
        while not server.healthy():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
