"""A server from its port to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

import uvicorn
from prometheus_client import CollectorRegistry
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from equipoise.elastic.service import Service, ServiceClosed
from equipoise.errors import ConfigError, EquipoiseError, MembershipError
from equipoise.server.answers import Mailbox
from equipoise.server.app import make_app
from equipoise.server.backend import Backend
from equipoise.server.log import JsonLog, LogHandler
from equipoise.server.settings import ServerSettings

KEEP_ALIVE_S = 75
"""How long a connection may be idle. Above the minute after which usual proxies end theirs: a
request must not meet the end of its connection."""
HEAD_S = 30.0
"""For the head of a request, from the first byte of it or of its connection."""
FLUSH_S = 5.0
"""When all requests have ended, for the last bytes to clients that read slowly."""
BACKLOG = 1024
LOOK_S = 1.0
"""Between two looks at whether any rank is left."""


class HttpServer:
    """Serves HTTP.

    Its port is bound at once, so that a taken one is told before the model is loaded.

    Args:
        settings: where, for whom, how much.
        log_stream: gets a line of JSON for each request; stays the caller's.
    Raises: ConfigError if the address cannot be bound to.
    """

    def __init__(self, settings: ServerSettings, log_stream: TextIO) -> None:
        self._settings, self._log_stream = settings, log_stream
        self._socket = _bind(settings.host, settings.port)
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._is_stopped = False

    @property
    def url(self) -> str:
        """Where it is found."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(
        self,
        make_service: Callable[[], Service],
        on_ready: Callable[[Service], None],
        give_up: Callable[[], None] = lambda: None,
    ) -> bool:
        """Serve until a signal or `stop` says that it is enough.

        SIGTERM or SIGINT: no new requests, those in flight finish within the deadline. A second
        one ends at once.

        Args:
            make_service: makes what serves, in a thread; meanwhile the server lives but is not
                ready. It is closed at the end.
            on_ready: called once it serves.
            give_up: called, in another thread, when it is enough while `make_service` still runs,
                which it then may cut short by an error.
        Returns:
            Whether all requests ended by themselves.
        Raises: whatever `make_service` raises; MembershipError once no rank is left.
        """
        return asyncio.run(self._run(_Making(make_service, on_ready, give_up)))

    def stop(self) -> None:
        """As SIGTERM; from any thread, at any time."""
        with self._lock:
            self._is_stopped = True
            if self._loop is not None and self._stop is not None:
                with contextlib.suppress(RuntimeError):  # it has ended
                    self._loop.call_soon_threadsafe(self._stop.set)

    async def _run(self, making: _Making) -> bool:
        loop = asyncio.get_running_loop()
        stop, hurry = asyncio.Event(), asyncio.Event()
        with self._lock:
            self._loop, self._stop = loop, stop
            if self._is_stopped:
                stop.set()
        log = JsonLog(self._log_stream)
        backend = Backend(Mailbox(loop), self._settings.model_name)
        gate = make_app(backend, self._settings, log, CollectorRegistry())
        server = _Uvicorn(_configure(gate, self._settings))
        try:
            with _listening_to_signals(stop, hurry), _logging_to(log):
                http = loop.create_task(server.serve([self._socket]))
                try:
                    return await self._serve(backend, making, stop, hurry, log)
                finally:
                    server.should_exit = True
                    server.force_exit = hurry.is_set()
                    await http
        finally:
            self._socket.close()
            log.close()

    async def _serve(
        self,
        backend: Backend,
        making: _Making,
        stop: asyncio.Event,
        hurry: asyncio.Event,
        log: JsonLog,
    ) -> bool:
        if not await _start(backend, making, stop):
            return True
        try:
            log.write("ready", url=self.url, model=backend.model_name)
            making.on_ready(backend.service)
            failed = await self._wait_for_end(backend, stop)
        except BaseException:
            await backend.end(0.0)
            raise
        log.write("ending", failed=failed)
        drained = await self._drain(backend, hurry)
        log.write("ended", drained=drained)
        if failed is not None:
            raise MembershipError(failed)
        return drained

    async def _drain(self, backend: Backend, hurry: asyncio.Event) -> bool:
        """Let what is in flight end, unless there is a hurry."""
        ending = asyncio.ensure_future(backend.end(self._settings.limits.drain_timeout_s))
        hurrying = asyncio.ensure_future(hurry.wait())
        await asyncio.wait({ending, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not ending.done():
            await asyncio.to_thread(backend.service.close)
        return await ending

    async def _wait_for_end(self, backend: Backend, stop: asyncio.Event) -> str | None:
        """Until it is told to end, or nothing is left that serves: then why."""
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await stop.wait()
            try:
                status = await backend.call(lambda service: service.status())
            except ServiceClosed:  # a service that does not answer may yet do so again
                continue
            if status.phase == "failed" and all(rank.state == "dead" for rank in status.ranks):
                return status.reason
        return None


@dataclass(frozen=True)
class _Making:
    """How a service is come by. As the arguments of `HttpServer.run`."""

    make_service: Callable[[], Service]
    on_ready: Callable[[Service], None]
    give_up: Callable[[], None]


async def _start(backend: Backend, making: _Making, stop: asyncio.Event) -> bool:
    """Bring up what serves; False if it was enough before that."""
    starting = asyncio.ensure_future(backend.start(making.make_service))
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if starting.done():
        await starting
        return True
    await asyncio.to_thread(making.give_up)
    try:
        await starting
    except EquipoiseError:  # cut short, as it was told to be
        return False
    return True


class _Protocol(HttpToolsProtocol):
    """With a time for a request's head too: who says nothing keeps no connection."""

    _silence: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._silence is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._stop_expecting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._silence = self.loop.call_later(HEAD_S, self.transport.close)

    def _stop_expecting(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None


class _Uvicorn(uvicorn.Server):
    """Whose signals are ours: uvicorn ends with the signal that it got, not with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _configure(gate: object, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        gate,  # type: ignore[arg-type]
        lifespan="off",
        ws="none",
        loop="none",
        http=_Protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.limits.num_connections,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(FLUSH_S),
        backlog=BACKLOG,
    )


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"--host {host} --port {port}: cannot be bound to: {error.strerror}; --port 0 takes a "
            "free one"
        ) from error
    return bound


@contextlib.contextmanager
def _listening_to_signals(stop: asyncio.Event, hurry: asyncio.Event) -> Iterator[None]:
    """Only in the main thread, which alone can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hear() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, hear)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _logging_to(log: JsonLog) -> Iterator[None]:
    handler = LogHandler(log)
    loggers = [logging.getLogger(name) for name in ("equipoise", "uvicorn.error", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True
