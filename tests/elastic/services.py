"""Services over real ranks for tests, and streams of requests into them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from equipoise.bench.request_stream import RequestStream
from equipoise.bench.served import make_encoder
from equipoise.bundled import model_directory
from equipoise.config import EPLBConfig
from equipoise.elastic.controller import Controller
from equipoise.elastic.launcher import Launcher, RankHandle, RankSeat
from equipoise.elastic.service import RankStatus
from equipoise.elastic.spec import ServiceSpec
from equipoise.launch.processes import LocalLauncher

WAIT_S = 100.0
"""What takes longer, on the slowest machine, hangs."""


def make_spec(num_ranks: int, **options: Any) -> ServiceSpec:
    chosen: dict[str, Any] = {
        "config": EPLBConfig(window_size=8, step_interval=24, communicator="torch_gloo"),
        "max_batch_size": 4,
        "max_len": 64,
        "timeout_s": 20.0,
        "silence_s": 20.0,
        # The first of a worker loads torch, where others do too.
        "start_s": 300.0,
    }
    return ServiceSpec(model_directory(), num_ranks, **{**chosen, **options})


@contextmanager
def serving(
    num_ranks: int, launcher: Launcher | None = None, **options: Any
) -> Iterator[Controller]:
    """A service of as many ranks of the bundled model; nothing of it is left behind."""
    before = set(threading.enumerate())
    controller = Controller(
        make_spec(num_ranks, **options), launcher or LocalLauncher("cpu", model_directory())
    )
    controller.start()
    pids = find_pids(controller)
    try:
        yield controller
        pids |= find_pids(controller)
    finally:
        controller.close()
    # Those of channels that were closed end by themselves, and a process that was killed is
    # collected by another.
    until = time.monotonic() + WAIT_S
    threads = {one for one in threading.enumerate() if "controller" in one.name} - before
    for one in threads:
        one.join(max(0.0, until - time.monotonic()))
    assert not any(one.is_alive() for one in threads), f"{threads} outlive their service"
    wait_until(lambda: not any(map(is_alive, pids)), max(0.0, until - time.monotonic()))


@contextmanager
def streaming(controller: Controller, num_in_flight: int = 10) -> Iterator[RequestStream]:
    """Requests all the while; at the end none has failed, and every token is the plain model's."""
    stream = RequestStream(controller, make_encoder(model_directory()), num_in_flight, 6)
    stream.start()
    stream.wait_for(num_in_flight, WAIT_S)
    yield stream
    stream.wait_for(num_in_flight, WAIT_S)
    stream.end(WAIT_S)
    result = stream.check(model_directory())
    assert (result.num_failed, result.num_wrong) == (0, 0), result


class DoomedLauncher(LocalLauncher):
    """Kills ranks of some names as soon as they have been started."""

    def __init__(self, *doomed: str) -> None:
        super().__init__("cpu", model_directory())
        self.doomed = set(doomed)

    def start(self, seat: RankSeat) -> RankHandle:
        handle = super().start(seat)
        if seat.name in self.doomed:
            handle.stop(kill=True)
        return handle


class HoldingLauncher(LocalLauncher):
    """Stops ranks of some names as soon as they have been started, until they are let go."""

    def __init__(self, *held: str) -> None:
        super().__init__("cpu", model_directory())
        self.held = set(held)
        self._stopped: list[int] = []

    def start(self, seat: RankSeat) -> RankHandle:
        handle = super().start(seat)
        if seat.name in self.held:
            os.kill(handle.pid, signal.SIGSTOP)
            self._stopped.append(handle.pid)
        return handle

    def let_go(self) -> None:
        """Have them go on, and stop no more."""
        self.held.clear()
        for pid in self._stopped:
            os.kill(pid, signal.SIGCONT)
        self._stopped.clear()


def find_rank(controller: Controller, name: str) -> RankStatus:
    return next(rank for rank in controller.status().ranks if rank.name == name)


def list_serving(controller: Controller) -> list[str]:
    return [rank.name for rank in controller.status().ranks if rank.state == "serving"]


def find_pids(controller: Controller) -> set[int]:
    return {rank.pid for rank in controller.status().ranks if rank.pid is not None}


def wait_until(is_so: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to be"
        threading.Event().wait(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
