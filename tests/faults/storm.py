"""A service of real ranks that schedules of faults pass over, and what must be so after each."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from equipoise.elastic.controller import Controller
from equipoise.elastic.launcher import RankHandle, RankSeat
from equipoise.elastic.roster import RankRecord
from equipoise.errors import EquipoiseError
from equipoise.launch.processes import LocalLauncher
from tests.faults.answers import AnswerStream
from tests.faults.relay import Relay
from tests.faults.schedules import Act, Schedule
from tests.faults.small_service import PATIENCE_S, make_service

MOMENT_S, CALM_S, LOOK_S = 1.0, 0.1, 0.002
"""How long a moment of a change is waited for, at most, and while none is under way; and between
two looks."""
SHARED_MEMORY = Path("/dev/shm")
NUM_IN_FLIGHT, PAUSE_S = 8, 0.1
"""Requests at a time, and between one lot and the next: a fault meets ranks with work and without,
and what waits for ranks to come need not have the cores to itself."""
PER_RANK = {"controller": 12, "rank": 16}
SLACK = 24
"""Descriptors that another rank is good for, and those that may be closing just then."""


@dataclass
class FaultyRank:
    """A rank's process and its lines, as the test has hold of them.

    Attributes:
        handle: of the process.
        relay: of its lines.
        is_far: nobody can reach its host: it is not ended, and how it is cannot be known.
    """

    handle: RankHandle
    relay: Relay | None
    is_far: bool = False

    @property
    def pid(self) -> int:
        return self.handle.pid

    @property
    def detail(self) -> str:
        return self.handle.detail

    @property
    def exit_code(self) -> int | None:
        return None if self.is_far else self.handle.exit_code

    def stop(self, *, kill: bool = False) -> None:
        if not self.is_far:
            self.handle.stop(kill=kill)

    def wait(self, timeout_s: float) -> int | None:
        return self.handle.wait(timeout_s)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class FaultyLauncher(LocalLauncher):
    """Puts a relay between each rank and the controller."""

    def __init__(self, model: Path) -> None:
        super().__init__("cpu", model)
        self.ranks: dict[str, FaultyRank] = {}

    def start(self, seat: RankSeat) -> RankHandle:
        relay = Relay(seat.port)
        rank = FaultyRank(super().start(replace(seat, port=relay.port)), relay)
        self.ranks[seat.incarnation] = rank
        return rank


@dataclass
class Storm:
    """What is served, and what was seen so far. Use `open_storm`.

    Attributes:
        controller: of the service.
        launcher: its ranks.
        stream: requests all the while.
        counts: of what was done.
        descriptors: of each process when it was first counted, and how many ranks served then.
        shared_memory: that ranks were seen to have by name.
        foreign: names of it that were there before.
        hit: incarnations that something was done to by the schedule under way.
    """

    controller: Controller
    launcher: FaultyLauncher
    stream: AnswerStream
    counts: Counter[str] = field(default_factory=Counter)
    descriptors: dict[int, tuple[int, int]] = field(default_factory=dict)
    shared_memory: set[str] = field(default_factory=set)
    foreign: frozenset[str] = field(default_factory=lambda: _name_shared_memory())
    hit: set[str] = field(default_factory=set)

    def run(self, schedule: Schedule) -> None:
        """Let a schedule pass, and see that all is well behind it.

        Raises: AssertionError if it is not.
        """
        if self.count_serving() != schedule.num_ranks:
            self.controller.scale(to=schedule.num_ranks, timeout_s=PATIENCE_S)
        serving = self._roster()
        spared = serving[schedule.spared % len(serving)].seat.incarnation
        self.hit.clear()
        hung: list[RankRecord] = []
        timers: list[threading.Timer] = []
        for act in schedule.acts:
            time.sleep(act.after_s)
            self._await_moment(act)
            self._note_shared_memory()
            self._do(act, spared, hung, timers)
            self.counts[act.deed] += 1
        for timer in timers:
            timer.join(PATIENCE_S)
        for record in hung:
            self._wait(lambda one=record: one.state == "dead", f"{record.name} to be given up")
            rank = self.launcher.ranks[record.seat.incarnation]
            rank.signal(signal.SIGCONT)
            # It finds that it was given up, and leaves by itself.
            self._wait(lambda one=rank: one.handle.exit_code is not None, f"{record.name} to leave")
            rank.is_far = False
        self._wait(self._is_at_rest, "all ranks to serve again")
        self._check()

    def _do(
        self, act: Act, spared: str, hung: list[RankRecord], timers: list[threading.Timer]
    ) -> None:
        if act.deed == "scale":
            with contextlib.suppress(EquipoiseError):
                self.controller.scale(to=act.rank, wait=False)
            return
        if act.deed == "rebalance":
            with contextlib.suppress(EquipoiseError):
                self.controller.rebalance()
            return
        record = self._choose(act.rank, spared)
        if record is None:
            return
        rank = self.launcher.ranks[record.seat.incarnation]

        def later(then: Callable[[], object]) -> None:
            timers.append(threading.Timer(act.seconds, then))
            timers[-1].start()

        if act.deed == "kill":
            rank.signal(signal.SIGKILL)
        elif act.deed == "hang" and record.state == "serving":
            rank.is_far = True
            rank.signal(signal.SIGSTOP)
            hung.append(record)
        elif act.deed == "slow":
            rank.signal(signal.SIGSTOP)
            later(lambda: None if record in hung else rank.signal(signal.SIGCONT))
        elif act.deed == "cut":
            rank.relay.channel.cut()
        elif act.deed == "store":
            rank.relay.cut_store()
        elif act.deed == "mute":
            rank.relay.block_store(act.seconds)
        elif act.deed == "block":
            rank.is_far = True
            for line in rank.relay.lines:
                line.block(act.seconds)

            def reach() -> None:
                rank.is_far = False

            later(reach)
        elif act.deed == "delay":
            for line in rank.relay.lines:
                line.delay(0.2, act.seconds)

    def _choose(self, place: int, spared: str) -> RankRecord | None:
        ranks = self.launcher.ranks
        # Where the spared one leaves, another is: somebody must be left to go on.
        well = [one for one in self._roster() if one.seat.incarnation not in self.hit]
        left = [one.seat.incarnation for one in well]
        kept = spared if spared in left else (left or [""])[0]
        known = [
            record
            for record in list(self.controller._roster)
            if record.state != "dead"
            and record.seat.incarnation != kept
            and not ranks[record.seat.incarnation].is_far
        ]
        if not known or not left:
            return None
        chosen = known[(place - 1) % len(known)]
        self.hit.add(chosen.seat.incarnation)
        return chosen

    def _roster(self) -> list[RankRecord]:
        return self.controller._call(self.controller._roster.serving)

    def count_serving(self) -> int:
        """Ranks of the generation that serves."""
        return len(self._roster())

    def _await_moment(self, act: Act) -> None:
        changes = self.controller._changes
        started = calm_since = time.monotonic()
        while act.moment != "now" and time.monotonic() < started + MOMENT_S:
            # Looked at without the controller's thread, which has enough to do just then.
            phase = changes.phase
            if phase == act.moment:
                return
            if phase in ("preparing", "committing", "retiring") or changes.num_waiting:
                calm_since = time.monotonic()
            elif time.monotonic() > calm_since + CALM_S:
                return
            time.sleep(LOOK_S)

    def _is_at_rest(self) -> bool:
        changes = self.controller._changes

        def look() -> bool:
            serving = self.controller._roster.serving()
            return (
                changes.is_idle
                and not changes.num_waiting
                and len(serving) == changes._wanted
                and not any(one.is_lost or one.channel is None for one in serving)
            )

        assert not self.stream.faults, self.stream.faults[:3]
        return self.controller._call(look)

    def _check(self) -> None:
        """Tokens, placements, and what is left behind."""
        answered = self.stream.settle(PATIENCE_S)
        assert answered, self.stream.faults[:3] or "requests are not answered any more"
        self._check_placements()
        self._wait(self._are_gone, "processes that serve no more to end")
        for incarnation, rank in list(self.launcher.ranks.items()):
            if rank.handle.exit_code is not None:
                rank.relay.close()
                del self.launcher.ranks[incarnation]
        self._wait(lambda: not self._find_leaks(), lambda: f"leaks to end: {self._find_leaks()}")
        self._note_shared_memory()

    def _check_placements(self) -> None:
        while True:
            size = self.count_serving()
            try:
                self.controller.scale(to=size, dry_run=True, timeout_s=PATIENCE_S)
                break
            except EquipoiseError as error:
                if "do not agree" in str(error):
                    raise
                self._wait(self._is_at_rest, "all ranks to serve again")
        told = [record.told["holding"] for record in self._roster()]
        assert len({str(one["fingerprints"]) for one in told}) == 1, told

    def _are_gone(self) -> bool:
        living = {one.seat.incarnation for one in self.controller._roster.living()}
        return all(
            rank.handle.exit_code is not None
            for incarnation, rank in self.launcher.ranks.items()
            if incarnation not in living
        )

    def _find_leaks(self) -> list[str]:
        """Descriptors of ranks and the controller, memory that several processes share."""
        size = self.count_serving()
        leaks = []
        lines = [line for rank in self.launcher.ranks.values() for line in rank.relay.lines]
        ours = _count_descriptors(os.getpid()) - sum(1 + len(line._open) for line in lines)
        held = {os.getpid(): ours}
        for record in self._roster():
            held[record.handle.pid] = _count_descriptors(record.handle.pid)
        for pid, count in held.items():
            kind = "controller" if pid == os.getpid() else "rank"
            first, then = self.descriptors.setdefault(pid, (count, size))
            allowed = first + PER_RANK[kind] * max(0, size - then) + SLACK
            if count > allowed:
                leaks.append(
                    f"{kind} {pid}: {count} descriptors of {size} ranks, {first} of {then}"
                )
        self.descriptors = {pid: self.descriptors[pid] for pid in held}
        left = {path for path in self.shared_memory if Path(path).exists()}
        if left:
            left -= {path for pid in held for path in _list_shared_memory(pid)}
        return leaks + [f"{path} is left" for path in left]

    def _note_shared_memory(self) -> None:
        # To read what processes have mapped takes long, and what has no name cannot be left.
        if _name_shared_memory() <= self.foreign:
            return
        for rank in list(self.launcher.ranks.values()):
            self.shared_memory |= _list_shared_memory(rank.pid)

    def _wait(self, is_so: Callable[[], bool], what: str | Callable[[], str]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not is_so():
            if time.monotonic() > until:
                text = what if isinstance(what, str) else what()
                raise AssertionError(f"waited in vain for {text}: {self.controller.status()}")
            time.sleep(0.01)


@contextlib.contextmanager
def open_storm(directory: Path, communicator: str, **options: Any) -> Iterator[Storm]:
    """A service over which schedules may pass; nothing of it is left at the end.

    Args:
        directory: gets the model.
        communicator: that carries experts.
        options: of the service that differ.
    """
    spec, answers = make_service(directory, communicator, **options)
    launcher = FaultyLauncher(directory)
    controller = Controller(spec, launcher)
    controller.start(PATIENCE_S)
    try:
        stream = AnswerStream(controller, answers, NUM_IN_FLIGHT, PAUSE_S)
        storm = Storm(controller, launcher, stream)
        yield storm
        assert storm.stream.end(PATIENCE_S), "requests are not answered any more"
        assert not storm.stream.faults, storm.stream.faults[:3]
    finally:
        for rank in launcher.ranks.values():
            rank.is_far = False
            rank.signal(signal.SIGCONT)
        controller.close()
        for rank in launcher.ranks.values():
            rank.relay.close()
    left = [rank.pid for rank in launcher.ranks.values() if rank.handle.exit_code is None]
    assert not left, f"processes {left} outlive their service"


def _count_descriptors(pid: int) -> int:
    try:
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    except OSError:
        return 0


def _name_shared_memory() -> frozenset[str]:
    return frozenset(path.name for path in SHARED_MEMORY.iterdir())


def _list_shared_memory(pid: int) -> set[str]:
    """Files under /dev/shm that a process has mapped or opened."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            path = line.partition("/dev/shm/")[2]
            if path and not path.endswith("(deleted)"):
                found.add(f"/dev/shm/{path}")
    return found
