"""Replicas that take turns, and the kernel that chooses and counts in one launch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise.dispatch.maps import PlacementMaps
from equipoise.dispatch.replicas import choose_slots
from equipoise.dispatch.turns import NearestReplicas, SharedReplicas
from equipoise.errors import ConfigError
from equipoise.load.recorder import LoadRecorder
from equipoise.placement import Placement
from equipoise.topology import Topology
from tests.placements import make_random_placement

CPU = torch.device("cpu")
# Expert 0 is on ranks 0, 1 and 3, expert 1 on 2 and 3; node 0 has ranks 0 and 1.
PLACEMENT = Placement(np.array([[0, 2, 0, 3, 1, 4, 0, 1]]), 5, Topology(4, 2, 2))


def choose(maps: PlacementMaps, expert: int, num_tokens: int = 8) -> list[int]:
    return choose_slots(maps, 0, torch.full((num_tokens, 1), expert)).flatten().tolist()


@pytest.mark.parametrize(("rank", "slots"), [(0, [0, 0]), (1, [2, 2]), (2, [6, 6]), (3, [6, 6])])
def test_nearest_is_own_rank_then_own_node(rank: int, slots: list[int]) -> None:
    maps = PlacementMaps(PLACEMENT, CPU, NearestReplicas(rank))
    assert choose(maps, 0, 2) == slots


def test_nearest_takes_turns_where_several_are_as_near() -> None:
    elsewhere = PlacementMaps(PLACEMENT, CPU, NearestReplicas(0))
    assert choose(elsewhere, 1, 4) == [4, 7, 4, 7]
    assert choose(elsewhere, 4, 2) == [5, 5]


def test_shares_are_met_and_dealt_evenly() -> None:
    maps = PlacementMaps(PLACEMENT, CPU, SharedReplicas((2.0, 1.0, 1.0, 1.0), num_turns=16))
    assert choose(maps, 0, 16).count(0) == 8
    for first in range(12):
        assert 1 <= choose(maps, 0, 16)[first : first + 4].count(0) <= 3
    assert choose(maps, 1, 4) == [4, 7, 4, 7]


def test_a_rank_without_a_share_gets_nothing_that_another_can_take() -> None:
    maps = PlacementMaps(PLACEMENT, CPU, SharedReplicas((0.0, 1.0, 0.0, 0.0)))
    assert set(choose(maps, 0, 40)) == {2}
    assert set(choose(maps, 1, 40)) == {4, 7}
    assert set(choose(maps, 2, 40)) == {1}


def test_shares_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 0, not all 0"):
        SharedReplicas((0.0, 0.0))
    with pytest.raises(ConfigError, match="3 shares were given for a placement on 4 ranks"):
        PlacementMaps(PLACEMENT, CPU, SharedReplicas((1.0, 1.0, 1.0)))
    with pytest.raises(ConfigError, match="rank 4 is not of a placement on 4"):
        PlacementMaps(PLACEMENT, CPU, NearestReplicas(4))


@pytest.mark.parametrize("choice", [NearestReplicas(1), SharedReplicas((3.0, 1.0, 2.0))])
def test_turns_follow_a_commit_in_place(choice: NearestReplicas | SharedReplicas) -> None:
    random = np.random.default_rng(0)
    first, second = (make_random_placement(random, 3, 10, Topology(3, 5)) for _ in range(2))
    maps, fresh = PlacementMaps(first, CPU, choice), PlacementMaps(second, CPU, choice)
    turns = maps.turns
    maps.commit(second, [0, 2])
    assert maps.turns is turns
    experts = torch.randint(10, (200, 3), generator=torch.Generator().manual_seed(0))
    for layer in (0, 2):
        assert torch.equal(choose_slots(maps, layer, experts), choose_slots(fresh, layer, experts))
    slots = choose_slots(maps, 1, experts)
    assert torch.equal(torch.tensor(first.slot_to_expert)[1][slots], experts)


def test_the_kernel_is_refused_without_a_gpu() -> None:
    maps, recorder = PlacementMaps(PLACEMENT, CPU), LoadRecorder(1, 8, CPU)
    with pytest.raises(ConfigError, match="needs a GPU, and its counts are on cpu"):
        recorder.choose_and_record(
            0, torch.zeros(1, 1, dtype=torch.int64), maps.turns[0], maps.num_turns[0]
        )
