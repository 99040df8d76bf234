"""Ranks as the controller sees them. Owner: the controller's thread."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from equipoise.elastic.channel import Channel, ChannelClosed, Message
from equipoise.elastic.launcher import UNKNOWN_EXIT, RankHandle, RankSeat
from equipoise.elastic.said import Heard, Said
from equipoise.elastic.service import RankState, RankStatus

HELD_UP_S = 1.0
"""Between two looks of a controller that stood still meanwhile: it was stopped, say, or swapped."""


@dataclass
class RankRecord:
    """One rank, from its start until it is forgotten.

    Attributes:
        seat: what it was started with.
        handle: its process.
        state: what it does.
        has_called: whether it has ever been heard of.
        is_warm: whether it has loaded what serving needs.
        number: in the serving generation; None while it is in none.
        generation: that it has said it serves in.
        channel: to it; None before it has called, and after it has gone.
        facts: what its last sign of life said.
        heard_at: when something came from it last, monotonic.
        leaves_by: when it is ended, if it has left and its process has not ended; monotonic.
        longest_silence_s: between two things that came from it.
        pause_s: between its last step before and its first behind the last switch.
        pull_bytes_per_s: at which weights came to it before the last switch.
        parts_s: seconds of each part of its last change of generation.
        steps_seen: forward passes that it has told of.
        is_lost: whether its step has failed, so that it waits for a recovery.
        told: facts that it was asked for, by what it said.
        detail: why it is dead.
        pid: of its process, as it says.
        said: to it.
        heard: of it.
    """

    seat: RankSeat
    handle: RankHandle
    host: str
    state: RankState = "starting"
    has_called: bool = False
    is_warm: bool = False
    number: int | None = None
    generation: int = -1
    channel: Channel | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    heard_at: float = field(default_factory=time.monotonic)
    leaves_by: float = float("inf")
    longest_silence_s: float = 0.0
    pause_s: float = 0.0
    pull_bytes_per_s: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)
    is_lost: bool = False
    steps_seen: int = 0
    told: dict[str, Message] = field(default_factory=dict)
    detail: str = ""
    pid: int | None = None
    said: Said = field(default_factory=Said)
    heard: Heard = field(default_factory=Heard)

    @property
    def name(self) -> str:
        """That it keeps."""
        return self.seat.name

    @property
    def node(self) -> str:
        """Where it sits, as it says."""
        return self.seat.node

    def take_call(self, channel: Channel, hello: Message) -> None:
        """It calls, for the first time or again: what either has not heard is said again."""
        if self.channel is not None:
            self.channel.close()
        self._settle(hello)
        if not self.has_called:
            # To a controller before this one, perhaps.
            self.said = Said(int(hello.get("heard", 0)))
            self.heard = Heard(int(hello.get("said", 0)))
            # What its start took was no silence.
            self.heard_at = time.monotonic()
        channel.peer = self.name
        self.channel, self.has_called = channel, True
        self.hear()
        self.said.confirm(int(hello.get("heard", 0)))
        self.tell_heard()
        for message in self.said.unheard:
            self._send(message)

    def _settle(self, hello: Message) -> None:
        """It says where it sits and on what."""
        self.host = str(hello.get("host", self.host))
        node, device = str(hello.get("node", "")), str(hello.get("device", self.seat.device))
        self.seat = replace(self.seat, node=node, device=device)
        self.pid = int(hello["pid"]) if "pid" in hello else self.pid

    def hear(self) -> None:
        """Something came from it."""
        now = time.monotonic()
        self.longest_silence_s = max(self.longest_silence_s, now - self.heard_at)
        self.heard_at = now

    def serve(self, message: Message) -> None:
        """It says in which generation it serves, and what that took."""
        self.state, self.number = "serving", int(message["number"])
        self.generation, self.is_lost = int(message["generation"]), False
        self.pull_bytes_per_s = float(message.get("pull_bytes_per_s", 0.0))
        self.parts_s = dict(message.get("parts_s", {}))

    def tell(self, message: Message) -> None:
        """Send it something, now or when it has called again; one that has gone shows elsewhere."""
        if self.has_called:
            self._send(self.said.add(message))

    def tell_over(self, reason: str) -> None:
        """Its generation is no more; one that has noticed is not told."""
        if not self.is_lost:
            self.tell({"do": "over", "generation": self.generation, "reason": reason})

    def tell_heard(self) -> None:
        """How much of what it said has come."""
        self._send({"do": "heard", "heard": self.heard.count})

    def _send(self, message: Message) -> None:
        if self.channel is not None:
            with contextlib.suppress(ChannelClosed):
                self.channel.send(message)

    @property
    def step_s(self) -> float:
        """Median seconds of its last steps, as it says; 0.0 before it has said so."""
        return float(self.facts.get("step_s", 0.0))

    def describe(self, held: int, max_batch_size: int, silence_s: float) -> RankStatus:
        """As its users see it."""
        return RankStatus(
            name=self.name,
            number=self.number,
            pid=self.handle.pid or self.pid,
            host=self.host,
            device=self.seat.device,
            state=self.state,
            steps=int(self.facts.get("steps", 0)),
            running=held,
            room=max(0, max_batch_size - held) if self.state == "serving" else 0,
            near_deadline=round(self.longest_silence_s / silence_s, 3),
            step_s=self.step_s,
            pause_s=self.pause_s,
            detail=self.detail,
            node=self.node,
            parts_s=self.parts_s,
        )


class Roster:
    """All ranks by name; one that has died stays until it is forgotten or its name comes back."""

    def __init__(self) -> None:
        self._records: dict[str, RankRecord] = {}
        self._looked_at = time.monotonic()

    def __iter__(self) -> Iterator[RankRecord]:
        return iter([self._records[name] for name in sort_names(self._records)])

    def add(self, record: RankRecord) -> None:
        """A rank that was started, in place of a dead one of its name."""
        self._records[record.name] = record

    def find(self, name: str, incarnation: str | None = None) -> RankRecord | None:
        """The rank of that name, if it is that incarnation."""
        record = self._records.get(name)
        if record is None or incarnation not in (None, record.seat.incarnation):
            return None
        return record

    def find_all(self, names: Iterable[str]) -> list[RankRecord]:
        """Those of these names that live."""
        return [record for record in self.living() if record.name in set(names)]

    def forget(self, record: RankRecord) -> None:
        """One that has left as it should."""
        if self._records.get(record.name) is record:
            del self._records[record.name]

    def note_look(self, now: float) -> None:
        """The controller looks after ranks; while it was held up itself, it heard nobody."""
        held_up_s, self._looked_at = now - self._looked_at, now
        if held_up_s > HELD_UP_S:
            for record in self.living():
                record.heard_at = min(now, record.heard_at + held_up_s)

    def living(self) -> list[RankRecord]:
        """All but the dead."""
        return [record for record in self if record.state != "dead"]

    def serving(self) -> list[RankRecord]:
        """Members of the serving generation that live, by their numbers."""
        members = [record for record in self.living() if record.number is not None]
        return sorted(members, key=lambda record: record.number or 0)

    def find_nodes(self) -> dict[str, str]:
        """Where the living sit, by name."""
        return {record.name: record.node for record in self.living()}

    def tell(self, names: Iterable[str], message: Message) -> None:
        """Send the same to several."""
        for name in names:
            record = self.find(name)
            if record is not None:
                record.tell(message)

    def end_newcomer(self, name: str, why: str) -> None:
        """Do without a rank that was to serve, and does not yet."""
        record = self.find(name)
        if record is not None and record.state != "dead" and record.number is None:
            record.state, record.detail = "leaving", why
            # It may hang, and has nothing that anybody needs.
            record.handle.stop(kill=True)

    def names_serving(self) -> list[str]:
        """Names of the living members of the serving generation, by their numbers."""
        return [record.name for record in self.serving()]

    def names_lost(self, names: Iterable[str]) -> list[str]:
        """Those of these names that live, and whose last step has failed."""
        return [record.name for record in self.find_all(names) if record.is_lost]

    def pick_names(self, count: int) -> list[str]:
        """Names for newcomers: the lowest numbers that no living rank has."""
        taken = {record.name for record in self.living()}
        names: list[str] = []
        number = 0
        while len(names) < count:
            name = f"rank-{number}"
            if name not in taken:
                names.append(name)
            number += 1
        return names


def describe_exit(name: str, code: int | None) -> str:
    """How a process ended, for people."""
    if code is None:
        return f"{name} hung up"
    if code == UNKNOWN_EXIT:
        return f"{name} has ended"
    if code >= 0:
        return f"{name} ended with exit code {code}"
    try:
        return f"{name} was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"{name} was killed by signal {-code}"


def sort_names(names: Iterable[str]) -> list[str]:
    """In the order of their numbers: "rank-10" behind "rank-9"."""
    return sorted(names, key=_order)


def _order(name: str) -> tuple[int, str]:
    digits = name.rpartition("-")[2]
    return (int(digits) if digits.isdecimal() else 0, name)
