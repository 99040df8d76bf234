"""Faults in every part of a change, on every role: the old generation serves on, or the next."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from equipoise import EPLBConfig
from equipoise.comm.store_client import clone_store
from equipoise.elastic import bridge
from equipoise.elastic.generation import PARTS
from equipoise.elastic.membership import Deadlines
from equipoise.elastic.placing import Redundancy
from equipoise.errors import MembershipError
from tests.elastic.scenario import (
    PATIENCE_S,
    TIMEOUT_S,
    begin,
    change,
    end,
    join_cast,
    join_threads,
)
from tests.ranks import Rank, processes

pytestmark = pytest.mark.timeout(TIMEOUT_S + 120)

CONFIG = EPLBConfig(
    window_size=4, step_interval=3, communicator="torch_gloo", policy="deepseek", use_async=False
)
ROLES = {"survivor": 0, "leaver": 2, "newcomer": 3}
"""In a change from 0, 1, 2 to 0, 1, 3."""


def fail_in(part: str) -> Callable[[str], None]:
    def watch(begins: str) -> None:
        if begins == part:
            raise RuntimeError(f"a fault in {part}")

    return watch


@pytest.mark.parametrize(
    "communicator", [pytest.param("torch_gloo", marks=pytest.mark.more_faults), "nixl"]
)
@processes(4, timeout_s=TIMEOUT_S)
def test_what_fails_before_the_decision_leaves_the_old_generation_serving(
    rank: Rank, communicator: str
) -> None:
    config = CONFIG.model_copy(update={"communicator": communicator})
    cast = join_cast(rank, config, Redundancy(), timeout_s=10.0)
    begin(cast, (0, 1, 2))
    before = cast.parallel
    number = 1
    for role, who in ROLES.items():
        for part in PARTS[:-1]:
            if (role == "leaver" and part in ("assemble", "rehearse")) or (
                communicator == "nixl" and part != "pull"
            ):
                continue
            number += 1
            watch = fail_in(part) if rank.rank == who else None
            became = change(cast, number, (0, 1, 3), watch=watch)
            assert became.startswith("aborted: "), (role, part, became)
            if communicator == "torch_gloo":
                assert f"rank-{who}: a fault in {part}" in became
            assert cast.parallel is before
            if cast.parallel is not None:
                cast.check_placements()
                cast.meet(None)
                cast.forward()
    assert change(cast, number + 1, (0, 1, 3)) == "switched"
    if cast.parallel is not None:
        cast.check_placements()
        cast.meet(None)
        cast.forward()
    end(cast)
    join_threads()


@processes(4, dies=[2, 3], timeout_s=TIMEOUT_S)
def test_a_newcomer_that_dies_ends_the_change_alone(rank: Rank) -> None:
    cast = join_cast(rank, CONFIG, Redundancy(), timeout_s=10.0)
    begin(cast, (0, 1))

    def die(begins: str) -> None:
        if begins == {2: "pull", 3: "ready"}[rank.rank]:
            os.kill(os.getpid(), signal.SIGKILL)

    for number, newcomer in ((2, 2), (3, 3)):
        if rank.rank in (0, 1, newcomer):
            watch = die if rank.rank == newcomer else None
            became = change(
                cast, number, (0, 1, newcomer), watch=watch, deadlines=Deadlines(8.0, 10.0, 4.0)
            )
            assert became.startswith("aborted: ")
            cast.check_placements()
    assert change(cast, 4, (1, 0)) == "switched"
    cast.check_placements()
    cast.forward()
    end(cast)


@processes(3, timeout_s=TIMEOUT_S)
def test_a_newcomer_that_hangs_is_given_up_and_notices_when_it_wakes(rank: Rank) -> None:
    cast = join_cast(rank, CONFIG, Redundancy(), timeout_s=20.0)
    begin(cast, (0, 1))

    def hang(begins: str) -> None:
        if begins == "ready":
            rank.store.wait(["wake"], timedelta(seconds=PATIENCE_S))

    watch = hang if rank.rank == 2 else None
    # Long enough for the others to get there, also on a busy machine.
    became = change(cast, 2, (0, 1, 2), watch=watch, deadlines=Deadlines(10.0, 20.0, 4.0))
    assert became.startswith("aborted: ")
    if cast.parallel is not None:
        assert "rank-2 did not get so far in time" in became
        cast.forward()
        rank.store.set("wake", "yes")
    assert change(cast, 3, (0, 1, 2)) == "switched"
    cast.check_placements()
    end(cast)


def keep_store(rank: Rank, name: str) -> None:
    """The controller's part: it has the store, until all others are as far as that."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rank.store.set("port", str(server.port))
    rank.store.wait([f"{number}/{name}" for number in range(3)], timedelta(seconds=PATIENCE_S))
    os.kill(os.getpid(), signal.SIGKILL)


def join_store(rank: Rank) -> TCPStore:
    rank.store.wait(["port"], timedelta(seconds=PATIENCE_S))
    port = int(rank.store.get("port"))
    return TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=4))


def wait_gone(store: TCPStore) -> None:
    """Until its process is; the store of the test is another."""
    with contextlib.suppress(RuntimeError):
        while True:
            clone_store(store).check(["any"])


@pytest.mark.more_faults
@processes(4, dies=[3], timeout_s=TIMEOUT_S)
def test_a_store_that_goes_leaves_the_old_generation_serving(rank: Rank) -> None:
    cast = join_cast(rank, CONFIG, Redundancy(), timeout_s=20.0)
    if rank.rank == 3:
        keep_store(rank, "ready")
    store = join_store(rank)
    begin(cast, (0, 1))
    object.__setattr__(cast.home, "store", store)

    def watch(begins: str) -> None:
        if begins == "ready":
            rank.store.set(f"{rank.rank}/ready", "here")
            wait_gone(store)

    started = time.monotonic()
    became = change(cast, 2, (0, 1, 2), watch=watch, deadlines=Deadlines(40.0, 40.0, 4.0))
    assert cast.parallel is not None
    if rank.rank == 2:
        # It has promised to switch, and finds out by the others, who hang up.
        assert became == "unsure"
        with pytest.raises(MembershipError):
            cast.meet(None)
        cast.parallel.close()
        cast.parallel.state.group.close()
    else:
        assert became.startswith("aborted: ")
        cast.check_placements()
        cast.meet(None)
        cast.forward()
        end(cast)
    assert time.monotonic() - started < 40.0


@pytest.mark.more_faults
@processes(4, dies=[3], timeout_s=TIMEOUT_S)
def test_a_newcomer_that_cannot_ask_what_was_decided_goes_with_the_others(rank: Rank) -> None:
    cast = join_cast(rank, CONFIG, Redundancy(), timeout_s=20.0)
    if rank.rank == 3:
        keep_store(rank, "past")
    store = join_store(rank)
    begin(cast, (0, 1))
    object.__setattr__(cast.home, "store", store)

    def watch(begins: str) -> None:
        if begins == "decide" and rank.rank == 2:
            rank.store.set("2/past", "yes")
            wait_gone(store)

    became = change(cast, 2, (0, 1, 2), watch=watch, deadlines=Deadlines(40.0, 40.0, 4.0))
    assert became == ("unsure" if rank.rank == 2 else "switched")
    if rank.rank != 2:
        rank.store.set(f"{rank.rank}/past", "yes")
    cast.check_placements()
    cast.meet(None)
    cast.forward()
    end(cast)


@processes(4, timeout_s=TIMEOUT_S)
def test_what_fails_at_the_decision_ends_alike_everywhere(rank: Rank) -> None:
    cast = join_cast(rank, CONFIG, Redundancy(), timeout_s=20.0)
    begin(cast, (0, 1, 2))
    watch = fail_in("decide") if rank.rank == 1 else None
    became = change(cast, 2, (0, 1, 3), watch=watch)
    rank.store.set(f"became/{rank.rank}", became.partition(":")[0])
    everybody = [f"became/{number}" for number in range(4)]
    rank.store.wait(everybody, timedelta(seconds=PATIENCE_S))
    assert len({rank.store.get(key) for key in everybody}) == 1
    if cast.parallel is not None:
        cast.check_placements()
        cast.meet(None)
        cast.forward()
    end(cast)


@processes(3, timeout_s=TIMEOUT_S)
def test_an_expert_that_arrives_damaged_ends_the_change(rank: Rank) -> None:
    config = CONFIG.model_copy(update={"verify": "all"})
    cast = join_cast(rank, config, Redundancy(), timeout_s=20.0)
    begin(cast, (0, 1))
    whole = bridge._sum

    def damage(begins: str) -> None:
        if begins == "verify":
            bridge._sum = lambda tensors: whole(tensors) + 1

    became = change(cast, 2, (0, 1, 2), watch=damage if rank.rank == 2 else None)
    assert "rank-2: layer 0, expert" in became
    assert "arrived damaged" in became
    bridge._sum = whole
    assert change(cast, 3, (0, 1, 2)) == "switched"
    cast.check_placements()
    end(cast)
