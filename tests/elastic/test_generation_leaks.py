"""Many changes in a row leave nothing behind: threads, descriptors, sockets, memory."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest

from equipoise import EPLBConfig
from equipoise.elastic.placing import Redundancy
from tests.elastic.scenario import (
    PATIENCE_S,
    TIMEOUT_S,
    Cast,
    begin,
    change,
    end,
    join_cast,
    join_threads,
)
from tests.ranks import Rank, processes

FEW = 4
NUM_CHANGES = int(os.environ.get("EQUIPOISE_CHANGES", FEW))
WIRES = ("nixl", "torch_gloo") if NUM_CHANGES > FEW else ("nixl",)
SEATS = ((0, 1), (0, 1, 2), (2, 0), (1, 2, 0))
WARM_UP = 5


def count() -> dict[str, int]:
    """What this process holds now."""
    targets = []
    for one in Path("/proc/self/fd").iterdir():
        try:
            targets.append(str(one.readlink()))
        except OSError:
            continue
    return {
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "descriptors": len(targets),
        "sockets": sum(target.startswith("socket:") for target in targets),
    }


def settle_down(cast: Cast) -> None:
    for next_one in cast.retired:
        assert next_one.retirement is None or next_one.retirement.wait(PATIENCE_S)
    cast.retired.clear()
    # They know what they closed up to their last step.
    join_threads()


@pytest.mark.timeout(TIMEOUT_S + 120 + 6 * NUM_CHANGES)
@pytest.mark.parametrize("communicator", WIRES)
@processes(3, timeout_s=TIMEOUT_S + 6.0 * NUM_CHANGES)
def test_changes_leave_nothing_behind(rank: Rank, communicator: str) -> None:
    config = EPLBConfig(window_size=4, communicator=communicator, policy="deepseek")
    cast = join_cast(rank, config, Redundancy())
    begin(cast, SEATS[0])
    held = {}
    before: list[weakref.ref[object]] = []
    for number in range(2, NUM_CHANGES + WARM_UP + 2):
        members = SEATS[(number - 1) % len(SEATS)]
        if cast.parallel is not None:
            parallel = cast.parallel
            held_by = (parallel.state, parallel.spread.sets[0], *parallel.communicators)
            before += [weakref.ref(one) for one in held_by]
            del parallel, held_by
        # What only the collector would free holds a generation's memory until it comes.
        gc.disable()
        assert change(cast, number, members) in ("switched", "away")
        settle_down(cast)
        assert not any(one() for one in before), "something still knows a generation that is over"
        gc.enable()
        # The same seats again, so that as much should be held.
        if rank.rank in members and len(members) == 3:
            held[number] = count()
        if cast.parallel is not None:
            cast.meet(None)
            cast.forward()
    settled = [figures for number, figures in held.items() if number > WARM_UP]
    for what in ("threads", "descriptors", "sockets"):
        most = max(figures[what] for figures in settled)
        assert most <= settled[0][what] + SLACK[what], (what, held)
    end(cast)


SLACK = {"threads": 2, "descriptors": 4, "sockets": 4}
"""What may be closing just then; a leak of one for each change shows within twenty."""
