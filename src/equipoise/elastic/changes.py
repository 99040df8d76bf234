"""Drives changes of the membership through their stages, one change at a time.

What ranks are told, and whose word ends each stage:

| stage | told | ends with |
| --- | --- | --- |
| launching | newcomers start | each `warm` |
| describing | serving ranks: pause balancing, say what you hold | each `holding` |
| preparing | all: the plan | members `switched`, leavers `left`: the decision is theirs |
| aborting | serving ranks: abort; newcomers: stop | each `aborted` |
| registering | survivors: it is over, if their steps have not failed | each survivor `lost` |
| retiring | nothing: they close what served before | members `retired`, leavers gone |

Whatever fails before the decision leaves the serving generation as it is; a death in it, or behind
the decision, ends in `registering`, where survivors make the next one.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from equipoise.elastic.change_plans import (
    describe_change,
    foretell,
    make_plan,
    order_begin,
    order_prepare,
)
from equipoise.elastic.channel import Message
from equipoise.elastic.orders import STAGE_ENDS, Change, Hands, settle_names
from equipoise.elastic.reach import STORE
from equipoise.elastic.respawn import MOST_RECOVERIES, Recoveries, Respawn
from equipoise.elastic.roster import RankRecord, Roster, sort_names
from equipoise.elastic.service import Busy, Phase, ScaleReport
from equipoise.elastic.spec import ServiceSpec
from equipoise.errors import ConfigError, EquipoiseError, MembershipError

logger = logging.getLogger(__name__)


class Changes:
    """The change under way, those that wait, and what came of the last. Owner: the controller.

    Args:
        spec: of the service.
        roster: its ranks.
        hands: of the controller.

    Attributes:
        generation: that serves; -1 before the first.
        phase: of the last change.
        reason: why it failed, or what is under way.
        num_scalings: changes that were asked for and done.
        num_recoveries: changes that deaths made necessary, done.
        placements: of the generation that serves, per set of layers, as placement files have them.
    """

    def __init__(self, spec: ServiceSpec, roster: Roster, hands: Hands) -> None:
        self._spec, self._roster, self._hands = spec, roster, hands
        self.generation = -1
        self._last_generation = -1
        self.phase: Phase = "idle"
        self.reason = ""
        self.num_scalings = self.num_recoveries = 0
        self.placements: list[Any] = []
        self._current: Change | None = None
        self._queue: deque[Change] = deque()
        self._wanted = spec.num_ranks
        self._respawn = Respawn(spec.respawn_tries, spec.respawn_s)
        self._recoveries = Recoveries()

    @property
    def is_idle(self) -> bool:
        """Whether no change is under way."""
        return self._current is None

    @property
    def num_waiting(self) -> int:
        """Changes that wait for the one under way."""
        return len(self._queue)

    @property
    def leaving(self) -> Sequence[str]:
        """Names of ranks that are about to leave, and get no more requests."""
        return self._current.leaving if self._current is not None else ()

    def begin(self) -> Change:
        """Start the ranks of the first generation."""
        change = Change("begin")
        self.hold(change)
        self._launch(change, self._roster.pick_names(self._spec.num_ranks))
        return change

    def hold(self, change: Change) -> None:
        """Have nothing begin while a change of another's goes on."""
        self._current = change
        self.phase, self.reason = "preparing", str(change)

    def take_over(self, names: Sequence[str], generation: int) -> None:
        """Ranks of a controller that has gone are this one's from here on.

        Args:
            names: of all ranks of their generation; who is missing in the roster is dead.
            generation: its number; -1 where there was none.
        """
        self._current = None
        self.phase, self.reason = "idle", ""
        serving = self._roster.serving()
        if not serving:
            return
        self.generation = self._last_generation = generation
        self._wanted = len(names)
        fine = [one.name for one in serving if not one.is_lost]
        failed = [name for name in names if name not in fine]
        if failed:
            self._register(f"{', '.join(failed)} failed while there was no controller")
        else:
            change = Change("renew")
            self.hold(change)
            self._describe(change)

    def ask(self, change: Change, busy: Busy) -> None:
        """Take up a change that is asked for, or have it wait.

        Raises: ConfigError if it cannot be asked for; MembershipError if it is refused.
        """
        if self._current is None:
            self._take_up(change)
        elif busy == "refuse":
            raise MembershipError(f"a change is under way ({self.reason}): ask again later")
        else:
            self._queue.append(change)

    def preview(self, change: Change) -> ScaleReport:
        """What is known of a change that has only been asked for."""
        return describe_change(change, self._roster, self.generation, done=False)

    def hear(self, record: RankRecord, message: Message) -> None:
        """A rank has said something that may be about a change."""
        said = message["say"]
        if said == "warm":
            record.is_warm = True
        elif said in ("serving", "switched"):
            self.note_serving(record, message)
        elif said == "lost":
            record.is_lost = True
            record.told["holding"] = message
            # It takes part in no change that is under way; where it was to leave, nobody minds.
            is_void = record.name not in self.leaving
            self._register(f"{record.name} says: {message['reason']}", is_void=is_void)
        elif said == "holding":
            record.told["holding"] = message
        elif said == "left":
            # Its process may end before the controller has heard of all that switched.
            self._hands.dismiss(record.name)
        elif said == "retired":
            record.pause_s = float(message["pause_s"])
        change = self._current
        if change is None or said not in STAGE_ENDS[change.stage] or change.is_other(message):
            return
        change.missed |= message.get("missed", {})
        if said == "aborted" and change.stage == "preparing":
            change.aborted.add(record.name)
            self._abort(change, f"{record.name}: {message['reason']}")
            return
        change.awaited.discard(record.name)
        self._advance(change)

    def lose(self, record: RankRecord, *, is_expected: bool) -> None:
        """A rank's process has ended; `record.detail` says how.

        Args:
            record: of the rank.
            is_expected: it had been told to leave.
        """
        change = self._current
        was_serving = record.number is not None
        record.number = None
        self._respawn.note_death(record.name, time.monotonic())
        if change is not None:
            change.awaited.discard(record.name)
        if is_expected:
            if change is not None and change.stage in ("preparing", "registering", "retiring"):
                self._advance(change)
        elif change is not None and change.kind == "begin":
            self._end(change, MembershipError(record.detail))
            self._hands.give_up(record.detail)
        elif was_serving:
            if change is not None and change.stage == "registering":
                # What a death explains better than those who noticed.
                change.why = record.detail
                self.reason = str(change)
            self._register(record.detail)
        elif change is None or record.name not in (*change.joining, *change.leaving):
            return
        elif change.stage == "retiring":
            self._advance(change)
        elif record.name in change.leaving and change.switched:
            # It left before it could say so, or died on its way out: the others have gone on.
            self._advance(change)
        else:
            self._abort(change, record.detail)

    def tick(self, now: float) -> None:
        """Time has passed."""
        change = self._current
        if change is None or now < change.deadline:
            return
        text = f"{', '.join(sorted(change.awaited))} not in time ({change.stage})"
        if change.stage in ("launching", "describing", "preparing"):
            if change.kind == "begin":
                self._end(change, MembershipError(text))
                self._hands.give_up(text)
            else:
                self._abort(change, text)
            return
        # Whoever hangs here holds the others up: it is given up, which `lose` hears of. What a
        # member has not closed in time is left to it.
        change.deadline = now + self._spec.silence_s
        if change.stage == "retiring":
            change.awaited.intersection_update(change.leaving)
        for record in self._roster.find_all(change.awaited):
            record.detail = f"{record.name} was given up: {text}"
            record.handle.stop(kill=True)
        self._advance(change)

    def close(self, error: EquipoiseError) -> None:
        """No change goes on, and none that waits begins."""
        for change in [self._current, *self._queue]:
            if change is not None and not change.answer.done():
                change.answer.set_exception(error)
        self._current = None
        self._queue.clear()

    # What follows takes a change from stage to stage.

    def _take_up(self, change: Change) -> None:
        # By name: ranks are numbered node by node, and whole nodes would leave.
        serving = sort_names(self._roster.names_serving())
        free = self._roster.pick_names(max(0, (change.to or 0) - len(serving)))
        change.joining, change.leaving = settle_names(change, serving, free)
        if change.dry_run:
            change.deadline = time.monotonic() + self._spec.change_s
            self._current = change
            self._describe(change)
            return
        if not change.joining and not change.leaving:
            self._wanted = len(serving)
            change.answer.set_result(self._report(change))
            return
        self.hold(change)
        logger.info("%s", self.reason)
        self._launch(change, change.joining)

    def _launch(self, change: Change, names: Sequence[str]) -> None:
        change.stage = "launching"
        change.deadline = time.monotonic() + self._spec.start_s
        change.joining = list(names)
        change.awaited = set(names)
        for name in names:
            try:
                self._hands.launch(name).state = "starting"
            except EquipoiseError as error:
                self._abort(change, str(error))
                return
        if not names:
            self._advance(change)

    def _advance(self, change: Change) -> None:
        """Go on, once nobody is waited for."""
        if change.stage == "registering":
            serving = self._roster.names_serving()
            change.awaited = set(serving) - set(self._roster.names_lost(serving))
        if change.awaited:
            return
        if change.stage == "launching":
            change.warm_at = time.monotonic()
            if change.kind == "begin":
                self._begin_generation(change)
            else:
                self._describe(change)
        else:
            goes_on = {
                "describing": self._prepare,
                "preparing": self._retire,
                "aborting": self._finish_abort,
                "registering": self._recover,
                "retiring": self._finish,
            }
            goes_on[change.stage](change)

    def _begin_generation(self, change: Change) -> None:
        change.stage = "preparing"
        change.deadline = time.monotonic() + self._spec.start_s
        change.awaited = set(change.joining)
        self._last_generation += 1
        for name, order in order_begin(self._roster, change.joining, self._last_generation).items():
            self._roster.tell([name], order)

    def _describe(self, change: Change) -> None:
        change.stage = "describing"
        change.deadline = time.monotonic() + self._spec.change_s
        change.awaited = set(self._roster.names_serving())
        self._roster.tell(change.awaited, {"do": "pause", "paused": True})
        self._roster.tell(change.awaited, {"do": "describe"})

    def _prepare(self, change: Change) -> None:
        change.stage = "preparing"
        try:
            plan = make_plan(change, self._roster, self._spec, self._last_generation + 1)
        except EquipoiseError as error:
            self._abort(change, str(error))
            return
        if change.dry_run:
            self._end(
                change, foretell(change, plan, self._roster, self.generation, self._spec.device)
            )
            return
        self._last_generation += 1
        change.plan = plan
        change.awaited = set(plan.participants)
        change.switched.clear()
        change.deadline = time.monotonic() + self._spec.change_s + self._spec.timeout_s
        self._roster.tell(plan.participants, order_prepare(self._roster, plan))

    def _retire(self, change: Change) -> None:
        """All members serve in the next generation."""
        assert change.plan is not None or change.kind == "begin"
        change.full_at = time.monotonic()
        change.decided_at = change.decided_at or change.full_at
        self.generation, self.phase = self._last_generation, "retiring"
        change.stage = "retiring"
        change.deadline = time.monotonic() + self._spec.timeout_s
        # Newcomers have nothing to close.
        before = () if change.plan is None else change.plan.serving.held
        change.awaited = {one.name for one in self._roster.living() if one.name in before}
        self._advance(change)

    def _finish(self, change: Change) -> None:
        self._count(change)
        self._end(change, self._report(change))

    def _count(self, change: Change) -> None:
        """All members of its generation serve."""
        if change.kind == "recover":
            self.num_recoveries += 1
        elif change.kind == "scale":
            self.num_scalings += 1
            if change.is_respawn:
                self._respawn.note_came(change.joining, time.monotonic())
            else:
                self._wanted = change.to or self._wanted - len(change.leaving)
                self._respawn.forget()

    def _abort(self, change: Change, why: str) -> None:
        """Call a change off; where it is decided already, it goes on."""
        if change.stage == "aborting":
            self._advance(change)
            return
        is_told = change.plan is not None and not change.dry_run
        if is_told and not self._call_off(change, why):
            # Whoever is missing is missed in the next generation too, whose members will say so.
            self._advance(change)
            return
        change.why = why
        change.stage = "aborting"
        change.deadline = time.monotonic() + self._spec.timeout_s
        for name in change.joining:
            self._roster.end_newcomer(name, why)
        serving = self._roster.names_serving() if is_told else []
        change.awaited = set(serving) - change.aborted
        self._roster.tell(serving, {"do": "abort", "reason": why})
        self._advance(change)

    def _call_off(self, change: Change, why: str) -> bool:
        """Have the store say that it is off; False if it says that the change stands."""
        assert change.plan is not None
        return not change.switched and self._hands.call_off(change.plan.generation, why)

    def _finish_abort(self, change: Change) -> None:
        if change.kind == "recover":
            cut_off = self._roster.find_all(self._recoveries.choose_cut_off(change.missed))
            for record in cut_off:
                lacks_store = STORE in change.missed.get(record.name, ())
                why = "it does not reach the store" if lacks_store else "its peers do not reach it"
                self._hands.bury(record, f"{record.name} was given up: {why}")
            if not cut_off:
                self._register(change.why)
            return
        self._end(change, MembershipError(f"not done: {change.why}; the others serve on"))

    def _register(self, why: str, *, is_void: bool = False) -> None:
        """Wait until all who live have noticed that the generation is no more.

        Args:
            why: it is.
            is_void: also the next one, where it has been decided on.
        """
        before = self._current
        if before is not None:
            if before.stage == "registering":
                self._advance(before)
                return
            if before.kind == "adopt":
                return
            is_told = before.plan is not None and before.stage in ("preparing", "aborting")
            if is_told and not self._call_off(before, why) and not is_void:
                # The next generation stands: its members switch, and find out there.
                for name in self._roster.names_lost(before.leaving):
                    self._hands.dismiss(name)
                    self._roster.tell([name], {"do": "stop"})
                    before.awaited.discard(name)
                self._advance(before)
                return
            if before.has_stood(self._roster.names_serving()):
                self._count(before)
                if not before.answer.done():
                    before.answer.set_result(self._report(before))
            elif before.kind == "scale":
                if before.is_respawn:
                    self._respawn.note_failure(time.monotonic())
                if not before.answer.done():
                    before.answer.set_exception(MembershipError(f"not done: {why}"))
            for name in sorted(set(before.joining) - before.switched):
                self._roster.end_newcomer(name, why)
        change = Change("recover", why=why, stage="registering")
        self._current = change
        self.phase, self.reason = "preparing", str(change)
        logger.warning("%s", self.reason)
        change.deadline = time.monotonic() + self._spec.timeout_s + self._spec.silence_s
        # Whoever was given up may be cut off from here alone, and their steps go on.
        for record in self._roster.serving():
            record.tell_over(why)
        self._advance(change)

    def _recover(self, change: Change) -> None:
        survivors = self._roster.serving()
        if not survivors:
            self._end(change, MembershipError(change.why))
            self._hands.give_up(f"no rank is left: {change.why}")
            return
        names = [record.name for record in survivors]
        if not self._recoveries.may_try(self._hands.count_steps(), names):
            self._end(change, MembershipError(change.why))
            self._hands.give_up(f"{MOST_RECOVERIES} recoveries in a row failed: {change.why}")
            return
        self._prepare(change)

    def _end(self, change: Change, outcome: ScaleReport | EquipoiseError) -> None:
        """What becomes of a change; then the next one."""
        if self._current is change:
            self._current = None
        if not change.dry_run:
            self.phase, self.reason = "idle", ""
        if isinstance(outcome, EquipoiseError):
            if not change.dry_run:
                self.phase, self.reason = "failed", str(outcome)
            logger.warning("%s", outcome)
            change.answer.set_exception(outcome)
            if change.is_respawn:
                self._respawn.note_failure(time.monotonic())
        elif not change.answer.done():
            change.answer.set_result(outcome)
        self._roster.tell(self._roster.names_serving(), {"do": "pause", "paused": False})

    def start_next(self) -> None:
        """Take up what waits, if nothing is under way; first of all, replace the dead."""
        num_serving = len(self._roster.serving())
        is_short = self._spec.respawn and 0 < num_serving < self._wanted
        if self._current is None and is_short and self._respawn.may_try(time.monotonic()):
            self._queue.appendleft(Change("scale", to=self._wanted, is_respawn=True))
        while self._current is None and self._queue:
            change = self._queue.popleft()
            try:
                self._take_up(change)
            except (ConfigError, MembershipError) as error:
                change.answer.set_exception(error)

    def _report(self, change: Change) -> ScaleReport:
        return describe_change(change, self._roster, self.generation, done=True)

    def note_serving(self, record: RankRecord, message: Message) -> None:
        """A rank says in which generation it serves."""
        record.serve(message)
        if record.number == 0:
            self.placements = message["placements"]
        change = self._current
        if change is not None:
            change.switched.add(record.name)
            if change.stage == "registering":
                # It has gone on to what is void as well, and has not been told.
                record.tell_over(change.why)
            change.decided_at = change.decided_at or time.monotonic()
            if change.stage == "preparing":
                self.phase = "committing"
