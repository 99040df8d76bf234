"""The next generation of one rank, built beside the one that serves."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from equipoise.elastic.bridge import Haul, Staged
from equipoise.elastic.builder import Builder, Home, TryOut
from equipoise.elastic.change_store import CalledOff, ChangeStore, StoreLost, say_abort
from equipoise.elastic.membership import MembershipPlan
from equipoise.elastic.reach import STORE, Unreachable
from equipoise.elastic.rehearsal import try_thread
from equipoise.elastic.retirement import Retirement
from equipoise.elastic.verdict import SWITCH, Word
from equipoise.errors import EquipoiseError, MembershipError
from equipoise.models.parallel import ParallelModel

logger = logging.getLogger(__name__)

State = Literal["preparing", "ready", "unsure", "decided", "aborted"]
"""`ready` once this rank could switch, `decided` once the next generation takes over, `aborted`
once it is sure that it does not; `unsure` where a newcomer could switch, and the store that knows
whether all do has gone."""

Watch = Callable[[str], None]
"""Called on the building thread at the begin of each of its parts, by name; what it raises fails
the change. For tests and logs."""

_LOOK_S = 0.05
"""Between two looks whether the change was called off."""

_STUCK_S = 1.0
"""A store that takes longer to answer is one that this rank does not reach."""

PARTS = ("build", "pull", "verify", "assemble", "rehearse", "ready", "decide")
"""What a watch hears, in order; a leaver assembles and rehearses nothing."""


@dataclass(frozen=True)
class ChangeFigures:
    """What a change took on one rank.

    Attributes:
        prepare_s: from the plan until this rank was ready.
        pull_s: of those, while weights travelled.
        received_bytes: weights that came from other ranks.
        staged_bytes: of those experts that the switch copies.
        restored: experts that were read as no rank held them.
        switch_s: of the forward thread, in `switch`.
    """

    prepare_s: float = 0.0
    pull_s: float = 0.0
    received_bytes: int = 0
    staged_bytes: int = 0
    restored: int = 0
    switch_s: float = 0.0


class NextGeneration:
    """Builds a rank's part of the next generation in a thread, while the forward thread serves.

    The forward thread tells `word` in every meeting before a step, gives what it heard to
    `verdict.settle`, and at SWITCH calls `switch`; at ABORT it calls `drop` and forgets this; at
    ASIDE it calls `stand_aside`, and a `Detour` says when tokens go straight again. A
    newcomer, and ranks of a recovery, have no steps to serve: they `wait` until it is decided, and
    switch at once.

    Args:
        plan: the same on every participant.
        home: of this rank.
        serving: what this rank serves; None of a newcomer. It begins no rebalance from before this
            is made until the change has ended (`pause`, and not `is_rebalancing`).
        watch: hears how far it is.
        try_out: called on the building thread with this rank's part of the next generation, once
            it is whole: what takes long the first time need not keep others waiting.

    Attributes:
        plan: as given.
        retirement: of what served before, once this rank has switched.
        missed: by name, participants that a participant does not reach, where that ended it; or
            this rank's name and `STORE`.

    Collective: none here; its thread meets those of all participants.
    Raises: MembershipError if this rank is no participant.
    """

    def __init__(
        self,
        plan: MembershipPlan,
        home: Home,
        serving: ParallelModel | None,
        watch: Watch | None = None,
        try_out: TryOut | None = None,
    ) -> None:
        self.plan = plan
        self.retirement: Retirement | None = None
        self.missed: dict[str, list[str]] = {}
        self._home, self._serving, self._watch = home, serving, watch
        self._store = ChangeStore(home.store, plan.generation)
        wait_aside = None if serving is None else self._wait_aside
        self._builder = Builder(
            plan, home, serving, self._store, watch or _tell_nobody, try_out, wait_aside
        )
        self._changed = threading.Condition()
        self._state: State = "preparing"
        self._word = Word.OPEN
        self._reason = ""
        # This rank has said that it could switch, so another may have decided that all do.
        self._is_promised = False
        self._is_newcomer = serving is None and not plan.is_recovery
        self._is_given_up = False
        self._is_closed = threading.Event()
        # One that leaves has nothing to connect, and may stand aside whenever the others want to.
        self._wants_aside = (
            serving is not None
            and plan.find_number(home.name) is None
            and len(plan.newcomers) < len(plan.members)
        )
        self._is_aside = threading.Event()
        self._not_connected = ""
        self._serves_aside = False
        self._started = time.monotonic()
        self._deadline = self._started + plan.deadlines.prepare_s + plan.deadlines.agree_s
        self._figures = ChangeFigures()
        threading.Thread(target=self._run, name="equipoise-next", daemon=True).start()
        if serving is None:
            try_thread(home.device, home.dtype)

    @property
    def state(self) -> State:
        """How far it is; any thread may ask."""
        with self._changed:
            return self._state

    @property
    def reason(self) -> str:
        """Why it was aborted, in one line; empty before, and final once it is closed."""
        with self._changed:
            return self._reason

    @property
    def figures(self) -> ChangeFigures:
        """What it took so far; any thread may ask."""
        with self._changed:
            return self._figures

    @property
    def word(self) -> Word:
        """What to tell in the meeting before the next step. Collective: none; never waits."""
        with self._changed:
            if self._word is Word.OPEN and time.monotonic() > self._deadline:
                if self._is_promised:
                    return Word.LOST
                # Nobody can have decided for a rank that has promised nothing.
                self._give_up("it was not prepared in time")
            if self._word is Word.OPEN and self._wants_aside and not self._is_aside.is_set():
                return Word.ASIDE
            return self._word

    @property
    def has_detour(self) -> bool:
        """Whether this rank's tokens take a detour because of it; still do, once it has ended."""
        return self._is_aside.is_set() if self._state != "decided" else self._serves_aside

    @property
    def is_over(self) -> bool:
        """Whether it has ended, and what is closed because of that is closed on this rank."""
        if self.retirement is not None:
            return self.retirement.is_done
        return self._is_closed.is_set() or (self._state == "decided" and not self._is_given_up)

    def wait(self, timeout_s: float) -> State:
        """Wait until it is decided or aborted, or the time is over.

        Where it is not known by the deadline of the plan, this rank gives it up; one that could
        have been decided for without it must not serve in any generation then. A newcomer that is
        `unsure` may switch nevertheless: if the others have, its first exchange with them tells;
        if not, that fails at once, as they close their side, and it has served nobody.

        Collective: none.
        """
        until = time.monotonic() + timeout_s
        with self._changed:
            while self._state in ("preparing", "ready"):
                if self._word is Word.LOST and self._is_newcomer:
                    return "unsure"
                now = time.monotonic()
                if now > self._deadline:
                    self._give_up("what was decided could not be learned in time")
                elif self._store.waited_s > self._home.timeout.total_seconds():
                    self._give_up("the store does not answer")
                elif now >= until:
                    break
                else:
                    self._changed.wait(min(until, self._deadline + 0.01) - now)
            return self._state

    def wait_closed(self, timeout_s: float) -> bool:
        """After an abort: wait until nothing of it is left on this rank. Collective: none."""
        return self._is_closed.wait(timeout_s)

    def abort(self, reason: str) -> None:
        """Have it called off, unless it is decided already; returns at once. Any thread.

        What comes of it, `word` tells, as ever.

        Collective: none.
        """
        self._store.call_off(reason)
        self._builder.interrupt()
        with self._changed:
            if not self._is_promised:
                self._give_up(reason)

    def stand_aside(self) -> None:
        """Forward thread: all that serve are heard to be ready for it; tokens take a detour now.

        What only this thread may connect is connected here; where that fails, the change does.

        Collective: every rank that serves, between the same two steps; waits for the device.
        Raises: TransferError if the device is not through with earlier exchanges in time.
        """
        assert self._serving is not None, "a newcomer has no tokens"
        logger.info("%s: tokens make way while ranks connect", self._home.name)
        for dispatcher in self._serving.dispatchers:
            dispatcher.detour(True)
        try:
            self._builder.connect_between_steps()
        except EquipoiseError as error:
            self._not_connected = str(error)
        self._is_aside.set()

    def drop(self, reason: str) -> None:
        """Forward thread: this rank does not switch, whatever others do; returns at once.

        Where all have heard ABORT, or this rank's serving generation has failed.

        Collective: none.
        """
        self._store.call_off(reason)
        self._builder.interrupt()
        with self._changed:
            must_close = self._state == "decided" and not self._is_given_up
            self._give_up(reason)
        if must_close:
            # The building thread has ended, and left it to be taken.
            threading.Thread(target=self._close, name="equipoise-drop", daemon=True).start()

    def switch(self) -> ParallelModel | None:
        """Forward thread, at a step boundary: serve in the next generation from here on.

        What it retires is closed in the background.

        Returns:
            The next generation's model, whose steps count from 0; None of a leaver.
        Collective: every participant.
        Raises: MembershipError if this rank is not ready, so that it cannot serve any more; what
            dispatch raises if others do not come, and then slots hold what they held before.
        """
        started = time.perf_counter()
        with self._changed:
            if self._state not in ("ready", "decided") or self._is_given_up:
                raise MembershipError(
                    f"{self._home.name} cannot switch to generation {self.plan.generation}, which "
                    f"is {self._state}: {self._reason or 'it is not ready'}"
                )
            self._state, self._word = "decided", Word.SWITCH
            self._changed.notify_all()
        parallel, haul = self._builder.parallel, self._builder.haul
        if parallel is not None:
            self._enter(parallel)
            _fill(parallel, haul.staged)
            self._serves_aside = self._builder.needs_detour
            if self._serves_aside:
                # What is retired is closed on the device meanwhile.
                for dispatcher in parallel.dispatchers:
                    dispatcher.detour(True)
            parallel.spread.bind()
            _tell_commits(parallel, haul.staged)
            if self._serving is not None:
                parallel.state.inherit(self._serving.state)
        bridge = self._builder.forget()
        if self._serving is not None:
            # Here and not in the background: what they let go of, the device may be using.
            for dispatcher in self._serving.dispatchers:
                dispatcher.close()
            store = ChangeStore(self._home.store, self.plan.generation)
            self.retirement = Retirement(self._serving, self.plan, store, self._home.name, bridge)
        self._serving = None
        with self._changed:
            seconds = time.perf_counter() - started
            self._figures = replace(self._figures, switch_s=seconds)
        return parallel

    def _enter(self, parallel: ParallelModel) -> None:
        """First of all, as it may fail: then slots still hold what the generation before says."""
        try:
            for dispatcher in parallel.dispatchers:
                dispatcher.enter()
        except EquipoiseError as error:
            self.drop(str(error))
            raise

    def _run(self) -> None:
        if self._home.device.type == "cuda":
            torch.cuda.set_device(self._home.device)
        try:
            try:
                self._prepare()
            except BaseException as error:
                self._fail(error)
        finally:
            self._close_unless_taken()

    def _prepare(self) -> None:
        plan, store, home = self.plan, self._store, self._home
        until_ready = self._started + plan.deadlines.prepare_s
        self._notify("build")
        with self._own_stream():
            fingerprint = self._builder.build()
        with self._changed:
            if self._is_given_up:
                raise CalledOff(self._reason)
            self._figures = _measure(self._builder.haul, time.monotonic() - self._started)
            self._is_promised = True
            self._state = "ready"
            self._changed.notify_all()
        self._notify("ready")
        store.tell(f"ready/{home.name}", fingerprint)
        told = store.hear_all("ready", plan.participants, until_ready)
        differing = [name for name, theirs in told.items() if theirs != fingerprint]
        self._notify("decide")
        if differing:
            raise MembershipError(f"{differing[0]} would serve something else than {home.name}")
        self._take(store.decide(SWITCH))

    def _fail(self, error: BaseException) -> None:
        """Have the change called off, or learn that it stands nevertheless."""
        if not isinstance(error, CalledOff):
            logger.warning("%s: generation %d: %s", self._home.name, self.plan.generation, error)
        reason = str(error) or repr(error)
        if isinstance(error, Unreachable):
            self.missed = error.missed
        elif isinstance(error, StoreLost):
            self.missed = {self._home.name: [STORE]}
        if not isinstance(error, CalledOff):
            reason = f"{self._home.name}: {reason}"
        try:
            self._take(self._store.decide(say_abort(reason)))
        except StoreLost:
            with self._changed:
                is_promised = self._is_promised
                if is_promised and self._word is Word.OPEN:
                    self._word, self._reason = Word.LOST, reason
                    self._changed.notify_all()
            if not is_promised:
                self._take(say_abort(reason))

    def _take(self, stands: str) -> None:
        """The word that stands."""
        with self._changed:
            if stands != SWITCH:
                self._give_up("")
                self._reason = stands.partition(": ")[2]
            elif self._state != "decided" and not self._is_given_up:
                self._state, self._word = "decided", Word.SWITCH
            self._changed.notify_all()

    def _give_up(self, reason: str) -> None:
        """Under the lock: this rank does not switch."""
        if not self._is_given_up:
            if self._store.waited_s > _STUCK_S:
                self.missed = {self._home.name: [STORE]}
            self._is_given_up = True
            self._state, self._word, self._reason = "aborted", Word.ABORT, reason
            self._changed.notify_all()

    def _close_unless_taken(self) -> None:
        """The building thread's last act: where it was given up, undo what was built."""
        with self._changed:
            if not self._is_given_up:
                # Decided, or to be heard of from others.
                self._changed.wait_for(
                    lambda: self._is_given_up or self._state == "decided",
                    max(0.0, self._deadline + self.plan.deadlines.agree_s - time.monotonic()),
                )
            if self._state == "decided":
                return
            self._give_up("what was decided could not be learned in time")
        self._close()

    def _close(self) -> None:
        self._builder.close()
        self._is_closed.set()

    def _wait_aside(self, deadline: float) -> None:
        """Building thread: until `stand_aside` was called."""
        self._wants_aside = True
        while not self._is_aside.wait(_LOOK_S):
            self._store.check()
            if time.monotonic() > deadline:
                raise MembershipError(f"{self._home.name}: tokens did not make way in time")
        if self._not_connected:
            raise MembershipError(self._not_connected)

    def _notify(self, part: str) -> None:
        if self._watch is not None:
            self._watch(part)

    def _own_stream(self) -> torch.cuda.StreamContext:
        device = self._home.device
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        return torch.cuda.stream(stream)


def _tell_nobody(part: str) -> None:
    """A watch that hears nothing."""


def _fill(parallel: ParallelModel, staged: list[Staged]) -> None:
    """Copy experts into slots that were in use up to now, in stream order."""
    for one in staged:
        weights = parallel.spread.sets[one.fetch.set].weights[one.fetch.layer]
        for slots, tensor in zip(weights, one.tensors, strict=True):
            for slot in one.fetch.slots:
                slots[slot].copy_(tensor)
            if tensor.is_cuda:
                # The builder's stream made it, and this one's use of it outlives the switch.
                tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _tell_commits(parallel: ParallelModel, staged: list[Staged]) -> None:
    """Tell the engine which slots hold another expert now, in the model's own order of layers."""
    models = parallel.state.models
    changed: dict[tuple[int, int], list[int]] = {}
    for one in staged:
        changed.setdefault((one.fetch.set, one.fetch.layer), []).extend(one.fetch.slots)
    for (index, layer), slots in sorted(changed.items()):
        on_commit = models[index].on_commit
        if on_commit is not None:
            on_commit(layer, np.array(sorted(slots), dtype=np.int64))


def _measure(haul: Haul, prepare_s: float) -> ChangeFigures:
    staged = sum(one.fetch.num_bytes for one in haul.staged)
    return ChangeFigures(prepare_s, haul.seconds, haul.received_bytes, staged, haul.restored)
