"""`equipoise bench recovery`: ranks are killed under a constant stream of requests."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from equipoise.bench.elastic import WAIT_S, make_encoder
from equipoise.bench.outcome import BenchOutcome, Row, with_goal
from equipoise.bench.request_stream import RequestStream, StreamResult
from equipoise.bundled import model_directory
from equipoise.config import EPLBConfig
from equipoise.elastic.channel import Channel
from equipoise.elastic.controller import Controller
from equipoise.elastic.rank import Pulse
from equipoise.elastic.spec import ServiceSpec
from equipoise.errors import ConfigError
from equipoise.launch.processes import LocalLauncher

NEXT_TOKEN_S = 2.0
COST_SHARE = 0.01
LOOK_S = 0.01
NUM_BEATS = 2000


@dataclass(frozen=True)
class RecoveryBench:
    """What is measured.

    Attributes:
        num_ranks: that serve, and again after each death.
        num_kills: how many ranks are killed, one after the other.
        every_s: between two kills, at least; the next comes once all ranks serve again.
        num_requests: at least so many.
        num_in_flight: requests at any time.
        num_new_tokens: of each request.
        model: checkpoint directory; None for the bundled model.
        device: kind of device.
        timeout_s: longest wait of a rank for another.
        seed: of the prompts, and of who is killed.
    """

    num_ranks: int = 4
    num_kills: int = 5
    every_s: float = 20.0
    num_requests: int = 1000
    num_in_flight: int = 32
    num_new_tokens: int = 8
    model: Path | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    timeout_s: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_ranks < 2:
            raise ConfigError(f"at least 2 ranks, of which one may die, got {self.num_ranks}")
        if self.num_kills < 1:
            raise ConfigError(f"at least 1 rank must be killed, got {self.num_kills}")


@dataclass(frozen=True)
class _Kill:
    """One death.

    Attributes:
        rank: that was killed.
        next_token_s: longest time without any token, from the last before the signal on.
        full_s: until all ranks served again.
    """

    rank: str
    next_token_s: float
    full_s: float


def measure_recovery(bench: RecoveryBench, say: Callable[[str], None]) -> BenchOutcome:
    """Kill ranks at random, and compare every token with the plain model's.

    Args:
        bench: what to measure.
        say: told how far it is.
    Collective: none; starts those who meet.
    Raises: TimeoutError if the service does not come back.
    """
    model = bench.model or model_directory()
    spec = ServiceSpec(
        model=model,
        num_ranks=bench.num_ranks,
        config=EPLBConfig(window_size=64, step_interval=128),
        device=bench.device,
        max_len=128,
        timeout_s=bench.timeout_s,
        respawn=True,
    )
    controller = Controller(spec, LocalLauncher(bench.device, model))
    controller.start()
    try:
        stream = RequestStream(
            controller,
            make_encoder(model),
            bench.num_in_flight,
            bench.num_new_tokens,
            bench.seed,
        )
        stream.start()
        kills = _kill_all(bench, controller, stream, say)
        left = bench.num_requests - stream.num_ended
        stream.wait_for(max(0, left), WAIT_S)
        stream.end(WAIT_S)
        totals = controller.status().totals
    finally:
        controller.close()
    say("comparing every token with the plain model's")
    return _sum_up(bench, kills, stream.check(model, bench.device), totals.rerun)


def _kill_all(
    bench: RecoveryBench,
    controller: Controller,
    stream: RequestStream,
    say: Callable[[str], None],
) -> list[_Kill]:
    chance = random.Random(bench.seed)
    kills = []
    stream.wait_for(bench.num_in_flight, WAIT_S)
    for number in range(bench.num_kills):
        started = time.monotonic()
        serving = [one for one in controller.status().ranks if one.state == "serving"]
        victim = chance.choice(serving)
        assert victim.pid is not None, "it serves"
        say(f"killing {victim.name}, {number + 1} of {bench.num_kills}")
        stream.take_gap_s()
        os.kill(victim.pid, signal.SIGKILL)
        next_token_s = _wait_for_recovery(controller, stream, number + 1, started)
        full_s = _wait_for_size(controller, bench.num_ranks, started)
        kills.append(_Kill(victim.name, next_token_s, full_s))
        if number + 1 < bench.num_kills:
            # So that requests are served between two deaths, also where ranks are back at once.
            _pass(max(0.0, bench.every_s - (time.monotonic() - started)))
    return kills


def _wait_for_recovery(
    controller: Controller, stream: RequestStream, number: int, started: float
) -> float:
    """Longest time without a token, until survivors have gone on."""
    while time.monotonic() - started < WAIT_S:
        if controller.status().totals.recoveries >= number:
            stream.wait_for(1, WAIT_S)
            return stream.take_gap_s()
        _pass(LOOK_S)
    raise TimeoutError(f"no recovery within {WAIT_S:g} s")


def _wait_for_size(controller: Controller, num_ranks: int, started: float) -> float:
    while time.monotonic() - started < WAIT_S:
        status = controller.status()
        serving = sum(rank.state == "serving" for rank in status.ranks)
        if serving == num_ranks and status.phase == "idle":
            return time.monotonic() - started
        _pass(LOOK_S)
    raise TimeoutError(f"{num_ranks} ranks did not serve again within {WAIT_S:g} s")


def _pass(seconds: float) -> None:
    threading.Event().wait(seconds)


def _measure_beat_s() -> float:
    """CPU seconds of one sign of life: saying it, making a frame of it and sending that."""
    left, right = socket.socketpair()
    sender, receiver = Channel(left), Channel(right)
    pulse = Pulse()
    received = threading.Thread(target=_receive, args=(receiver, NUM_BEATS), daemon=True)
    received.start()
    started = time.thread_time()
    for step in range(NUM_BEATS):
        pulse.set(steps=step, running=8, step_s=0.01)
        sender.send(pulse.read())
    seconds = time.thread_time() - started
    received.join(WAIT_S)
    sender.close()
    receiver.close()
    return seconds / NUM_BEATS


def _receive(channel: Channel, count: int) -> None:
    for _ in range(count):
        channel.receive()


def _sum_up(
    bench: RecoveryBench, kills: list[_Kill], result: StreamResult, num_rerun: int
) -> BenchOutcome:
    requests: Row = {
        "what": f"requests failed or wrong, of {result.num_requests}",
        "value": result.num_failed + result.num_wrong,
        "unit": "",
        "failed": result.num_failed,
        "wrong": result.num_wrong,
    }
    rows = [with_goal(requests, "value", 0, at_most=True)]
    for kill in kills:
        row: Row = {
            "what": f"{kill.rank} killed: to the next token",
            "value": kill.next_token_s,
            "unit": "s",
            "full_s": kill.full_s,
        }
        is_goal = bench.device == "cpu"
        rows.append(with_goal(row, "value", NEXT_TOKEN_S, at_most=True) if is_goal else row)
    beat_s = _measure_beat_s()
    cost: Row = {
        "what": "signs of life: share of a rank's time",
        "value": beat_s / ServiceSpec.beat_s,
        "unit": "",
        "beat_us": beat_s * 1e6,
    }
    rows.append(with_goal(cost, "value", COST_SHARE, at_most=True))
    notes = [
        f"{result.num_requests} requests, {result.num_tokens} tokens in {result.seconds:.1f} s; "
        f"{num_rerun} requests were run again elsewhere from their tokens so far",
        "to the next token: the longest time without a token of any request, from the last one "
        "before the signal; full: until as many ranks as before serve",
        f"a sign of life takes {beat_s * 1e6:.0f} us of CPU, beside the forward thread, every "
        f"{ServiceSpec.beat_s:g} s; deadlines of waits that end in time take nothing",
    ]
    setting = {
        "ranks": bench.num_ranks,
        "kills": bench.num_kills,
        "every_s": bench.every_s,
        "requests": bench.num_requests,
        "in_flight": bench.num_in_flight,
        "new_tokens": bench.num_new_tokens,
        "model": str(bench.model or "bundled"),
        "device": bench.device,
        "seed": bench.seed,
    }
    return BenchOutcome("recovery", setting, tuple(rows), tuple(notes))
