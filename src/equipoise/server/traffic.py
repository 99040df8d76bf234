"""What clients see of a server whose ranks come, go and are killed."""

from __future__ import annotations

import os
import queue
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from equipoise.bench.outcome import BenchOutcome, Row, with_goal
from equipoise.bundled import model_directory
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.server.client import ServerClient
from equipoise.server.client_load import ClientLoad, prepare

PAUSE_STEPS = 3.0
"""To which the engine is held at a change that was asked for."""
RECOVERY_S = 2.0
"""To which it is held where a rank has died."""
BESIDE_S = 0.05
"""That clients may see beside those."""
START_S, CHANGE_S, END_S, LOOK_S = 300.0, 300.0, 60.0, 0.02
MODEL_NAME = "equipoise-small"
_SERVING = re.compile(r"serving \S+ at (http://\S+)")


@dataclass(frozen=True)
class TrafficSpec:
    """What is measured.

    Attributes:
        case: `scale` goes through `sizes`; `kill` kills ranks, which are replaced.
        sizes: numbers of ranks, in turn; the first is what is begun with.
        num_kills: ranks that are killed, drawn at random.
        every_s: from one kill to the next, at least.
        num_requests: at least so many.
        num_clients: at once.
        num_tokens: of each answer, at most.
        options: of `equipoise serve`, beside those that this settles.
        seed: of who is killed.
    Raises: ConfigError if a number cannot be.
    """

    case: Literal["scale", "kill"] = "scale"
    sizes: tuple[int, ...] = (2, 4, 3, 5, 2)
    num_kills: int = 5
    every_s: float = 20.0
    num_requests: int = 2000
    num_clients: int = 16
    num_tokens: int = 16
    options: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.sizes) < 1 or any(one == other for one, other in pairwise(self.sizes)):
            raise ConfigError(f"sizes must be from 1 up, each unlike the last, got {self.sizes}")
        for name in ("num_kills", "num_requests", "num_clients", "num_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Event:
    """A change that clients may notice.

    Attributes:
        what: for people.
        began_s: by time.monotonic().
        ended_s: by time.monotonic().
        goal_s: most that 99 of 100 tokens may come behind the one before.
        figures: what else is known of it, by name.
    """

    what: str
    began_s: float
    ended_s: float
    goal_s: float
    figures: dict[str, float]


def measure_traffic(spec: TrafficSpec, say: Callable[[str], None]) -> BenchOutcome:
    """Serve OpenAI's clients through changes or deaths of the ranks, and judge what they got.

    Args:
        spec: what to measure.
        say: told how far it is.
    Collective: none; the server is a process of its own.
    Raises: EquipoiseError if the server does not come, or does not end in order; TimeoutError.
    """
    asked = prepare(model_directory(), spec.num_tokens)
    first = spec.sizes[0] if spec.case == "scale" else max(spec.sizes)
    options = [f"--ranks={first}", *(["--respawn"] if spec.case == "kill" else []), *spec.options]
    with _serving(options, say) as url:
        client = ServerClient(url)
        with ClientLoad(url, MODEL_NAME, asked, spec.num_clients) as load:
            run = _scale_all if spec.case == "scale" else _kill_all
            events = run(spec, client, load, say)
            load.wait_for(spec.num_requests, spec.num_requests * START_S)
        totals = client.status()["totals"]
    rows = [_describe_answers(load)]
    rows += [judge(event, load.find_gaps(event.began_s, event.ended_s)) for event in events]
    return BenchOutcome(
        name="serve",
        setting={**vars(spec), "sizes": list(spec.sizes), "options": list(spec.options)},
        rows=tuple(rows),
        notes=(
            f"{load.num_ended} answers to {spec.num_clients} clients at once, by the package "
            f"openai, each compared with the plain model's; {totals['rerun']} requests were run "
            "again on another rank",
            "between tokens: of all streams, where the time touches the change, from the request "
            "for it to its end, starts of processes included",
        ),
        versions={name: version(name) for name in ("openai", "torch", "uvicorn")},
    )


def _scale_all(
    spec: TrafficSpec, client: ServerClient, load: ClientLoad, say: Callable[[str], None]
) -> list[Event]:
    share = -(-spec.num_requests // len(spec.sizes))
    load.wait_for(share, START_S)
    events = []
    for before, after in pairwise(spec.sizes):
        say(f"{before} to {after} ranks")
        step_s = {before: _find_step_s(client)}
        began_s = time.monotonic()
        report = client.scale(to=after, timeout_s=int(CHANGE_S))
        ended_s = time.monotonic()
        load.wait_for(load.num_ended + share, START_S)
        step_s[after] = _find_step_s(client)
        larger_s = step_s[max(before, after)]
        goal_s = PAUSE_STEPS * larger_s + BESIDE_S
        figures = {"step_ms": 1000 * larger_s, "pause_ms": 1000 * float(report["pause_s"] or 0)}
        events.append(Event(f"{before} to {after} ranks", began_s, ended_s, goal_s, figures))
    return events


def _kill_all(
    spec: TrafficSpec, client: ServerClient, load: ClientLoad, say: Callable[[str], None]
) -> list[Event]:
    draw = random.Random(spec.seed)
    load.wait_for(spec.num_clients, START_S)
    events = []
    for number in range(1, spec.num_kills + 1):
        began_s = time.monotonic()
        victim = draw.choice(_find_serving(client))
        say(f"killing {victim['name']}, {number} of {spec.num_kills}")
        os.kill(victim["pid"], signal.SIGKILL)
        _wait_until(lambda n=number: client.status()["totals"]["recoveries"] >= n)  # type: ignore[misc]
        ended_s = time.monotonic()
        # Survivors serve on; the next death comes once there are as many as before.
        _wait_until(lambda: len(_find_serving(client)) == max(spec.sizes))
        figures = {"full_s": time.monotonic() - began_s}
        goal_s = RECOVERY_S + BESIDE_S
        events.append(Event(f"{victim['name']} killed", began_s, ended_s, goal_s, figures))
        threading.Event().wait(max(0.0, began_s + spec.every_s - time.monotonic()))
        load.wait_for(load.num_ended + spec.num_clients, START_S)
    return events


def _describe_answers(load: ClientLoad) -> Row:
    row: Row = {
        "what": f"answers failed or wrong, of {load.num_ended}",
        "value": len(load.wrong),
        "unit": "",
        "examples": load.wrong[:3],
    }
    return with_goal(row, "value", 0, at_most=True)


def judge(event: Event, gaps_s: Sequence[float]) -> Row:
    """Whether clients saw as little of a change as they may.

    Args:
        event: what happened.
        gaps_s: seconds between two tokens of a stream, of those that it touches.
    Raises: EquipoiseError if there are none: nothing was seen.
    """
    if not gaps_s:
        raise EquipoiseError(f"{event.what}: no tokens came meanwhile")
    row: Row = {
        "what": f"{event.what}: between tokens, p99",
        "value": 1000 * _find_percentile(gaps_s, 0.99),
        "unit": "ms",
        "median_ms": 1000 * statistics.median(gaps_s),
        "longest_ms": 1000 * max(gaps_s),
        "tokens": len(gaps_s),
        "seconds": event.ended_s - event.began_s,
        **event.figures,
    }
    return with_goal(row, "value", 1000 * event.goal_s, at_most=True)


def _find_percentile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _find_serving(client: ServerClient) -> list[dict[str, Any]]:
    return [rank for rank in client.status()["ranks"] if rank["state"] == "serving"]


def _find_step_s(client: ServerClient) -> float:
    return max(float(rank["step_s"]) for rank in _find_serving(client))


def _wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + CHANGE_S
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"the ranks were not back within {CHANGE_S:g} s")
        threading.Event().wait(LOOK_S)


@contextmanager
def _serving(options: Sequence[str], say: Callable[[str], None]) -> Iterator[str]:
    """A server in a process of its own, which has to end with 0."""
    command = [sys.executable, "-m", "equipoise", "serve", "--port=0", *options]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(  # noqa: S603 - this Python and this package
                [*command, f"--log={folder}/requests"],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        try:
            say("starting the server")
            yield _find_url(lines, log)
            process.send_signal(signal.SIGTERM)
            status = process.wait(END_S)
            if status != 0:
                raise EquipoiseError(f"the server ended with {status}: {log.read_text()[-500:]}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(END_S)
            # Its last line has been read, or its ranks hold the pipe: then it is the thread's.
            reader.join(END_S)


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def _find_url(lines: queue.SimpleQueue[str | None], log: Path) -> str:
    until = time.monotonic() + START_S
    while True:
        try:
            line = lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise EquipoiseError(f"the server does not serve after {START_S:g} s") from None
        if line is None:
            raise EquipoiseError(f"the server did not start: {log.read_text()[-500:].strip()}")
        if found := _SERVING.match(line):
            return found[1]
