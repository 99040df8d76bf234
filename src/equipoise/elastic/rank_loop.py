"""A rank's main loop: hear the controller, meet the other ranks, step; over and over."""

from __future__ import annotations

import logging
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from equipoise.balancer import RebalanceOutcome
from equipoise.comm.groups import create_rank_group
from equipoise.elastic.builder import Home
from equipoise.elastic.channel import Message
from equipoise.elastic.detour import Detour
from equipoise.elastic.duty import Duty, Meeting
from equipoise.elastic.generation import NextGeneration
from equipoise.elastic.held_requests import HeldRequests
from equipoise.elastic.link import ControllerLink
from equipoise.elastic.membership import MembershipPlan
from equipoise.elastic.part_times import PartTimes
from equipoise.elastic.placing import Redundancy
from equipoise.elastic.recovery import abandon
from equipoise.elastic.retirement import Retirement
from equipoise.elastic.scoring import RankScores
from equipoise.elastic.spec import PREFILL_CHUNK, ServiceSpec
from equipoise.elastic.store import connect_store
from equipoise.elastic.verdict import Word, settle
from equipoise.engine.engine import Engine, EngineLimits
from equipoise.engine.figures import StepResult
from equipoise.errors import MembershipError, TransferError
from equipoise.models.families import read_model_shape
from equipoise.models.parallel import ParallelModel, keep_copies, parallelize
from equipoise.placement import Placement, place_in_order
from equipoise.topology import Topology

logger = logging.getLogger(__name__)

LISTEN_S = 0.05
"""Between two looks of a rank that serves no generation."""

MEDIAN_STEPS = 32
"""Steps whose median a rank tells of."""


class RankLoop:
    """Serves on one rank. Owner: the forward thread.

    Args:
        name: of the rank.
        spec: of the service.
        home: what of the rank outlives generations.
        tokenizer: of the model.
        link: to the controller.
        set_pulse: tells what signs of life say from now on.
    """

    def __init__(
        self,
        name: str,
        spec: ServiceSpec,
        home: Home,
        tokenizer: Any,
        link: ControllerLink,
        set_pulse: Callable[..., None],
    ) -> None:
        self._name, self._spec, self._home, self._tokenizer = name, spec, home, tokenizer
        self._link, self._set_pulse = link, set_pulse
        self._duty: Duty | None = None
        self._next: NextGeneration | None = None
        self._retirement: Retirement | None = None
        self._detour = Detour()
        self._engine: Engine | None = None
        self._held, self._scores = HeldRequests(), RankScores()
        self._num_steps = 0
        self._stepped_at: float | None = None
        self._pause_s = 0.0
        self._step_s: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._parts = PartTimes()
        self._lost_by: float | None = None
        self._is_busy = self._has_worked = self._is_paused = self._is_asked = self._stops = False
        # Whether the generation that this rank is in may not have begun; what it says if it has.
        self._is_unsure, self._beginning = False, dict[str, Any]()
        self._exit_code: int | None = None
        self._num_rebalances = self._num_rebalances_done = 0
        self._faults = {fault.step: fault.how for fault in spec.faults if fault.rank == name}
        self._orders: dict[str, Callable[[Message], None]] = {
            "begin": self._begin,
            "submit": self._submit,
            "cancel": self._cancel,
            "back": self._come_back,
            "pause": self._set_paused,
            "rebalance": self._rebalance,
            "describe": self._ask,
            "prepare": self._prepare,
            "abort": self._abort,
            "over": self._end_generation,
            "stop": self._stop,
            "wake": self._ignore,
            "score": self._scores.take,
            "orphaned": self._go_on_alone,
            "adopt": self._join_controller,
            "abandoned": self._leave_alone,
            "given up": self._leave_alone,
        }

    def run(self) -> int:
        """Until the controller says that it is over, or has gone for good.

        Returns:
            The exit code.
        Collective: with the other ranks of each of its generations.
        """
        try:
            while self._exit_code is None:
                try:
                    if self._duty is None or self._lost_by is not None:
                        self._stand_by()
                    else:
                        self._turn(self._duty, self._find_engine())
                except (TransferError, MembershipError) as error:
                    self._fail(error)
        finally:
            self._leave()
        return self._exit_code

    def _fail(self, error: TransferError | MembershipError) -> None:
        """What ranks do together has not gone well."""
        if self._is_unsure:
            # The others did not switch, and hung up: this rank has served nobody.
            logger.warning("%s: it was called off, as it seems: %s", self._name, error)
            self._exit_code = 0
        elif self._duty is None or self._lost_by is not None:
            raise error
        else:
            self._lose(self._duty, error)

    def _turn(self, duty: Duty, engine: Engine) -> None:
        """One round of all ranks."""
        self._obey(wait_s=0.0 if self._is_busy else self._spec.idle_tick_s)
        meeting = self._meet(duty, engine)
        if self._is_unsure:
            self._is_unsure = False
            self._link.say(self._beginning)
        if meeting.stops:
            self._exit_code = 0
            return
        if meeting.word is Word.SWITCH:
            self._switch()
            return
        if meeting.word is Word.ABORT:
            self._forget_next("it was called off")
        elif meeting.word is Word.ASIDE and self._next is not None:
            self._next.stand_aside()
            # What was captured may use what has been connected anew.
            engine.adopt(duty.parallel)
        elif meeting.word is Word.BACK:
            self._detour.end(duty.parallel.dispatchers)
        self._is_busy = meeting.works
        self._balance(duty, meeting)
        if meeting.scores:
            self._link.say(self._scores.run(duty))
        result = engine.step() if meeting.works else engine.tick()
        self._num_steps += meeting.works
        self._tell(duty, result)
        self._note_step(meeting.works)
        self._do_to_itself()

    def _stand_by(self) -> None:
        """Without a generation to serve in: a newcomer, or a rank whose generation is no more."""
        self._obey(wait_s=LISTEN_S if self._next is None else 0.0)
        if self._stops:
            self._exit_code = 0
        elif self._next is not None:
            state = self._next.wait(LISTEN_S)
            self._is_unsure = state == "unsure"
            if state in ("decided", "unsure"):
                self._switch()
            elif state == "aborted":
                self._forget_next(self._next.reason)
        elif self._lost_by is not None and time.monotonic() > self._lost_by:
            raise MembershipError(f"{self._name}: nobody said how to go on")

    def _meet(self, duty: Duty, engine: Engine) -> Meeting:
        """What all ranks do next, found out together."""
        word = self._detour.word if self._next is None else self._next.word
        flags = [engine.has_work, self._stops, self._is_paused]
        told = [*flags, self._num_rebalances, self._scores.asked, word]
        heard = torch.stack(duty.group.all_gather(torch.tensor(told, dtype=torch.int64)))
        works, stops, is_paused, num_rebalances, _, _ = heard.amax(0).tolist()
        least, words = int(heard[:, -2].amin()), heard[:, -1].tolist()
        return Meeting(
            bool(works),
            bool(stops),
            bool(is_paused),
            num_rebalances,
            self._scores.is_due(least),
            settle(words),
        )

    def _balance(self, duty: Duty, meeting: Meeting) -> None:
        """Follow what was asked of balancing; all ranks at this one step."""
        state = duty.parallel.state
        if meeting.is_paused != state.is_paused:
            (state.pause if meeting.is_paused else state.resume)()
        if meeting.num_rebalances > self._num_rebalances_done:
            self._num_rebalances = self._num_rebalances_done = meeting.num_rebalances
            if not meeting.is_paused:
                self._say_outcomes(duty, state.rearrange())
        if self._is_asked and meeting.is_paused and not state.is_rebalancing:
            self._is_asked = False
            self._link.say(
                {
                    "say": "holding",
                    "serving": duty.describe().to_json(),
                    "fingerprints": duty.fingerprint(),
                }
            )

    def _tell(self, duty: Duty, result: StepResult) -> None:
        """Say what the step gave, and go on."""
        if result.deltas:
            noted = [self._held.note(delta) for delta in result.deltas]
            deltas = [values for values in noted if values is not None]
            self._link.say({"say": "deltas", "generation": duty.generation, "deltas": deltas})
            self._held.forget_old()
        self._say_outcomes(duty, result.outcomes)
        self._set_pulse(
            steps=self._num_steps,
            running=len(self._held),
            step_s=statistics.median(self._step_s or [0.0]),
        )

    def _say_outcomes(self, duty: Duty, outcomes: tuple[RebalanceOutcome, ...]) -> None:
        for outcome in outcomes if duty.number == 0 else ():
            self._link.say(duty.tell_outcome(outcome))

    def _note_step(self, has_worked: bool) -> None:
        """Measure what a switch cost, and say when what it ended is gone."""
        now = time.monotonic()
        if self._pause_s < 0 and has_worked and self._stepped_at is not None:
            self._pause_s = now - self._stepped_at
        elif has_worked and self._has_worked and self._stepped_at is not None:
            self._step_s.append(now - self._stepped_at)
        self._stepped_at, self._has_worked = now, has_worked
        if self._retirement is None:
            return
        self._retirement.begin()
        if self._retirement.is_done:
            self._retirement = None
            self._link.say({"say": "retired", "pause_s": max(0.0, self._pause_s)})

    def _obey(self, wait_s: float) -> None:
        """Do all that the controller has said by now; wait so long for a first word."""
        message = self._link.receive(wait_s)
        while message is not None and self._exit_code is None:
            self._orders[message["do"]](message)
            message = self._link.receive(0.0)

    def _begin(self, message: Message) -> None:
        """Join the first generation: everybody reads its own experts from the checkpoint."""
        spec, home, names = self._spec, self._home, tuple(message["names"])
        generation, num_nodes = int(message["generation"]), int(message["num_nodes"])
        group = create_rank_group(
            home.store,
            names.index(self._name),
            len(names),
            home.device,
            generation=generation,
            timeout=home.timeout,
            device_group=message["device_group"],
        )
        try:
            parallel = parallelize(
                spec.model,
                group,
                spec.config,
                placement=self._choose_placement(len(names), num_nodes),
                num_nodes=num_nodes,
                dtype=home.dtype,
                attention=home.attention,
                dispatcher=home.dispatcher,
            )
            parallel = keep_copies(parallel, spec.host_backup)
        except BaseException:
            group.close()
            raise
        self._serve(Duty(generation, names, parallel), "serving")

    def _choose_placement(self, num_ranks: int, num_nodes: int) -> Placement | None:
        """Of the first generation, where the slots of a rank are given."""
        if self._spec.slots_per_rank is None:
            return None
        shape = read_model_shape(self._spec.model)
        num_slots = Redundancy(self._spec.slots_per_rank).choose_slots(shape.num_experts, num_ranks)
        topology = Topology(num_ranks, num_slots, num_nodes)
        return place_in_order(shape.num_layers, shape.num_experts, topology)

    def _serve(
        self, duty: Duty, said: Literal["serving", "switched"], bytes_per_s: float = 0.0
    ) -> None:
        """Serve in a generation from here on."""
        self._duty, self._lost_by = duty, None
        self._link.watch(duty.generation, duty.group.end)
        if self._engine is None:
            self._make_engine(duty.parallel)
        self._find_engine().adopt(duty.parallel)
        # The first round of a generation waits for nobody: others may have work.
        self._is_busy = True
        # Ranks count alike from here on, newcomers too.
        self._num_rebalances = self._num_rebalances_done = 0
        told = {"say": said, "pull_bytes_per_s": bytes_per_s, "parts_s": self._parts.end()}
        self._beginning = told | duty.to_json()
        if not self._is_unsure:
            self._link.say(self._beginning)

    def _make_engine(self, parallel: ParallelModel) -> None:
        """Also of a generation that does not serve yet, on the thread that builds it."""
        limits = EngineLimits(self._spec.max_batch_size, self._spec.max_len, PREFILL_CHUNK)
        self._engine = Engine(parallel, limits, tokenizer=self._tokenizer)

    def _prepare(self, message: Message) -> None:
        """Build the next generation, beside what serves."""
        if self._next is not None:
            # It was called off, by a death of which this rank need not have heard.
            self._next.drop("another change has taken its place")
            self._detour.note(self._next)
        plan = MembershipPlan.from_json(message["plan"])
        home = replace(self._home, device_group=message["device_group"])
        parallel = None if self._duty is None else self._duty.parallel
        try_out = self._make_engine if self._engine is None else None
        if self._lost_by is None:
            self._parts = PartTimes()
        self._next = NextGeneration(plan, home, parallel, self._parts.begin, try_out)

    def _switch(self) -> None:
        """The next generation takes over."""
        assert self._next is not None, "nobody switches to what it has not prepared"
        change, self._next = self._next, None
        self._parts.begin("switch")
        parallel = change.switch()
        self._detour.note(change)
        self._retirement = change.retirement
        self._pause_s = -1.0
        self._step_s.clear()
        # What was paused for has come; without a controller nothing begins.
        self._is_paused = self._held.keeps_all
        if parallel is None:
            self._link.say({"say": "left"})
            self._find_engine().evict()
            self._exit_code = 0
            return
        names = tuple(member.name for member in change.plan.members)
        rate = change.figures.received_bytes / max(change.figures.pull_s, 1e-9)
        self._serve(Duty(change.plan.generation, names, parallel), "switched", rate)

    def _abort(self, message: Message) -> None:
        if self._next is not None:
            self._next.abort(message["reason"])

    def _end_generation(self, message: Message) -> None:
        """Ranks of it were given up; this rank's steps may go well nevertheless."""
        duty, is_lost = self._duty, self._lost_by is not None
        if duty is None or is_lost or duty.generation != message["generation"]:
            return
        raise MembershipError(message["reason"])

    def _forget_next(self, reason: str) -> None:
        """The serving generation goes on; a newcomer has none."""
        if self._next is None:
            return
        self._next.drop(reason)
        self._detour.note(self._next)
        self._link.say(
            {
                "say": "aborted",
                "generation": self._next.plan.generation,
                "reason": self._next.reason or reason,
                "missed": self._next.missed,
            }
        )
        self._next = None
        if self._duty is None:
            self._exit_code = 0

    def _lose(self, duty: Duty, error: TransferError | MembershipError) -> None:
        """A step has failed: it is void, and so is the generation, unless the next one stands."""
        if self._next is not None:
            self._next.drop(f"{self._name}: its step has failed")
            self._next = None
        self._detour = Detour()
        self._parts = PartTimes()
        self._parts.begin("abandon")
        # First: what it still commits, `describe` tells too.
        abandon(duty.parallel)
        self._lost_by = time.monotonic() + self._spec.change_s + 2 * self._spec.timeout_s
        # Of torch's messages the first words are what happened; its source follows.
        reason = str(error).partition(" [/")[0].partition("\n")[0].rstrip(":") or repr(error)
        self._link.say(
            {
                "say": "lost",
                "generation": duty.generation,
                "reason": reason,
                "peer": None if error.peer is None else duty.names[error.peer],
                "serving": duty.describe().to_json(),
            }
        )
        self._parts.begin("register")

    def _ask(self, message: Message) -> None:
        """Say what this rank holds, once no rebalance is under way."""
        del message
        self._is_asked = True

    def _submit(self, message: Message) -> None:
        for given in message["requests"]:
            self._find_engine().submit(self._held.take(given))

    def _cancel(self, message: Message) -> None:
        for request_id in message["ids"]:
            if request_id in self._held:
                self._find_engine().cancel(request_id)

    def _come_back(self, message: Message) -> None:
        """The controller is there again, and all that was said meanwhile has come."""
        self._held.keeps_all = False
        self._is_paused = bool(message["paused"])

    def _set_paused(self, message: Message) -> None:
        self._is_paused = bool(message["paused"])

    def _rebalance(self, message: Message) -> None:
        del message
        self._num_rebalances += 1

    def _stop(self, message: Message) -> None:
        del message
        self._stops = True

    def _leave_alone(self, message: Message) -> None:
        """This rank's controller is gone for good, or has given it up: others may serve on."""
        logger.warning("%s: %s: it ends", self._name, message["do"])
        self._exit_code = 1

    def _go_on_alone(self, message: Message) -> None:
        """The controller has gone: what this rank has is served, and no rebalance begins."""
        del message
        self._is_paused = True
        self._held.keeps_all = True

    def _join_controller(self, message: Message) -> None:
        """Another controller has taken the place of the one that has gone: tell it everything."""
        try:
            store = connect_store(message["store"], self._spec.timeout_s)
        except MembershipError as error:
            # It has gone as well, and the link looks for the next one.
            logger.warning("%s: %s", self._name, error)
            return
        self._home = replace(self._home, store=store)
        self._held.keeps_all = False
        told: Message = {
            "say": "adopted",
            "is_lost": self._lost_by is not None,
            "is_joining": self._next is not None or self._is_unsure,
            "steps": self._num_steps,
            "requests": self._held.to_json(),
        }
        if self._duty is not None and not self._is_unsure:
            told |= {"serving": self._duty.describe().to_json(), **self._duty.to_json()}
        self._link.say(told)

    def _ignore(self, message: Message) -> None:
        """A word that only wakes, or that there is nothing to do about."""

    def _leave(self) -> None:
        """Let go of what is left; never waits for a peer beyond a deadline."""
        if self._exit_code == 0 and self._retirement is not None and self._duty is not None:
            self._retirement.wait(self._spec.timeout_s)
        elif self._duty is not None:
            self._duty.parallel.close()
            self._duty.group.close()
        self._duty = None

    def _find_engine(self) -> Engine:
        if self._engine is None:
            raise MembershipError(f"{self._name}: serves no generation yet")
        return self._engine

    def _do_to_itself(self) -> None:
        how = self._faults.pop(self._num_steps, None)
        if how is not None:
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
