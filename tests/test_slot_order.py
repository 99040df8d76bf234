"""What stays on its rank keeps its slot."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.placement import Placement, place_in_order
from equipoise.plan.slot_order import keep_slots
from equipoise.plan.transfer_plan import make_plan
from equipoise.policy import get_policy
from equipoise.topology import Topology
from tests.placements import make_random_placement
from tests.rebalances import with_holes


@pytest.mark.parametrize("seed", range(20))
def test_ranks_hold_the_same_and_nothing_moves_within_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    topology = Topology(int(rng.integers(1, 5)), int(rng.integers(6, 12)))
    num_experts = int(rng.integers(3, 1 + topology.num_slots - topology.num_ranks))
    standing, target = (make_random_placement(rng, 3, num_experts, topology) for _ in range(2))
    if seed % 2:
        standing, target = with_holes(rng, standing), with_holes(rng, target)
    kept = keep_slots(standing, target)
    shape = (3, topology.num_ranks, topology.slots_per_rank)
    old, wanted, got = (p.slot_to_expert.reshape(shape) for p in (standing, target, kept))
    assert np.array_equal(np.sort(got, axis=2), np.sort(wanted, axis=2))
    for before, after in zip(old.reshape(-1, shape[2]), got.reshape(-1, shape[2]), strict=True):
        moved = before != after
        # What leaves a slot has not come to another of the rank more often than it was there.
        for expert in set(after[moved].tolist()):
            assert np.count_nonzero(after == expert) > np.count_nonzero(before == expert)
    assert keep_slots(standing, standing) == standing


def test_a_policy_that_plans_from_nothing_copies_nothing_within_a_rank() -> None:
    topology = Topology(2, 9)
    standing = place_in_order(4, 16, topology)
    load = np.random.default_rng(0).integers(1, 100, (4, 16))
    target: Placement = get_policy("deepseek").place(load, topology, standing=standing)
    plan = make_plan(standing, keep_slots(standing, target))
    assert plan.num_moves == make_plan(standing, target).num_moves
    # A copy within a rank is of an expert that comes, or of a replica more of one that is there.
    assert len(plan.write_slot) < len(make_plan(standing, target).write_slot)
