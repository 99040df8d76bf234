"""Scripts of ranks that come and go: in every generation outputs are those of the plain model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from equipoise import EPLBConfig
from equipoise.elastic.placing import Redundancy
from tests.elastic.scenario import TIMEOUT_S, begin, change, end, join_cast
from tests.ranks import Rank, processes

pytestmark = pytest.mark.timeout(TIMEOUT_S + 120)


@dataclass(frozen=True)
class Script:
    """Sets of ranks, one after the other.

    Attributes:
        name: of the test.
        steps: numbers in the ranks' names, in the order that the generation has.
        redundancy: slots per rank.
        communicator: wire of the experts.
        in_background: whether balancing has a thread of its own.
    """

    name: str
    steps: tuple[tuple[int, ...], ...]
    redundancy: Redundancy
    communicator: str = "torch_gloo"
    in_background: bool = True

    @property
    def num_ranks(self) -> int:
        return 1 + max(rank for step in self.steps for rank in step)


COME_AND_GO = ((0, 1), (0, 1, 2, 3), (0, 2, 3), (0, 3), (0, 3, 2))
SCRIPTS = (
    Script("slots follow, gloo", COME_AND_GO, Redundancy()),
    Script("slots fixed, nixl", COME_AND_GO, Redundancy(slots_per_rank=5), "nixl"),
    Script(
        "from one to five and back, in the foreground",
        ((0,), (0, 1, 2, 3, 4), (3, 1), (1,)),
        Redundancy(num_redundant=4),
        "torch_gloo",
        in_background=False,
    ),
)


@pytest.mark.parametrize(
    ("script", "num_ranks"),
    [pytest.param(script, script.num_ranks, id=script.name) for script in SCRIPTS],
)
@processes(timeout_s=TIMEOUT_S)
def test_ranks_come_and_go(rank: Rank, script: Script, num_ranks: int) -> None:
    config = EPLBConfig(
        window_size=4,
        step_interval=3,
        communicator=script.communicator,
        use_async=script.in_background,
        policy="deepseek",
    )
    cast = join_cast(rank, config, script.redundancy)
    begin(cast, script.steps[0])
    for number, members in enumerate(script.steps, start=1):
        if number > 1:
            assert change(cast, number, members) in ("switched", "away")
        assert (cast.parallel is not None) == (rank.rank in members)
        if cast.parallel is not None:
            cast.check_placements()
            for _ in range(4):
                cast.meet(None)
                cast.forward()
    end(cast)
