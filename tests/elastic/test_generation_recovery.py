"""Ranks die; the others form the next generation from what they hold and the checkpoint."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from datetime import timedelta

import pytest
import torch

from equipoise import EPLBConfig
from equipoise.elastic.generation import NextGeneration
from equipoise.elastic.membership import Deadlines, Serving
from equipoise.elastic.placing import Redundancy
from equipoise.elastic.planning import describe, plan_recovery
from equipoise.elastic.recovery import abandon
from equipoise.errors import MembershipError, TransferError
from tests.elastic.scenario import PATIENCE_S, TIMEOUT_S, Cast, begin, change, end, join_cast
from tests.ranks import Rank, processes

pytestmark = pytest.mark.timeout(TIMEOUT_S + 120)

CONFIG = EPLBConfig(window_size=4, step_interval=3, communicator="torch_gloo", policy="deepseek")


def serve_until_it_fails(cast: Cast) -> str:
    """Serve until a death ends it; what was said."""
    assert cast.parallel is not None
    try:
        while True:
            cast.meet(None)
            cast.forward()
    except (MembershipError, TransferError) as error:
        abandon(cast.parallel)
        return str(error)


def recover(cast: Cast, number: int, survivors: Sequence[int], attempt: int = 0) -> str:
    """Survivors tell what they hold, and go on in the next generation."""
    assert cast.parallel is not None
    if cast.parallel.state.group.generation < number and attempt == 0:
        mine = describe(cast.parallel, cast.names, only=cast.name)
        cast.rank.store.set(f"in/{number}/{cast.name}", json.dumps(mine.to_json()))
    keys = [f"in/{number}/rank-{one}" for one in survivors]
    cast.rank.store.wait(keys, timedelta(seconds=PATIENCE_S))
    parts = [Serving.from_json(json.loads(cast.rank.store.get(key))) for key in keys]
    plan = plan_recovery(
        Serving.join(parts),
        number + attempt,
        cast.redundancy,
        Deadlines(20.0, 5.0, 5.0),
        backup=cast.backup,
    )
    serving = cast.parallel
    next_one = NextGeneration(plan, cast.home, serving)
    state = next_one.wait(PATIENCE_S)
    if state != "decided":
        next_one.drop("called off")
        assert next_one.wait_closed(PATIENCE_S)
        return f"aborted: {next_one.reason}"
    cast.parallel = next_one.switch()
    cast.retired.append(next_one)
    cast.names = tuple(f"rank-{one}" for one in survivors)
    return "switched"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@processes(4, dies=[1, 2], timeout_s=TIMEOUT_S)
def test_survivors_go_on_with_what_they_hold_and_the_checkpoint(rank: Rank) -> None:
    cast = join_cast(rank, CONFIG, Redundancy(), timeout_s=10.0)
    begin(cast, (0, 1, 2, 3))
    for _ in range(5):
        cast.meet(None)
        cast.forward()
    if rank.rank == 2:
        die()
    serve_until_it_fails(cast)
    assert recover(cast, 2, (0, 1, 3)) == "switched"
    cast.check_placements()
    for _ in range(4):
        cast.meet(None)
        cast.forward()
    if rank.rank == 1:
        die()
    serve_until_it_fails(cast)
    assert recover(cast, 3, (0, 3)) == "switched"
    cast.check_placements()
    cast.meet(None)
    cast.forward()
    end(cast)


@processes(4, dies=[1, 2], timeout_s=TIMEOUT_S)
def test_experts_come_back_from_host_memory_again_and_again(rank: Rank) -> None:
    config = CONFIG.model_copy(update={"step_interval": 1000})
    cast = join_cast(rank, config, Redundancy(), timeout_s=10.0)
    cast.backup = "unreplicated"
    begin(cast, (0, 1, 2, 3))
    for number, victim, survivors in ((2, 2, (0, 1, 3)), (3, 1, (0, 3))):
        cast.meet(None)
        cast.forward()
        if rank.rank == victim:
            die()
        serve_until_it_fails(cast)
        assert recover(cast, number, survivors) == "switched"
        cast.check_placements()
        assert cast.retired[-1].figures.restored == 0
    assert cast.parallel is not None
    copies = cast.parallel.copies
    assert bool(copies) == (cast.parallel.spread.maps.placement.replica_counts.min() < 2)
    for key in copies:
        layer = cast.parallel.spread.sets[key.set].layers[key.layer]
        for name, kept in zip(layer.tensors, copies[key], strict=True):
            whole = cast.plain.get_submodule(layer.name).get_parameter(name)
            assert torch.equal(kept, whole[key.expert])
    cast.forward()
    end(cast)


@processes(3, dies=[2], timeout_s=TIMEOUT_S)
def test_too_few_slots_are_said_to_be_so(rank: Rank) -> None:
    cast = join_cast(rank, CONFIG, Redundancy(slots_per_rank=3), timeout_s=10.0)
    begin(cast, (0, 1, 2))
    cast.meet(None)
    cast.forward()
    if rank.rank == 2:
        die()
    serve_until_it_fails(cast)
    with pytest.raises(MembershipError, match="2 ranks of 3 slots cannot hold 8 experts: at least"):
        recover(cast, 2, (0, 1))
    end_alone(cast)


@pytest.mark.more_faults
@processes(4, dies=[1, 2], timeout_s=TIMEOUT_S)
def test_a_second_death_during_a_recovery_leads_to_another(rank: Rank) -> None:
    # Nothing moves, so that experts 4 to 7 are with the two that die.
    config = CONFIG.model_copy(update={"step_interval": 1000})
    cast = join_cast(rank, config, Redundancy(), timeout_s=5.0)
    begin(cast, (0, 1, 2, 3))
    cast.meet(None)
    cast.forward()
    if rank.rank == 2:
        die()
    serve_until_it_fails(cast)
    if rank.rank == 1:
        # It is thought to be alive: the others plan with it.
        mine = describe(cast.parallel, cast.names, only=cast.name)
        rank.store.set(f"in/2/{cast.name}", json.dumps(mine.to_json()))
        die()
    assert recover(cast, 2, (0, 1, 3)).startswith("aborted: ")
    assert recover(cast, 2, (0, 3), attempt=1) == "switched"
    assert cast.retired[-1].figures.restored > 0
    cast.check_placements()
    cast.meet(None)
    cast.forward()
    assert change(cast, 9, (3,)) == "switched"
    if cast.parallel is not None:
        cast.forward()
    end(cast)


def end_alone(cast: Cast) -> None:
    assert cast.parallel is not None
    cast.parallel.close()
    cast.parallel.state.group.close()


@pytest.mark.more_faults
@processes(4, dies=[0], timeout_s=TIMEOUT_S)
def test_a_rank_that_would_stay_dies_in_the_midst_of_a_change(rank: Rank) -> None:
    change_with_a_death(rank, 0, "pull")


@processes(4, dies=[2], timeout_s=TIMEOUT_S)
def test_a_rank_that_would_leave_dies_in_the_midst_of_a_change(rank: Rank) -> None:
    change_with_a_death(rank, 2, "ready")


def change_with_a_death(rank: Rank, victim: int, part: str) -> None:
    """From 0, 1, 2 to 0, 1, 3: the change is off, and the others of 0, 1, 2 recover."""
    cast = join_cast(rank, CONFIG, Redundancy(), timeout_s=10.0)
    begin(cast, (0, 1, 2))

    def dies(begins: str) -> None:
        if begins == part and rank.rank == victim:
            die()

    lost = False
    try:
        became = change(cast, 2, (0, 1, 3), watch=dies, deadlines=Deadlines(20.0, 10.0, 5.0))
        assert became.startswith("aborted: ")
    except (MembershipError, TransferError):
        lost = True
    if cast.parallel is None:
        return
    if lost:
        abandon(cast.parallel)
    else:
        serve_until_it_fails(cast)
    assert recover(cast, 3, [one for one in (0, 1, 2) if one != victim]) == "switched"
    cast.check_placements()
    cast.meet(None)
    cast.forward()
    end(cast)
