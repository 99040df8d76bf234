"""Every stage of a rebalance in the background, broken on one rank in every way.

What is left raises, or balances no more, within the deadline; it stands at one placement, and its
slots hold what that says. In the tests some of all cases; `EQUIPOISE_FAULTS=1 scripts/test
tests/faults/test_background_faults.py` for every one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import pytest

from equipoise.balancer.handover import AsyncEplbLayerResult
from equipoise.balancer.protocol import Answer, Do, Worker
from equipoise.balancer.rebalance import Rebalance
from equipoise.balancer.worker import EplbWorker
from equipoise.errors import EquipoiseError, MembershipError, TransferError
from equipoise.transfer.mover import ChunkMover
from tests.background import A_LAYER_AT_A_TIME, Outcomes, ServingInBackground
from tests.ranks import Rank, processes
from tests.test_balancer import NUM_EXPERTS, skew

NUM_RANKS = 3
TIMEOUT_S = 1.0
# A worker that hangs in an exchange is given up by the others after three timeouts, and by its own
# forward thread after six; then the store may be asked. The rest is for a busy machine.
DEADLINE_S = 7 * TIMEOUT_S + 13.0
CONNECT_S = 20.0
# A hundred times what an operation takes here, and within the timeout.
SLOW_S = 0.3
LEADER, FOLLOWER = 0, 2

Kind = Literal["kill", "exception", "hang", "slow", "lose the store"]
OnFailure = Literal["raise", "disable"]
IS_FULL = "EQUIPOISE_FAULTS" in os.environ

# What a stage is, in the worker, and whether it breaks before or behind it.
BY_WORKER: dict[str, tuple[Do, bool]] = {
    "request taken": (Do.START, True),
    "windows reduced": (Do.PLAN, True),
    "planned": (Do.PLAN, False),
    "statuses": (Do.MEET, True),
    "offer": (Do.OFFER, True),
    "counts": (Do.COUNT, True),
    "before the word": (Do.DECIDE, True),
    "behind the word": (Do.DECIDE, False),
    "queue": (Do.SETTLE, True),
}
STAGES = (*BY_WORKER, "policy", "exchange", "verify", "commit", "poll")
# Where a store that is lost is noticed.
STORE_STAGES = ("before the word", "behind the word")


class Case(NamedTuple):
    """One fault."""

    stage: str
    kind: Kind
    victim: int
    on_failure: OnFailure

    def __str__(self) -> str:
        role = "leader" if self.victim == LEADER else "follower"
        return f"{self.kind} at {self.stage!r} on the {role}, then {self.on_failure}"


class InjectedError(Exception):
    """What breaks here."""


class Breaker:
    """Breaks this rank, at the second time that it comes to a place.

    Args:
        kind: how.
        note: called just before.
        until: what ends a hang.
    """

    def __init__(self, kind: Kind, note: Callable[[], None], until: Callable[[], object]) -> None:
        self._kind, self._note, self._until = kind, note, until
        self._left = 2

    def come(self) -> None:
        self._left -= 1
        if self._left:
            return
        self._note()
        match self._kind:
            case "kill":
                os._exit(1)
            case "exception":
                raise InjectedError("broken on purpose")
            case "lose the store":
                raise MembershipError("the store does not answer", rank=0)
            case "hang":
                self._until()
            case "slow":
                # Slowness is the fault; nothing is waited for.
                time.sleep(SLOW_S)

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def come_first(*arguments: Any, **options: Any) -> Any:
            self.come()
            return call(*arguments, **options)

        return come_first

    def behind(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def come_last(*arguments: Any, **options: Any) -> Any:
            answer = call(*arguments, **options)
            self.come()
            return answer

        return come_last


class Trial:
    """One case on one rank, in a generation of its own.

    Args:
        rank: this one.
        case: the fault.
        number: of the generation.
    """

    def __init__(self, rank: Rank, case: Case, number: int) -> None:
        self.rank, self.case, self.number = rank, case, number
        self.is_victim = rank.rank == case.victim
        # However busy this machine is, what is slow shall not be broken, nor what is to break
        # before it does; what hangs is waited for, so there the timeout is short.
        patience = {"slow": 10, "hang": 1}.get(case.kind, 3)
        self.timeout_s = patience * TIMEOUT_S
        self.deadline_s = patience * DEADLINE_S
        is_survivor = {
            peer: case.kind != "kill" or peer != case.victim for peer in range(rank.size)
        }
        self.survivors = [peer for peer in range(rank.size) if is_survivor[peer]]
        self.released = threading.Event()
        self.said: list[str] = []

    def run(self) -> None:
        # So that nobody is late already when a deadline begins to count.
        self.tell("begins", "now")
        for peer in range(self.rank.size):
            self.hear_from(peer, "begins")
        # Connecting takes what it takes; the deadline is for what is broken behind it.
        group = self.rank.make_group(generation=self.number, timeout_s=CONNECT_S)
        group.barrier()
        group.timeout = timedelta(seconds=self.timeout_s)
        self.serving = ServingInBackground(
            group,
            window_size=2,
            # At rest when the workers poll.
            step_interval=40 if self.case.stage == "poll" else 2,
            staging_bytes=A_LAYER_AT_A_TIME,
            verify="all",
            on_failure=self.case.on_failure,
        )
        with pytest.MonkeyPatch.context() as patch, hear(self.said):
            if self.is_victim:
                self.break_into(patch)
            self.serving.add()
            ending = self.serve()
            if isinstance(ending, InjectedError):
                with pytest.raises(MembershipError, match="broken on purpose"):
                    self.serving.state.step()
            self.serving.state.close(wait_s=TIMEOUT_S)
            self.released.set()
        self.serving.assert_slots_hold_what_maps_say()
        self.compare_placements(ending)
        self.serving.close()

    def serve(self) -> Exception | None:
        """Serve until the failure is known here, or enough is done; what was raised, if any."""
        state = self.serving.state
        ended = 0
        while state.stats().failure is None and not (self.case.kind == "slow" and ended >= 3):
            try:
                ended += len(self.step())
            except (EquipoiseError, InjectedError) as error:
                self.check_raised(error)
                return error
            assert not self.is_overdue(), "nothing was noticed within the deadline"
        if self.case.kind == "slow":
            state.pause()
            while state.is_rebalancing:
                self.step()
            assert state.stats().failure is None, f"slow is not broken: {state.stats().failure}"
            return None
        assert self.case.on_failure == "disable"
        for _ in range(20):
            assert self.step() == ()
        told = [line for line in self.said if "balancing is off from here on" in line]
        assert len(told) == 1
        return None

    def step(self) -> Outcomes:
        # A forward pass that takes its time, so that the workers get theirs.
        time.sleep(0.001)
        load = skew(self.serving.state.steps % NUM_EXPERTS)
        if self.case.kind == "slow":
            # As dispatch keeps ranks where none fails: otherwise a commit's step, which follows
            # from the count of whoever is ahead, may be seconds away for a rank that lags.
            return self.serving.step(load)
        return self.serving.step_alone(load)

    def check_raised(self, error: Exception) -> None:
        if isinstance(error, InjectedError):
            assert self.is_victim
            assert self.case.stage == "commit", "a worker's error is raised as what it leads to"
            return
        is_cut_off = self.is_victim and self.case.kind == "lose the store"
        assert isinstance(error, MembershipError if is_cut_off else TransferError), repr(error)
        assert is_cut_off or self.case.on_failure == "raise"
        assert not self.is_overdue()

    def compare_placements(self, ending: Exception | None) -> None:
        """All that are left stand at one placement, but for one that does not know."""
        stands = self.serving.maps.placement.fingerprint()
        knows = not isinstance(ending, MembershipError | InjectedError)
        self.tell("stands", stands if knows else "unknown")
        told = {self.hear_from(peer, "stands") for peer in self.survivors}
        assert len(told - {"unknown"}) == 1, f"different placements: {told}"

    def break_into(self, patch: pytest.MonkeyPatch) -> None:
        stage, kind = self.case.stage, self.case.kind
        # The forward thread that hangs can be released by nobody but the others.
        others = [peer for peer in self.survivors if peer != self.rank.rank]
        until: Callable[[], object] = lambda: self.released.wait(3 * self.deadline_s)  # noqa: E731
        if stage == "commit":
            until = lambda: [self.hear_from(peer, "stands") for peer in others]  # noqa: E731
        breaker = Breaker(kind, lambda: self.tell("broken at", str(time.monotonic())), until)
        if kind == "lose the store":
            group = self.serving.state.transfer_group
            ask = (
                breaker.before(group.decide)
                if BY_WORKER[stage][1]
                else breaker.behind(group.decide)
            )
            patch.setattr(group, "decide", ask)
            return
        if stage in BY_WORKER:
            patch.setattr(Rebalance, "_perform", break_worker(breaker, *BY_WORKER[stage]))
            return
        owner, name = {
            "policy": (self.serving.state.policy, "place"),
            "exchange": (self.serving.communicator, "finish"),
            "verify": (ChunkMover, "verify"),
            "commit": (AsyncEplbLayerResult, "commit"),
            "poll": (EplbWorker, "_poll"),
        }[stage]
        patch.setattr(owner, name, breaker.before(getattr(owner, name)))

    def is_overdue(self) -> bool:
        key = self.name("broken at", self.case.victim)
        if not self.rank.store.check([key]):
            return False
        return time.monotonic() > float(self.rank.store.get(key)) + self.deadline_s

    def tell(self, what: str, word: str) -> None:
        self.rank.store.set(self.name(what, self.rank.rank), word)

    def hear_from(self, peer: int, what: str) -> str:
        key = self.name(what, peer)
        self.rank.store.wait([key], timedelta(seconds=2 * self.deadline_s))
        return str(self.rank.store.get(key).decode())

    def name(self, what: str, peer: int) -> str:
        return f"trial {self.number}/{what}/{peer}"


def break_worker(breaker: Breaker, do: Do, is_before: bool) -> Callable[..., Answer]:
    perform = Rebalance._perform

    def broken(rebalance: Rebalance, worker: Worker) -> Answer:
        if worker.do is do and is_before:
            breaker.come()
        answer = perform(rebalance, worker)
        if worker.do is do and not is_before:
            breaker.come()
        return answer

    return broken


@contextmanager
def hear(said: list[str]) -> Iterator[None]:
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("equipoise")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def run_cases(rank: Rank, cases: Sequence[Case]) -> None:
    """Cases one after the other, each in a generation of its own, that leave all ranks alive."""
    for number, case in enumerate(cases):
        began = time.monotonic()
        try:
            Trial(rank, case, number).run()
        except BaseException as error:
            error.add_note(str(case))
            raise
        if rank.rank == 0:
            print(f"{case}: {time.monotonic() - began:.1f} s", flush=True)


def list_cases() -> list[Case]:
    """Every case that ranks survive."""
    kinds: tuple[Kind, ...] = ("exception", "hang", "slow")
    return [
        Case(stage, kind, victim, on_failure)
        for stage in STAGES
        for kind in (*kinds, *(("lose the store",) if stage in STORE_STAGES else ()))
        for victim in (LEADER, FOLLOWER)
        for on_failure in ("raise", "disable")
    ]


def choose(cases: list[Case], stage: str) -> list[Case]:
    """A stage's cases: all, or an exception, and some others by turns."""
    ours = [case for case in cases if case.stage == stage]
    if IS_FULL:
        return ours
    turn = STAGES.index(stage)
    chosen = [case for case in ours if case.kind == "exception"][turn % 4 :: 4]
    other: Kind = "hang" if turn % 3 == 0 else "slow"
    if stage == STORE_STAGES[0]:
        other = "lose the store"
    return chosen + [case for case in ours if case.kind == other][(turn // 3) % 4 :: 4]


@pytest.mark.slow
@pytest.mark.timeout(3600 if IS_FULL else 120)
@pytest.mark.parametrize("stage", STAGES)
@processes(NUM_RANKS, timeout_s=600)
def test_what_breaks_is_known_everywhere_in_time(rank: Rank, stage: str) -> None:
    run_cases(rank, choose(list_cases(), stage))


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("on_failure", ["raise", "disable"])
@pytest.mark.parametrize("stage", STAGES if IS_FULL else ("exchange", "behind the word"))
@processes(NUM_RANKS, dies=(FOLLOWER,))
def test_a_follower_that_dies_is_noticed(rank: Rank, stage: str, on_failure: OnFailure) -> None:
    Trial(rank, Case(stage, "kill", FOLLOWER, on_failure), 0).run()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("on_failure", ["raise", "disable"])
@pytest.mark.parametrize("stage", STAGES if IS_FULL else ("before the word", "commit"))
@processes(NUM_RANKS, dies=(LEADER,))
def test_a_leader_that_dies_is_noticed(rank: Rank, stage: str, on_failure: OnFailure) -> None:
    Trial(rank, Case(stage, "kill", LEADER, on_failure), 0).run()
