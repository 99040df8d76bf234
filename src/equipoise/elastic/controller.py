"""The process that outlives ranks: starts them, gives them requests, and changes who serves.

One thread owns all that is known of ranks. Whatever happens (a rank says something or has gone,
somebody asks for something) is put into its queue as a call, and done in turn.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from equipoise.elastic.admission import check_request, find_facts
from equipoise.elastic.adoption import Adoption
from equipoise.elastic.change_store import call_off
from equipoise.elastic.changes import Changes
from equipoise.elastic.channel import Channel, ChannelClosed, Listener, Message
from equipoise.elastic.launcher import UNKNOWN_EXIT, Launcher, RankSeat
from equipoise.elastic.orders import Change, Hands
from equipoise.elastic.overview import Tally, describe_service
from equipoise.elastic.requests import Delivery, RequestTable, read_delta
from equipoise.elastic.roster import RankRecord, Roster, describe_exit
from equipoise.elastic.scoring import Scores
from equipoise.elastic.service import (
    Busy,
    Deliver,
    ScaleReport,
    ServiceClosed,
    ServiceRequest,
    ServiceStatus,
)
from equipoise.elastic.spec import ServiceSpec
from equipoise.elastic.store import open_store
from equipoise.errors import ConfigError, MembershipError

logger = logging.getLogger(__name__)

T = TypeVar("T")

TICK_S = 0.05
"""Between two looks at what nobody says: processes that have ended, silences, deadlines."""
CALL_S = 10.0
"""Longest that a caller waits for the controller's thread, which never waits itself."""
LEAVE_S = 10.0
"""How long ranks have to leave when the service ends, or behind the change that they leave in."""


class Controller:
    """A `Service` over ranks that come, go and die.

    Args:
        spec: what to serve.
        launcher: starts ranks.
        state: file by which a controller that is started in place of this one finds its ranks; one
            that is there already tells of the ranks that this one takes over. None for none.
    Collective: none; its ranks meet among themselves.
    Raises: ConfigError, ModelError or PlacementError if it cannot be served, or a living
        controller, or one of another service, has the state; OSError if the interface cannot be
        listened on, or the state not be written.
    """

    def __init__(self, spec: ServiceSpec, launcher: Launcher, state: Path | None = None) -> None:
        self.facts = find_facts(spec)
        if "on_failure" not in spec.config.model_fields_set:
            # Serving does not end with balancing; the next generation balances again.
            disabled = spec.config.model_copy(update={"on_failure": "disable"})
            spec = replace(spec, config=disabled)
        self._spec, self._launcher = spec, launcher
        self._requests, self._roster = RequestTable(spec.queue_limit), Roster()
        self._scores = Scores(self._roster)
        self._adoption = Adoption(spec, state, self._roster, self._requests, launcher)
        self._token = self._adoption.token
        self._changes = Changes(
            spec,
            self._roster,
            Hands(
                self._launch,
                self._dismiss,
                lambda generation, reason: call_off(self._store, generation, reason),
                self._give_up,
                self._end_rank,
                lambda: self._tally.steps,
            ),
        )
        self._events: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._closing: str | None = None
        self._has_failed = False
        self._stop_by: float | None = None
        self._is_over, self._can_launch, self._tally = threading.Event(), threading.Event(), Tally()
        self._store = open_store(spec.interface, spec.timeout_s)
        try:
            self._listener = Listener(
                (spec.interface, self._adoption.port),
                self._token,
                self._greet,
                name="equipoise-controller",
            )
        except BaseException:
            self._adoption.close(keep=True)
            raise
        self._thread = threading.Thread(target=self._run, name="equipoise-controller", daemon=True)

    def start(self, timeout_s: float | None = None) -> None:
        """Take over ranks of a controller that has gone, or start some; return when they serve.

        Args:
            timeout_s: longest wait; None for what the spec gives them.
        Raises: MembershipError, naming the rank, if they do not come to serve; all have ended then.
        """
        is_first = self._adoption.is_over
        if not is_first:
            self._adoption.begin(self._changes)
        self._thread.start()
        try:
            if not is_first and self._adoption.wait(self._spec.silence_s + CALL_S):
                # Ranks serve already; what another would be forked from is loaded meanwhile.
                threading.Thread(target=self._open, name="equipoise-open", daemon=True).start()
                return
            self._adoption.write(self._listener.port)
            self._open()
            change = self._call(self._changes.begin)
            change.answer.result(2 * self._spec.start_s if timeout_s is None else timeout_s)
        except BaseException as error:
            self.close()
            if isinstance(error, FutureTimeout):
                raise MembershipError("the ranks did not come to serve in time") from error
            raise

    def unfinished(self) -> tuple[str, ...]:
        """Ids of requests taken over from a controller that has gone, and not asked for yet."""
        return self._requests.list_unclaimed()

    def take_up(self, request_id: str, position: int, deliver: Deliver) -> None:
        """Have the tokens of a request that was taken over delivered from here on.

        Args:
            request_id: one of `unfinished`.
            position: index of the first of its tokens that has not been delivered before.
            deliver: as for `submit`.
        Raises: ConfigError if it is none of these, or has fewer tokens; ServiceClosed.
        """
        self._check_open()
        self._call(lambda: self._deliver(self._requests.take_up(request_id, position, deliver)))

    def submit(self, request: ServiceRequest, deliver: Deliver) -> None:
        """Take a request. As `Service.submit`."""
        self._check_open()
        check_request(request, self.facts)
        self._requests.add(request, deliver)
        self._post(_look)

    def cancel(self, request_id: str) -> None:
        """End a request. As `Service.cancel`."""
        self._post(lambda: self._cancel(request_id))

    def status(self) -> ServiceStatus:
        """How it is. As `Service.status`."""
        return self._describe() if self._is_over.is_set() else self._call(self._describe)

    def placement(self) -> dict[str, Any]:
        """Which expert each slot holds. As `Service.placement`."""
        self._check_open()
        placements = self._call(lambda: list(self._changes.placements))
        if not placements:
            raise ServiceClosed("no rank serves yet")
        first: dict[str, Any] = placements[0]
        return first if len(placements) == 1 else {"sets": placements}

    def scale(
        self,
        to: int | None = None,
        remove: Sequence[str] = (),
        *,
        dry_run: bool = False,
        busy: Busy = "queue",
        wait: bool = True,
        timeout_s: float = 600.0,
    ) -> ScaleReport:
        """Change the set of ranks. As `Service.scale`."""
        self._check_open()
        if (to is None) == (not remove):
            raise ConfigError("say either how many ranks there shall be, or which shall leave")
        if to is not None and to < 1:
            raise ConfigError(f"at least 1 rank must serve, got {to}")
        if not self._can_launch.wait(self._spec.start_s):
            raise MembershipError(f"no rank could be started within {self._spec.start_s:g} s")
        change = Change("scale", to=to, remove=tuple(remove), dry_run=dry_run)
        self._call(lambda: self._changes.ask(change, busy))
        if not wait and not dry_run:
            return self._call(lambda: self._changes.preview(change))
        try:
            return change.answer.result(timeout_s)
        except FutureTimeout:
            raise TimeoutError(f"not done within {timeout_s:g} s; it goes on") from None

    def rebalance(self) -> None:
        """Have a rebalance begin. As `Service.rebalance`."""
        self._check_open()
        self._call(self._rebalance)

    def score(self, texts: Sequence[Sequence[int]], timeout_s: float) -> list[float]:
        """How likely texts are to the model, over the ranks that serve now.

        Args:
            texts: tokens of each, at least two.
            timeout_s: longest wait; a change of the membership meanwhile may take the texts along.
        Returns: of each text its negative log-likelihood per token, in nats.
        Raises: TimeoutError; ServiceClosed.
        """
        self._check_open()
        return self._call(lambda: self._scores.ask(texts)).result(timeout_s)

    def drain(self, deadline_s: float) -> bool:
        """Take no more requests, and wait for those taken. As `Service.drain`."""
        self._closing = self._closing or "it drains"
        return self._requests.wait_empty(deadline_s)

    def close(self) -> None:
        """End all ranks. As `Service.close`."""
        self._closing = self._closing or "it was closed"
        if self._thread.is_alive():
            self._post(self._stop_ranks)
            self._is_over.wait(LEAVE_S + self._spec.beat_s)
        self._end()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(CALL_S)

    def _greet(self, channel: Channel, hello: Message) -> None:
        """In a thread of the connection: pass on what a rank says."""
        record = self._call(lambda: self._welcome(channel, hello))
        if record is None:
            channel.send({"do": "given up"})
            logger.warning("a rank that is not of this service was hung up on: %s", hello)
            return
        try:
            while True:
                self._post(partial(self._hear, record, channel.receive()))
        except ChannelClosed:
            self._post(lambda: self._miss(record, channel))

    def _post(self, event: Callable[[], object]) -> None:
        self._events.put(event)

    def _call(self, function: Callable[[], T]) -> T:
        """Have the controller's thread do something, and wait for what comes of it."""
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:
                answer.set_exception(error)

        self._post(run)
        try:
            return answer.result(CALL_S)
        except FutureTimeout:
            raise ServiceClosed("the controller does not answer: it has ended") from None

    def _check_open(self) -> None:
        if self._closing is not None:
            raise ServiceClosed(f"no more is taken: {self._closing}")

    def _open(self) -> None:
        self._launcher.open(self._spec.start_s)
        self._can_launch.set()

    def _end(self) -> None:
        """Let everything go; twice is fine."""
        self._is_over.set()
        self._deliver(self._requests.fail(self._closing or "it was closed"))
        self._listener.close()
        self._launcher.close()
        self._adoption.close(keep=False)

    # What follows runs on the controller's thread.

    def _run(self) -> None:
        next_tick = time.monotonic()
        while not self._is_over.is_set():
            try:
                with contextlib.suppress(queue.Empty):
                    self._events.get(timeout=max(0.0, next_tick - time.monotonic()))()
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + TICK_S
                    self._tick()
                if self._can_launch.is_set():
                    self._changes.start_next()
                self._assign()
            except Exception as error:
                # What it knows may be wrong from here on: nothing is served on that.
                logger.exception("the controller has failed")
                if self._stop_by is not None:
                    return
                self._give_up(f"the controller has failed: {error!r}")

    def _welcome(self, channel: Channel, hello: Message) -> RankRecord | None:
        """Take a rank's call; None from one that is not, or no longer, known."""
        record = self._roster.find(str(hello.get("name")), str(hello.get("incarnation")))
        store = [self._spec.interface, self._store.port]
        if record is None:
            return self._adoption.welcome(channel, hello, store)
        if record.state == "dead":
            return None
        is_back = record.has_called
        record.take_call(channel, hello)
        if is_back:
            record.tell({"do": "back", "paused": not self._changes.is_idle})
        else:
            welcome = {"do": "welcome", "spec": self._spec.to_json(), "store": store}
            record.tell({**welcome, "service": self._adoption.service})
        return record

    def _miss(self, record: RankRecord, channel: Channel) -> None:
        """A rank has hung up: its process ends, or it calls again."""
        if record.channel is channel:
            record.channel = None
        if record.state != "dead":
            self._look_after(record, time.monotonic())

    def _tick(self) -> None:
        now = time.monotonic()
        self._roster.note_look(now)
        for record in self._roster.living():
            self._look_after(record, now)
        self._adoption.tick(now, self._changes)
        self._changes.tick(now)
        if self._stop_by is None:
            return
        if not self._roster.living():
            self._is_over.set()
        elif now >= self._stop_by:
            for record in self._roster.living():
                record.handle.stop(kill=True)

    def _look_after(self, record: RankRecord, now: float) -> None:
        code, name, silence_s = record.handle.exit_code, record.name, self._spec.silence_s
        if code is not None:
            how = record.detail or record.handle.detail or describe_exit(name, code)
            self._bury(record, how, code)
        elif record.state == "serving" and now - record.heard_at > silence_s:
            # A process that was stopped wakes to nothing: neither its peers nor its channel remain.
            silence = f"gave no sign of life for {silence_s:g} s"
            self._end_rank(record, f"{name} {silence}, and was given up")
        elif record.state == "leaving" and now > record.leaves_by:
            self._end_rank(record, f"{name} had left, did not end, and was given up")

    def _bury(self, record: RankRecord, how: str, code: int | None) -> None:
        """A rank's process has ended, or is given up."""
        # Its end may be seen before its last word is heard.
        has_left = code == 0 and record.name in self._changes.leaving
        left_well = has_left or (record.state == "leaving" and record.number is None)
        record.state, record.detail = "dead", how
        if record.channel is not None:
            record.channel.close()
            record.channel = None
        if self._stop_by is not None:
            return
        if not left_well:
            self._tally.deaths += 1
            logger.warning("%s", how)
        self._requests.release(record.name)
        self._changes.lose(record, is_expected=left_well)
        if left_well and code in (0, UNKNOWN_EXIT):
            self._roster.forget(record)

    def _assign(self) -> None:
        most = self._spec.max_batch_size
        leaving = self._changes.leaving
        ready = {
            one.name: most
            for one in self._roster.serving()
            if one.state == "serving" and not one.is_lost and one.name not in leaving
        }
        was_idle = not self._requests.num_held
        given = self._requests.assign(ready)
        if not given:
            return
        for name in ready:
            mine = [one.to_json() for one in given if one.rank == name]
            record = self._roster.find(name)
            if record is not None and mine:
                record.tell({"do": "submit", "requests": mine})
            elif record is not None and was_idle:
                record.tell({"do": "wake"})

    def _hear(self, record: RankRecord, message: Message) -> None:
        """A rank has said something."""
        if record.state == "dead" or not record.heard.is_new(message):
            return
        record.hear()
        said = message["say"]
        if said == "beat":
            self._tally.note_beat(record, message)
            record.said.confirm(message["heard"])
            record.tell_heard()
        elif said == "deltas":
            for attempt, delta in map(read_delta, message["deltas"]):
                self._deliver(self._requests.take(record.name, attempt, delta))
        elif said == "adopted":
            self._adoption.hear(record, message, self._changes)
        elif said == "rebalanced":
            self._tally.note_rebalance(message)
            self._changes.placements = message["placements"]
        elif said == "scores":
            self._scores.hear(message)
        elif said == "failed":
            logger.debug("%s", message["traceback"])
            record.detail = f"{record.name}: {message['reason']}"
        else:
            self._changes.hear(record, message)

    def _deliver(self, deliveries: list[Delivery]) -> None:
        for deliver, event in deliveries:
            try:
                deliver(event)
            except Exception:
                logger.exception("what takes the tokens of %s raised", event.request_id)

    def _cancel(self, request_id: str) -> None:
        deliveries, name = self._requests.cancel(request_id)
        self._deliver(deliveries)
        if (record := None if name is None else self._roster.find(name)) is not None:
            record.tell({"do": "cancel", "ids": [request_id]})

    def _rebalance(self) -> None:
        if not self._changes.is_idle:
            raise MembershipError("the membership changes: experts are balanced again behind that")
        for record in self._roster.serving()[:1]:
            record.tell({"do": "rebalance"})

    def _launch(self, name: str) -> RankRecord:
        device = self._launcher.find_device([one.seat.device for one in self._roster.living()])
        seat = RankSeat(
            name,
            secrets.token_hex(8),
            self._spec.interface,
            self._listener.port,
            self._token,
            device,
        )
        record = RankRecord(seat, self._launcher.start(seat), self._launcher.host)
        self._roster.add(record)
        return record

    def _end_rank(self, record: RankRecord, why: str) -> None:
        record.handle.stop(kill=True)
        self._bury(record, why, None)

    def _dismiss(self, name: str) -> None:
        record = self._roster.find(name)
        if record is not None and record.number is not None:
            record.number, record.state = None, "leaving"
            record.leaves_by = time.monotonic() + self._spec.timeout_s + LEAVE_S
            self._requests.release(name)

    def _give_up(self, reason: str) -> None:
        """The service cannot go on: say so to all who wait, and end."""
        logger.error("the service ends: %s", reason)
        self._closing, self._has_failed = f"it has failed: {reason}", True
        self._deliver(self._requests.fail(reason))
        self._stop_ranks()

    def _stop_ranks(self) -> None:
        self._stop_by = time.monotonic() + LEAVE_S
        self._changes.close(ServiceClosed(self._closing or "it was closed"))
        for record in self._roster.living():
            # Who serves nothing yet may be loading, and hears nothing meanwhile.
            if record.channel is None or record.number is None:
                record.handle.stop()
            record.tell({"do": "stop"})

    def _describe(self) -> ServiceStatus:
        return describe_service(
            self.facts,
            self._spec,
            self._changes,
            self._roster,
            self._requests,
            self._tally,
            self._closing,
            has_failed=self._has_failed,
        )


def _look() -> None:
    """Nothing but a reason to look what there is to do."""
