"""What HTTP costs: the same requests to a service, directly and by way of a server."""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from equipoise.bench.outcome import BenchOutcome, with_goal
from equipoise.elastic.service import RequestFailed, Service, ServiceRequest
from equipoise.engine.requests import Delta, SamplingParams
from equipoise.errors import EquipoiseError
from equipoise.server.serving import HttpServer
from equipoise.server.settings import ServerSettings

GOAL = 0.10
PROMPT = tuple(b + 3 for b in b"The clocks agreed, and nobody")
END_S = 10.0
"""How long the client has to end."""
READY_S = 300.0


@dataclass(frozen=True)
class OverheadSpec:
    """What is measured.

    Attributes:
        num_streams: requests at once.
        num_tokens: of each answer.
        num_rounds: of each kind, in turns.
    """

    num_streams: int = 32
    num_tokens: int = 128
    num_rounds: int = 5


def measure_overhead(
    make_service: Callable[[], Service], spec: OverheadSpec, setting: dict[str, Any]
) -> BenchOutcome:
    """Compare tokens per second with HTTP and without, in turns, on one service.

    Args:
        make_service: makes it; it is closed at the end.
        spec: how much.
        setting: what else is to stand in the outcome.
    Collective: none.
    Raises: EquipoiseError if a request is not served whole.
    """
    direct, by_http = list[float](), list[float]()
    with _serving(make_service) as (server, service), _client(server) as ask:
        ask(spec.num_streams, _make_body(spec))  # the first one warms up
        for _ in range(spec.num_rounds):
            direct.append(_ask_directly(service, spec))
            by_http.append(ask(spec.num_streams, _make_body(spec)))
    ratios = [1 - http / alone for alone, http in zip(direct, by_http, strict=True)]
    row = {
        "case": f"{spec.num_streams} streams",
        "alone_tokens_per_s": statistics.median(direct),
        "http_tokens_per_s": statistics.median(by_http),
        "overhead": statistics.median(ratios),
        "overhead_least": min(ratios),
        "overhead_most": max(ratios),
    }
    return BenchOutcome(
        name="serve",
        setting={**setting, **vars(spec)},
        rows=(with_goal(row, "overhead", GOAL, at_most=True),),
        notes=(
            "alone: requests are given to the controller, and tokens are counted where they arrive",
            "http: the same by a client of its own process, which takes its share of the machine",
        ),
        versions={name: version(name) for name in ("torch", "fastapi", "uvicorn")},
    )


def _make_body(spec: OverheadSpec) -> dict[str, Any]:
    return {
        "prompt": list(PROMPT),
        "max_tokens": spec.num_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


def _ask_directly(service: Service, spec: OverheadSpec) -> float:
    """Tokens per second."""
    is_over = threading.Semaphore(0)
    lock = threading.Lock()
    counted, failures = [0], list[str]()

    def take(item: Delta | RequestFailed) -> None:
        with lock:
            if isinstance(item, RequestFailed):
                failures.append(item.reason)
                is_over.release()
                return
            counted[0] += len(item.tokens)
        if item.finish_reason is not None:
            is_over.release()

    sampling = SamplingParams(max_new_tokens=spec.num_tokens, ignore_end=True)
    began_s = time.monotonic()
    for number in range(spec.num_streams):
        service.submit(ServiceRequest(f"direct-{began_s}-{number}", PROMPT, sampling), take)
    for _ in range(spec.num_streams):
        if not is_over.acquire(timeout=READY_S):
            raise EquipoiseError(f"requests did not end within {READY_S:g} s")
    seconds = time.monotonic() - began_s
    if failures or counted[0] != spec.num_streams * spec.num_tokens:
        raise EquipoiseError(f"requests were not served whole: {failures or counted[0]}")
    return counted[0] / seconds


@contextmanager
def _serving(make_service: Callable[[], Service]) -> Iterator[tuple[HttpServer, Service]]:
    server = HttpServer(ServerSettings(port=0), io.StringIO())
    ready = threading.Event()
    found, errors = list[Service](), list[BaseException]()

    def take(service: Service) -> None:
        found.append(service)
        ready.set()

    def run() -> None:
        try:
            server.run(make_service, take)
        except BaseException as error:
            errors.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="http", daemon=True)
    thread.start()
    try:
        if not ready.wait(READY_S):
            raise EquipoiseError(f"the service is not ready after {READY_S:g} s")
        if found:
            yield server, found[0]
    finally:
        server.stop()
        thread.join(READY_S)
        if errors:
            raise errors[0]


@contextmanager
def _client(server: HttpServer) -> Iterator[Callable[[int, dict[str, Any]], float]]:
    host, port = server.url.removeprefix("http://").split(":")
    process = subprocess.Popen(  # noqa: S603 - this Python and this package
        [sys.executable, "-m", "equipoise.server.streams", host, port],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(num_streams: int, body: dict[str, Any]) -> float:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"streams": num_streams, "body": body}) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise EquipoiseError(f"the client ended with {process.wait(END_S)}")
        told = json.loads(answer)
        if told["tokens"] != num_streams * body["max_tokens"]:
            raise EquipoiseError(f"streams were not served whole: {told['tokens']} tokens")
        return float(told["tokens"] / told["seconds"])

    try:
        yield ask
    finally:
        process.stdin.close()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()
