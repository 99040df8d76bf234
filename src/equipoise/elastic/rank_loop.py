"""A rank's main loop: hear the controller, meet the other ranks, step; over and over."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed.distributed_c10d import Store

from equipoise.balancer import EplbState, RebalanceOutcome
from equipoise.comm.groups import RankGroup, create_rank_group
from equipoise.elastic.channel import Message
from equipoise.elastic.link import ControllerLink
from equipoise.elastic.requests import read_sampling, write_delta
from equipoise.elastic.spec import ServiceSpec
from equipoise.engine.engine import Engine, EngineLimits
from equipoise.engine.figures import StepResult
from equipoise.engine.requests import Request
from equipoise.errors import MembershipError
from equipoise.models.loading import load_tokenizer
from equipoise.models.parallel import ParallelModel, parallelize

LISTEN_S = 1.0
"""Between two looks of a rank that serves no generation yet."""


@dataclass(frozen=True)
class Meeting:
    """What all ranks do next.

    Attributes:
        works: whether any has a request, so that all run a forward pass.
        stops: whether any was told to stop, so that all do.
        is_paused: whether any was told that no rebalance shall begin.
        num_rebalances: most that any was asked for.
    """

    works: bool
    stops: bool
    is_paused: bool
    num_rebalances: int


@dataclass(frozen=True)
class Duty:
    """The generation that a rank serves in.

    Attributes:
        generation: its number.
        number: of this rank in it.
        parallel: the model with its groups, maps and balancer.
    """

    generation: int
    number: int
    parallel: ParallelModel

    @property
    def group(self) -> RankGroup:
        """The ranks of the generation."""
        return self.parallel.state.group


class RankLoop:
    """Serves on one rank. Owner: the forward thread.

    Args:
        name: of the rank.
        spec: of the service.
        device: where its weights are.
        store: the controller's.
        link: to the controller.
        set_pulse: tells what signs of life say from now on.
    """

    def __init__(
        self,
        name: str,
        spec: ServiceSpec,
        device: torch.device,
        store: Store,
        link: ControllerLink,
        set_pulse: Callable[..., None],
    ) -> None:
        self._name, self._spec, self._device = name, spec, device
        self._store, self._link, self._set_pulse = store, link, set_pulse
        self._duty: Duty | None = None
        self._engine: Engine | None = None
        self._attempts: dict[str, int] = {}
        self._num_steps = 0
        self._is_busy = self._is_paused = self._stops = False
        self._exit_code = 0
        self._num_rebalances = self._num_rebalances_done = 0
        self._faults = {fault.step: fault.how for fault in spec.faults if fault.rank == name}
        self._orders: dict[str, Callable[[Message], None]] = {
            "begin": self._begin,
            "submit": self._submit,
            "cancel": self._cancel,
            "evict": self._evict,
            "pause": self._set_paused,
            "rebalance": self._rebalance,
            "stop": self._stop,
            "wake": self._ignore,
            "orphaned": self._ignore,
            "abandoned": self._stop,
        }

    def run(self) -> int:
        """Until the controller says that it is over, or has gone for good.

        Returns:
            The exit code.
        Collective: with the other ranks of each of its generations.
        """
        while self._duty is None and not self._stops:
            self._obey(wait_s=LISTEN_S)
        try:
            while self._duty is not None and self._turn(self._duty, self._find_engine()):
                pass
        finally:
            self._leave()
        return self._exit_code

    def _turn(self, duty: Duty, engine: Engine) -> bool:
        """One round of all ranks; False where it was the last."""
        self._obey(wait_s=0.0 if self._is_busy else self._spec.idle_tick_s)
        meeting = self._meet(duty, engine)
        if meeting.stops:
            return False
        self._is_busy = meeting.works
        self._balance(duty.parallel.state, meeting)
        result = engine.step() if meeting.works else engine.tick()
        self._num_steps += meeting.works
        self._tell(duty, result)
        self._do_to_itself()
        return True

    def _meet(self, duty: Duty, engine: Engine) -> Meeting:
        """What all ranks do next, found out together."""
        mine = torch.tensor(
            [engine.has_work, self._stops, self._is_paused, self._num_rebalances],
            dtype=torch.int64,
        )
        duty.group.all_reduce(mine, "max")
        works, stops, is_paused, num_rebalances = mine.tolist()
        return Meeting(bool(works), bool(stops), bool(is_paused), num_rebalances)

    def _balance(self, state: EplbState, meeting: Meeting) -> None:
        """Follow what was asked of balancing; all ranks at this one step."""
        if meeting.is_paused != state.is_paused:
            (state.pause if meeting.is_paused else state.resume)()
        if meeting.num_rebalances > self._num_rebalances_done:
            self._num_rebalances = self._num_rebalances_done = meeting.num_rebalances
            if not meeting.is_paused:
                state.rearrange()

    def _tell(self, duty: Duty, result: StepResult) -> None:
        """Say what the step gave, and go on."""
        if result.deltas:
            deltas = [
                write_delta(delta, self._attempts[delta.request_id]) for delta in result.deltas
            ]
            self._link.say({"say": "deltas", "generation": duty.generation, "deltas": deltas})
            for delta in result.deltas:
                if delta.finish_reason is not None:
                    del self._attempts[delta.request_id]
        if duty.number == 0:
            for outcome in result.outcomes:
                self._link.say(_write_outcome(duty, outcome))
        self._set_pulse(
            steps=self._num_steps,
            running=len(self._attempts),
            generation=duty.generation,
        )

    def _obey(self, wait_s: float) -> None:
        """Do all that the controller has said by now; wait so long for a first word."""
        message = self._link.receive(wait_s)
        while message is not None:
            self._orders[message["do"]](message)
            message = self._link.receive(0.0)

    def _begin(self, message: Message) -> None:
        """Join the first generation: everybody reads its own experts from the checkpoint."""
        spec, number = self._spec, int(message["number"])
        group = create_rank_group(
            self._store,
            number,
            len(message["names"]),
            self._device,
            generation=int(message["generation"]),
            timeout=timedelta(seconds=spec.timeout_s),
            device_group=message["device_group"],
        )
        try:
            parallel = parallelize(
                spec.model,
                group,
                spec.config,
                dtype=getattr(torch, spec.dtype),
                attention="sdpa",
            )
        except BaseException:
            group.close()
            raise
        self._duty = Duty(int(message["generation"]), number, parallel)
        self._engine = self._make_engine(parallel)
        self._say_serving(self._duty)

    def _say_serving(self, duty: Duty) -> None:
        sets = duty.parallel.spread.sets
        self._link.say(
            {
                "say": "serving",
                "generation": duty.generation,
                "number": duty.number,
                "placements": [json.loads(one.maps.placement.to_json()) for one in sets],
            }
        )

    def _submit(self, message: Message) -> None:
        engine = self._find_engine()
        for given in message["requests"]:
            self._attempts[given["id"]] = given["attempt"]
            engine.submit(
                Request(
                    given["id"],
                    tuple(given["tokens"]),
                    read_sampling(given["sampling"]),
                    list(given["generated"]),
                )
            )

    def _cancel(self, message: Message) -> None:
        for request_id in message["ids"]:
            if request_id in self._attempts:
                self._find_engine().cancel(request_id)

    def _evict(self, message: Message) -> None:
        """Let all requests go: the controller gives them to others."""
        del message
        self._find_engine().evict()
        self._attempts.clear()

    def _set_paused(self, message: Message) -> None:
        self._is_paused = bool(message["paused"])

    def _rebalance(self, message: Message) -> None:
        del message
        self._num_rebalances += 1

    def _stop(self, message: Message) -> None:
        self._stops = True
        self._exit_code = 0 if message["do"] == "stop" else 1

    def _ignore(self, message: Message) -> None:
        """A word that only wakes, or that there is nothing to do about."""

    def _leave(self) -> None:
        """Let go of the generation; never waits for a peer beyond a deadline."""
        if self._duty is not None:
            duty, self._duty = self._duty, None
            duty.parallel.close()
            duty.group.close()

    def _make_engine(self, parallel: ParallelModel) -> Engine:
        limits = EngineLimits(self._spec.max_batch_size, self._spec.max_len)
        return Engine(parallel, limits, tokenizer=load_tokenizer(self._spec.model))

    def _find_engine(self) -> Engine:
        if self._engine is None:
            raise MembershipError(f"{self._name}: serves no generation yet")
        return self._engine

    def _do_to_itself(self) -> None:
        how = self._faults.pop(self._num_steps, None)
        if how is not None:
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


def _write_outcome(duty: Duty, outcome: RebalanceOutcome) -> Message:
    return {
        "say": "rebalanced",
        "generation": duty.generation,
        "moves": int(outcome.moves),
        "balancedness": float(outcome.balancedness_after.mean()),
        "placements": [
            json.loads(one.maps.placement.to_json()) for one in duty.parallel.spread.sets
        ],
    }
