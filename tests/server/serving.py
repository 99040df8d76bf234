"""Servers within the test's process: real sockets, a real model on one rank."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import openai

from equipoise.bundled import model_directory
from equipoise.config import EPLBConfig
from equipoise.elastic.service import Service
from equipoise.elastic.spec import ServiceSpec
from equipoise.server.one_rank import OneRankService
from equipoise.server.serving import HttpServer
from equipoise.server.settings import Keys, ServerSettings

KEYS = Keys(api="api-key-0123456789", admin="admin-key-0123456789")
DEADLINE_S = 120.0


class Running:
    """A server that serves."""

    def __init__(self, server: HttpServer, log: io.StringIO) -> None:
        self.server, self._log = server, log
        self.url = server.url
        self.service: Service | None = None
        self.ended: list[bool] = []

    def http(self, key: str | None = None, **options: Any) -> httpx2.Client:
        """A plain client."""
        client = httpx2.Client(base_url=self.url, timeout=DEADLINE_S, **options)
        if key is not None:
            client.headers["authorization"] = f"Bearer {key}"
        return client

    def openai(self, key: str = "none") -> openai.OpenAI:
        """The public client, which shall not try again by itself."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=DEADLINE_S
        )

    def send(self, data: bytes) -> bytes:
        """What comes back for raw bytes, until the server closes or is silent."""
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    answer += part
            return answer

    def lines(self) -> list[dict[str, Any]]:
        """Of the log, so far."""
        return [json.loads(line) for line in self._log.getvalue().splitlines()]

    @property
    def log_text(self) -> str:
        """The log as it was written."""
        return self._log.getvalue()

    def find_line(self, request_id: str) -> dict[str, Any]:
        """The log's line of a request, once it is written."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [line for line in self.lines() if line.get("id") == request_id]
            return bool(found)

        wait_until(look)
        return found[0]


def make_spec(directory: Path | None = None, **options: Any) -> ServiceSpec:
    """One rank of the bundled model."""
    values: dict[str, Any] = {"max_len": 256, "max_batch_size": 8, **options}
    return ServiceSpec(
        model=directory or model_directory(), num_ranks=1, config=EPLBConfig(), **values
    )


@contextlib.contextmanager
def serve(
    spec: ServiceSpec,
    *,
    make_service: Callable[[ServiceSpec], Service] = OneRankService,
    **settings: Any,
) -> Iterator[Running]:
    """A server in a thread; its end is waited for."""
    log = io.StringIO()
    running = Running(HttpServer(ServerSettings(port=0, **settings), log), log)
    ready = threading.Event()
    errors: list[BaseException] = []

    def take(service: Service) -> None:
        running.service = service
        ready.set()

    def run() -> None:
        try:
            running.ended.append(running.server.run(lambda: make_service(spec), take))
        except BaseException as error:
            errors.append(error)
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        assert ready.wait(DEADLINE_S)
        if not errors:
            yield running
    finally:
        running.server.stop()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        if errors:
            raise errors[0]


def wait_until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Fail after a while; meanwhile give the processor away."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def read_events(lines: Iterator[str]) -> list[Any]:
    """Data of a stream of events; the last is the word that ends it."""
    data = [line.removeprefix("data: ") for line in lines if line]
    return [part if part == "[DONE]" else json.loads(part) for part in data]


def count(metrics: str, name: str, labels: Mapping[str, str] | None = None) -> float:
    """One figure of /metrics."""
    wanted = name + (
        "" if not labels else "{" + ",".join(f'{k}="{v}"' for k, v in labels.items()) + "}"
    )
    found = [line for line in metrics.splitlines() if line.startswith(wanted + " ")]
    return float(found[0].rpartition(" ")[2])
