"""Requests to an OpenAI-compatible server; errors are one line."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from typing import Any
from urllib.parse import urlsplit


class ServerError(Exception):
    """The server cannot be used; the message is one line."""


class RefusedError(ServerError):
    """The server answered a request with an error.

    Attributes:
        status: of HTTP; reason: the server's message.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status}: {reason}")
        self.status, self.reason = status, reason


class Client:
    """Requests to a server.

    The environment variable OPENAI_API_KEY is sent as the key, if it is set.

    Args:
        url: such as http://localhost:8000, with or without /v1.
        timeout: seconds to wait for the next part of an answer.

    Raises:
        ServerError: the URL is invalid.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self._timeout = url.rstrip("/").removesuffix("/v1"), timeout
        try:
            parts = urlsplit(self.url)
            self._address = (parts.hostname or "", parts.port)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"expected a URL such as http://localhost:8000, got {url!r}")
        secure = parts.scheme == "https"
        self._connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._path = parts.path
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ServerError("OPENAI_API_KEY has characters that a header cannot have")
        if not (self.url.isascii() and self.url.isprintable()):
            raise ServerError(f"expected a URL of ASCII characters, got {url!r}")
        self._headers: dict[str, str] = {"Authorization": f"Bearer {key}"} if key else {}

    def get(self, path: str) -> Any:
        """The JSON at a path.

        Raises:
            ServerError: there is none.
        """
        with self._answer("GET", path, None) as (answer, _):
            return self._json(answer.read())

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[Any, Message]:
        """The JSON answer to a request, and its headers.

        Raises:
            ServerError: there is none.
        """
        with self._answer("POST", path, body) as (answer, _):
            return self._json(answer.read()), answer.headers

    def stream(self, path: str, body: Mapping[str, Any]) -> tuple[list[tuple[float, Any]], Message]:
        """The events of a streamed answer, each with its milliseconds since the request was sent,
        and the headers.

        Raises:
            ServerError: the answer is an error, or breaks off.
        """
        events: list[tuple[float, Any]] = []
        with self._answer("POST", path, body) as (answer, start):
            for line in answer:
                kind, _, data = line.strip().partition(b":")
                if kind != b"data":
                    continue
                if data.strip() == b"[DONE]":
                    return events, answer.headers
                event = self._json(data)
                if "error" in event:
                    raise RefusedError(int(event["error"].get("code") or 500), _message(data))
                events.append((1e3 * (time.perf_counter() - start), event))
        raise ServerError(f"{self.url} broke off an answer")

    @contextmanager
    def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> Iterator[tuple[http.client.HTTPResponse, float]]:
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **self._headers}
        connection = self._connect(*self._address, timeout=self._timeout)
        try:
            connection.connect()
            start = time.perf_counter()  # the time to the first token is without the connection
            connection.request(method, self._path + path, content, headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise RefusedError(answer.status, _message(answer.read()) or answer.reason)
            yield answer, start
        except TimeoutError as error:
            raise ServerError(
                f"{self.url} did not answer within {self._timeout:g} s (--timeout)"
            ) from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # of the host's name
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ServerError(f"cannot reach {self.url}: {reason}") from error
        finally:
            connection.close()

    def _json(self, content: bytes) -> Any:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ServerError(f"{self.url} answers no JSON: is it an OpenAI server?") from error
        if not isinstance(found, dict):
            raise ServerError(f"{self.url} answers no JSON object: is it an OpenAI server?")
        return found


def _message(content: bytes) -> str:
    """The message of an error, on one line."""
    text = content.decode(errors="replace")
    try:
        found = json.loads(text)
        inside = found.get("error", found)
        text = inside if isinstance(inside, str) else inside.get("message") or inside["detail"]
    except (ValueError, AttributeError, KeyError, TypeError):
        pass
    return " ".join(str(text).split())[:500]
