"""`equipoise bench recovery`: ranks are killed under a constant stream of requests."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from equipoise.bench.outcome import BenchOutcome, Row, with_goal
from equipoise.bench.readiness import Readiness, measure_readiness
from equipoise.bench.request_stream import RequestStream, StreamResult
from equipoise.bench.served import WAIT_S, serve_stream, take_model
from equipoise.config import EPLBConfig
from equipoise.elastic.controller import Controller
from equipoise.elastic.spec import HostBackup, ServiceSpec
from equipoise.errors import ConfigError

NEXT_TOKEN_S = {"cpu": 2.0, "cuda": 5.0}
COST_SHARE = 0.01
LOOK_S = 0.005


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
        host_backup: experts that ranks keep in host memory.
        respawn: whether a rank that was killed is replaced.
        size_gb: serve a model of random weights with so many GB of experts instead; written to a
            directory for temporary files first.
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
    host_backup: HostBackup = "none"
    respawn: bool = True
    size_gb: float | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.size_gb is not None:
            raise ConfigError("a model is either given or made of a size, not both")
        if self.num_ranks < 2:
            raise ConfigError(f"at least 2 ranks, of which one may die, got {self.num_ranks}")
        if not self.respawn and self.num_kills >= self.num_ranks:
            raise ConfigError(f"{self.num_kills} of {self.num_ranks} ranks killed leave none")
        if self.num_kills < 1:
            raise ConfigError(f"at least 1 rank must be killed, got {self.num_kills}")


@dataclass(frozen=True)
class _Kill:
    """One death.

    Attributes:
        rank: that was killed.
        noticed_s: until its death was known to the controller.
        switched_s: until survivors had experts, connections and all else of the next generation.
        next_token_s: longest time without any token, from the last before the signal on.
        full_s: until all ranks served again.
        parts_s: of the survivor that the others waited for, up to the switch; see `RankStatus`.
    """

    rank: str
    noticed_s: float = 0.0
    switched_s: float = 0.0
    next_token_s: float = 0.0
    full_s: float = 0.0
    parts_s: Mapping[str, float] = field(default_factory=dict)

    def tell_parts(self) -> str:
        """What survivors did when, on one line."""
        failed_s = self.switched_s - sum(self.parts_s.values())
        parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.parts_s.items())
        return (
            f"{self.rank} killed: survivors' step failed after {failed_s:.3f} s; {parts}; first "
            f"token {self.next_token_s - self.switched_s:.3f} s behind the switch"
        )


def measure_recovery(bench: RecoveryBench, say: Callable[[str], None]) -> BenchOutcome:
    """Kill ranks at random, and compare every token with the plain model's.

    Args:
        bench: what to measure.
        say: told how far it is.
    Collective: none; starts those who meet.
    Raises: TimeoutError if the service does not come back.
    """
    with take_model(bench.model, bench.size_gb, bench.seed, say) as model:
        return _measure(bench, model, say)


def _measure(bench: RecoveryBench, model: Path, say: Callable[[str], None]) -> BenchOutcome:
    spec = ServiceSpec(
        model=model,
        num_ranks=bench.num_ranks,
        config=EPLBConfig(window_size=64, step_interval=128),
        device=bench.device,
        max_len=128,
        timeout_s=bench.timeout_s,
        respawn=bench.respawn,
        host_backup=bench.host_backup,
    )
    say("starting ranks")
    load = (bench.num_in_flight, bench.num_new_tokens, bench.seed)
    with serve_stream(spec, *load) as (controller, stream):
        stream.start()
        kills = _kill_all(bench, controller, stream, say)
        left = bench.num_requests - stream.num_ended
        stream.wait_for(max(0, left), WAIT_S)
        step_s = _await_step_s(controller)
        stream.end(WAIT_S)
        totals = controller.status().totals
    say("comparing every token with the plain model's")
    result = stream.check(model, bench.device)
    return _sum_up(bench, kills, result, totals.rerun, measure_readiness(model, step_s))


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
        kill = _watch_recovery(controller, stream, number, _Kill(victim.name), started)
        say(f"the next token came after {kill.next_token_s:.2f} s; {kill.tell_parts()}")
        num_ranks = bench.num_ranks if bench.respawn else bench.num_ranks - number - 1
        full_s = _wait_for_size(controller, num_ranks, started)
        kills.append(replace(kill, full_s=full_s))
        if number + 1 < bench.num_kills:
            # So that requests are served between two deaths, also where ranks are back at once.
            _pass(max(0.0, bench.every_s - (time.monotonic() - started)))
    return kills


def _watch_recovery(
    controller: Controller, stream: RequestStream, number: int, kill: _Kill, started: float
) -> _Kill:
    """What came when, until survivors have gone on."""
    while (now := time.monotonic()) - started < WAIT_S:
        status = controller.status()
        if not kill.noticed_s and status.totals.deaths > number:
            kill = replace(kill, noticed_s=now - started)
        has_switched = status.phase in ("committing", "retiring") and kill.noticed_s
        has_recovered = status.totals.recoveries > number
        if not kill.switched_s and (has_switched or has_recovered):
            kill = replace(kill, switched_s=now - started)
        if has_recovered:
            stream.wait_for(1, WAIT_S)
            told = [one.parts_s for one in status.ranks if "register" in one.parts_s]
            slowest = min(told, key=lambda parts_s: parts_s.get("ready", 0.0), default={})
            return replace(kill, next_token_s=stream.take_gap_s(), parts_s=slowest)
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


def _await_step_s(controller: Controller) -> float:
    """Median seconds of a step; ranks that have just changed generations tell it a little later."""
    started = time.monotonic()
    while time.monotonic() - started < WAIT_S:
        told = [one.step_s for one in controller.status().ranks if one.step_s]
        if told:
            return statistics.median(told)
        _pass(LOOK_S)
    raise TimeoutError(f"no rank has told how long its steps take within {WAIT_S:g} s")


def _pass(seconds: float) -> None:
    time.sleep(seconds)


def _sum_up(
    bench: RecoveryBench,
    kills: list[_Kill],
    result: StreamResult,
    num_rerun: int,
    readiness: Readiness,
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
            "noticed_s": kill.noticed_s,
            "switched_s": kill.switched_s,
            "full_s": kill.full_s,
            "parts_s": dict(kill.parts_s),
        }
        rows.append(with_goal(row, "value", NEXT_TOKEN_S[bench.device], at_most=True))
    cost: Row = {
        "what": "cost of being able to recover: share of a step",
        "value": readiness.share,
        "unit": "",
        "step_ms": readiness.step_s * 1e3,
        "beat_us": readiness.beat_s * 1e6,
        "deadline_us": readiness.deadline_s * 1e6,
        "waits": readiness.num_waits,
    }
    rows.append(with_goal(cost, "value", COST_SHARE, at_most=True))
    notes = [
        f"{result.num_requests} requests, {result.num_tokens} tokens in {result.seconds:.1f} s; "
        f"{num_rerun} requests were run again elsewhere from their tokens so far",
        "to the next token: the longest time without a token of any request, from the last one "
        "before the signal; noticed: until the controller knew; switched: until survivors had all "
        "of the next generation; full: until as many ranks as before serve",
        f"a sign of life takes {readiness.beat_s * 1e6:.0f} us of CPU, beside the forward thread, "
        f"every {ServiceSpec.beat_s:g} s; a deadline makes one of the {readiness.num_waits} waits "
        f"of a step {readiness.deadline_s * 1e6:.2f} us longer; a step takes "
        f"{readiness.step_s * 1e3:.1f} ms",
        *(kill.tell_parts() for kill in kills),
    ]
    return BenchOutcome("recovery", _describe(bench), tuple(rows), tuple(notes))


def _describe(bench: RecoveryBench) -> dict[str, object]:
    return {
        "ranks": bench.num_ranks,
        "kills": bench.num_kills,
        "every_s": bench.every_s,
        "requests": bench.num_requests,
        "in_flight": bench.num_in_flight,
        "new_tokens": bench.num_new_tokens,
        "model": str(bench.model or "bundled") if bench.size_gb is None else "random",
        "size_gb": bench.size_gb,
        "host_backup": bench.host_backup,
        "respawn": bench.respawn,
        "device": bench.device,
        "seed": bench.seed,
    }
