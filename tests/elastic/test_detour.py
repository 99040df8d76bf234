"""Tokens make way while ranks connect what waits for the device, and come back together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from equipoise import EPLBConfig
from equipoise.comm.groups import RankGroup
from equipoise.dispatch.all_to_all import AllToAllDispatcher
from equipoise.elastic.membership import Deadlines
from equipoise.elastic.placing import Redundancy
from equipoise.errors import MembershipError
from equipoise.topology import Topology
from tests.elastic.scenario import Cast, begin, change, end, join_cast
from tests.ranks import Rank, processes

CONFIG = EPLBConfig(
    window_size=4, step_interval=3, communicator="torch_gloo", policy="deepseek", use_async=False
)


class Careful(AllToAllDispatcher):
    """As one over NCCL: ranks may be connected while no tokens go straight, on any rank."""

    def __init__(self, group: RankGroup, topology: Topology) -> None:
        super().__init__(group, topology)
        self.size, self.goes_straight, self.log = topology.num_ranks, True, list[str]()

    @property
    def prepares_beside(self) -> bool:
        return self.size == 1

    def detour(self, is_on: bool) -> None:
        self.goes_straight = not is_on
        self.log.append("aside" if is_on else "straight")


class BetweenSteps(AllToAllDispatcher):
    """As NIXL-EP 1.4.0: a rank that serves connects others on the thread that serves."""

    fails: ClassVar[bool] = False
    connected: ClassVar[list[bool]] = []

    @property
    def prepares_between_steps(self) -> bool:
        return True

    def prepare(self, hidden_TD: torch.Tensor, slot_TK: torch.Tensor) -> None:  # noqa: N803
        self.connected.append(threading.current_thread() is threading.main_thread())
        if self.fails:
            raise MembershipError("a peer died in the midst of it")
        super().prepare(hidden_TD, slot_TK)


def watch_connecting(cast: Cast, found: list[bool]) -> None:
    """Note, when ranks of the next generation connect, whether this rank's tokens go straight."""
    prepare = Careful.prepare

    def noted(self: Careful, hidden: torch.Tensor, slots: torch.Tensor) -> None:
        if cast.parallel is not None:
            found.extend(one.goes_straight for one in cast.parallel.dispatchers)  # type: ignore[attr-defined]
        prepare(self, hidden, slots)

    Careful.prepare = noted  # type: ignore[method-assign]


def join(rank: Rank) -> tuple[Cast, list[bool]]:
    cast = join_cast(rank, CONFIG, Redundancy(), timeout_s=20.0)
    cast.home = replace(cast.home, dispatcher=Careful)
    found: list[bool] = []
    watch_connecting(cast, found)
    return cast, found


def find_log(cast: Cast) -> list[str]:
    assert cast.parallel is not None
    (dispatcher,) = cast.parallel.dispatchers
    assert isinstance(dispatcher, Careful)
    return dispatcher.log


def step_until(cast: Cast, log: list[str]) -> None:
    """Meet and step until tokens go straight again on this rank, so on all."""
    for _ in range(2000):
        cast.meet(None)
        cast.forward()
        if find_log(cast) == log:
            return
    raise AssertionError(f"{find_log(cast)} did not become {log}")


@pytest.mark.more_faults
@pytest.mark.timeout(260)
@processes(4, timeout_s=140.0)
def test_tokens_make_way_and_come_back_together(rank: Rank) -> None:
    cast, found = join(rank)
    begin(cast, (0, 1, 2))
    # One leaves, one comes: all that serve make way; what is new begins so, and comes back.
    assert change(cast, 2, (0, 1, 3)) == "switched"
    if rank.rank != 3:
        assert found == [False] * len(found)
        assert (len(found) > 0) == (rank.rank != 2), "who leaves connects nothing"
    if cast.parallel is not None:
        assert find_log(cast) == ["aside"]
        step_until(cast, ["aside", "straight"])
        cast.check_placements()
    # Who serves alone waits for nobody, and who will needs no way.
    assert change(cast, 3, (1,)) in ("switched", "away")
    if cast.parallel is not None:
        assert find_log(cast) == []
        cast.forward()
    found.clear()
    assert change(cast, 4, (1, 2)) in ("switched", "away")
    if cast.parallel is not None:
        assert found == ([True] if rank.rank == 1 else [])
        assert find_log(cast) == []
        cast.forward()
    end(cast)


def fail_in(part: str) -> Callable[[str], None]:
    def watch(begins: str) -> None:
        if begins == part:
            raise RuntimeError(f"a fault in {part}")

    return watch


@pytest.mark.more_faults
@pytest.mark.timeout(260)
@processes(3, timeout_s=140.0)
def test_tokens_come_back_from_a_change_that_was_called_off(rank: Rank) -> None:
    cast, _ = join(rank)
    begin(cast, (0, 1))
    watch = fail_in("ready") if rank.rank == 2 else None
    for times in (1, 2):
        assert "a fault in ready" in change(cast, 1 + times, (0, 1, 2), watch=watch)
        if cast.parallel is not None:
            step_until(cast, ["aside", "straight"] * times)
    if cast.parallel is not None:
        cast.check_placements()
    end(cast)


@pytest.mark.timeout(260)
@processes(3, timeout_s=140.0)
def test_who_serves_connects_others_between_two_steps(rank: Rank) -> None:
    cast = join_cast(rank, CONFIG, Redundancy(), timeout_s=20.0)
    cast.home = replace(cast.home, dispatcher=BetweenSteps)
    begin(cast, (0,))
    assert change(cast, 2, (0, 1)) in ("switched", "away")
    assert BetweenSteps.connected == {0: [True], 1: [False], 2: []}[rank.rank]
    # What fails there ends the change, not the generation that serves.
    BetweenSteps.fails = rank.rank == 1
    became = change(cast, 3, (0, 1, 2), deadlines=Deadlines(15.0, 10.0, 5.0))
    assert became.startswith("aborted: ")
    BetweenSteps.fails = False
    assert change(cast, 4, (0, 1, 2)) == "switched"
    cast.check_placements()
    cast.meet(None)
    cast.forward()
    end(cast)
