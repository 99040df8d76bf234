"""Ranks of a controller that has gone, as they call the one that takes its place.

Serving went on without one: ranks need none to step. They keep what they were given and what they
have said, and wait for a controller that knows their service's secret, where they knew the last.
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import threading
import time
from pathlib import Path

from equipoise.elastic.changes import Changes
from equipoise.elastic.channel import Channel, Message
from equipoise.elastic.launcher import Launcher, RankSeat
from equipoise.elastic.orders import Change
from equipoise.elastic.requests import RequestTable
from equipoise.elastic.roster import RankRecord, Roster
from equipoise.elastic.spec import ServiceSpec
from equipoise.elastic.state_file import ControllerState, StateFile
from equipoise.errors import ConfigError, MembershipError

logger = logging.getLogger(__name__)


class Adoption:
    """Takes ranks over. Owner: the controller's thread; the rest before that begins, or behind it.

    Args:
        spec: of the service.
        state: file of the controller before, if there was one, and of this one; None for none.
        roster: gets the ranks.
        requests: gets theirs.
        launcher: gets their processes.

    Attributes:
        service: sets it apart from others; the same of all its controllers.
        token: that its ranks say.
        port: that they call; 0 for any.
        is_over: whether no more are taken over.
    Raises: ConfigError if the file is another controller's, or of another service.
    """

    def __init__(
        self,
        spec: ServiceSpec,
        state: Path | None,
        roster: Roster,
        requests: RequestTable,
        launcher: Launcher,
    ) -> None:
        self._spec, self._roster, self._requests = spec, roster, requests
        self._launcher = launcher
        self._file = None if state is None else StateFile(state)
        self._names: tuple[str, ...] = ()
        self._generation, self._deadline = -1, float("inf")
        self._found = threading.Event()
        found = None if self._file is None else self._file.found
        if found is not None:
            try:
                _compare(spec, found, state)
            except BaseException:
                self.close(keep=True)
                raise
        self.is_over = found is None
        self.service = secrets.token_hex(8) if found is None else found.service
        self.token = secrets.token_hex(16) if found is None else found.token
        self.port = 0 if found is None else found.port

    def begin(self, changes: Changes) -> None:
        """Before the controller's thread runs: no change begins until ranks were waited for."""
        self._deadline = time.monotonic() + self._spec.silence_s
        changes.hold(Change("adopt"))

    def tick(self, now: float, changes: Changes) -> None:
        """Go on once all ranks of their generation have told of themselves, or long enough."""
        serving = set(self._roster.names_serving())
        is_whole = bool(self._names) and not set(self._names) - serving
        if self.is_over or (not is_whole and now < self._deadline):
            return
        self.is_over = True
        changes.take_over(self._names, self._generation)
        self._found.set()

    def wait(self, timeout_s: float) -> bool:
        """Any thread: whether there were ranks to take over, once that is known.

        Raises: MembershipError if it is not in time.
        """
        if not self._found.wait(timeout_s):
            raise MembershipError("the ranks of the controller before could not be taken over")
        return self._generation >= 0

    def write(self, port: int) -> None:
        """Leave word for the controller that comes next. Raises: OSError."""
        if self._file is not None:
            self._file.write(
                ControllerState(
                    self.service, self._spec.interface, port, self.token, self._spec.to_json()
                )
            )

    def welcome(self, channel: Channel, hello: Message, store: list[object]) -> RankRecord | None:
        """Take the call of a rank that this controller did not start; None where it is no rank's.

        Args:
            channel: to it.
            hello: its first frame.
            store: where this controller's is.
        """
        if self.is_over or hello.get("met") != self.service:
            return None
        seat = RankSeat(
            str(hello["name"]),
            str(hello["incarnation"]),
            self._spec.interface,
            self.port,
            self.token,
            str(hello["device"]),
            node=str(hello["node"]),
        )
        if seat.name in {one.name for one in self._roster.living()}:
            return None
        try:
            handle = self._launcher.adopt(seat, int(hello["pid"]))
        except MembershipError as error:
            logger.warning("%s is not taken over: %s", seat.name, error)
            return None
        record = RankRecord(seat, handle, str(hello.get("host", socket.gethostname())))
        record.take_call(channel, hello)
        record.is_warm = True
        # Until it says what it does: one that has left already says no more.
        record.state = "leaving"
        self._roster.add(record)
        record.tell({"do": "adopt", "store": store})
        return record

    def hear(self, record: RankRecord, message: Message, changes: Changes) -> None:
        """A rank tells everything."""
        record.steps_seen = int(message["steps"])
        stale = [
            told["id"]
            for told in message["requests"]
            if not self._requests.adopt(record.name, told)
        ]
        if stale:
            record.tell({"do": "cancel", "ids": stale})
        if "generation" not in message:
            # A newcomer that prepares switches, or ends as the change was called off.
            record.state = "joining"
            if not message["is_joining"]:
                record.state = "leaving"
                record.tell({"do": "stop"})
        elif self.is_over:
            # The others were told that it is dead.
            record.detail = f"{record.name} came too late to be taken over"
            record.handle.stop(kill=True)
        else:
            changes.note_serving(record, message)
            record.is_lost = bool(message["is_lost"])
            record.told["holding"] = message
            if record.generation > self._generation:
                self._generation, self._names = record.generation, tuple(message["names"])

    def close(self, *, keep: bool) -> None:
        """Let the file go; twice is fine.

        Args:
            keep: whether it is left for another controller.
        """
        if self._file is not None:
            self._file.close(keep=keep)


def _compare(spec: ServiceSpec, found: ControllerState, path: Path | None) -> None:
    """Refuse to serve something else than ranks that may be there."""
    # As JSON has it, which knows no tuples.
    wanted, theirs = json.loads(json.dumps(spec.to_json())), found.spec
    differing = sorted(key for key in wanted if wanted[key] != theirs.get(key))
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{path}: is of a service with {key} {theirs.get(key)}, not {wanted[key]}: ask for the "
            "same, or name another file"
        )
