from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import PlacementError
from equipoise.placement import (
    Placement,
    measure_balancedness,
    place_in_order,
    spread_load,
)
from equipoise.topology import Topology, choose_num_redundant
from tests.placements import placement_pairs, topologies

PLACEMENT = Placement(np.array([[0, 1, 2, -1, 2, 0], [2, 2, 1, 0, -1, -1]]), 3, Topology(2, 3))


# Topology


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((0, 1, 1), "num_ranks must be at least 1, got 0"),
        ((2, -1, 1), "slots_per_rank must be at least 1, got -1"),
        ((2, 1, 0), "num_nodes must be at least 1, got 0"),
        ((4, 1, 3), "4 ranks cannot be spread evenly over 3 nodes"),
    ],
)
def test_topologies_that_cannot_be_are_refused(counts: tuple[int, int, int], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        Topology(*counts)


@given(topologies())
def test_slots_ranks_and_nodes_count_alike(topology: Topology) -> None:
    assert topology.ranks_per_node * topology.num_nodes == topology.num_ranks
    slot = 0
    for node in range(topology.num_nodes):
        for _ in range(topology.ranks_per_node):
            for _ in range(topology.slots_per_rank):
                rank = topology.rank_of_slot(np.array([[slot]]))
                assert rank.tolist() == [[slot // topology.slots_per_rank]]
                assert topology.node_of_rank(rank).tolist() == [[node]]
                slot += 1
    assert slot == topology.num_slots
    assert topology.rank_of_slot(np.array([-1])).tolist() == [-1]


@given(st.integers(1, 300), st.integers(1, 64))
def test_redundant_slots_by_default_are_the_fewest_that_spare_one_per_rank(
    num_experts: int, num_ranks: int
) -> None:
    chosen = choose_num_redundant(num_experts, num_ranks, None)
    fits = [n for n in range(num_ranks, 3 * num_ranks) if (num_experts + n) % num_ranks == 0]
    assert chosen == fits[0]
    assert choose_num_redundant(num_experts, num_ranks, chosen) == chosen


def test_redundant_slots_that_do_not_divide_are_refused_with_what_would() -> None:
    assert choose_num_redundant(32, 4, 0) == 0
    with pytest.raises(PlacementError, match="must be 0 or more, got -1"):
        choose_num_redundant(32, 4, -1)
    with pytest.raises(
        PlacementError, match="make 35 slots, which 4 ranks do not divide: ask for 0, 4 or 8"
    ):
        choose_num_redundant(32, 4, 3)
    with pytest.raises(PlacementError, match="ask for 3, 8 or 13"):
        choose_num_redundant(32, 5, 4)


# Placement


@pytest.mark.parametrize(
    ("table", "num_experts", "message"),
    [
        ([0, 1, 2, 3], 4, r"must be \[layers, slots\], got \[4\]"),
        (np.empty((0, 4), dtype=int), 4, r"must be \[layers, slots\], got \[0, 4\]"),
        ([[0, 1, 2]], 3, "has 3 slots per layer, but 2 ranks of 2 slots make 4"),
        ([[0, 1, 2, 0]], 0, "num_experts must be at least 1, got 0"),
        ([[0, 1, 2, 3]], 5, "4 slots cannot hold 5 experts on 2 ranks: ask for at least 3"),
        ([[0, 1, 0, 1], [0, 2, 1, 0]], 2, "layer 1, slot 1 holds expert 2: .* 0 to 1"),
        ([[0, 1, -2, 1]], 2, "layer 0, slot 2 holds expert -2"),
        ([[0, 1, 2, -1], [0, 1, 1, -1]], 3, "layer 1: expert 2 has no slot"),
        ([[-1, -1, -1, -1]], 1, "layer 0: expert 0 has no slot"),
        ([[0, 1, 1.5, 1]], 2, "whole numbers"),
        ([[0, 1, float("nan"), 1]], 2, "whole numbers"),
        ([["a", "b", "c", "d"]], 2, "whole numbers"),
        ([[0, 1, 2], [0, 1]], 2, "whole numbers"),
        (np.array([[0, 1, 2**64 - 1, 1]], dtype=np.uint64), 2, "whole numbers"),
    ],
)
def test_placements_that_cannot_be_are_refused(
    table: object, num_experts: int, message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement(table, num_experts, Topology(2, 2))  # type: ignore[arg-type]


def test_a_placement_keeps_a_copy_that_nobody_can_write() -> None:
    table = np.array([[0, 1, 0]])
    placement = Placement(table, 2, Topology(3, 1))
    table[0, 0] = 1
    assert placement.slot_to_expert.tolist() == [[0, 1, 0]]
    for array in (placement.slot_to_expert, placement.replica_counts, placement.expert_to_slots):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1


def test_counts_and_inverse_of_a_small_placement() -> None:
    assert (PLACEMENT.num_layers, PLACEMENT.num_slots, PLACEMENT.max_replicas) == (2, 6, 4)
    assert PLACEMENT.replica_counts.tolist() == [[2, 1, 2], [1, 1, 2]]
    assert PLACEMENT.expert_to_slots.tolist() == [
        [[0, 5, -1, -1], [1, -1, -1, -1], [2, 4, -1, -1]],
        [[3, -1, -1, -1], [2, -1, -1, -1], [0, 1, -1, -1]],
    ]
    assert PLACEMENT.num_wasted() == 1


@given(placement_pairs())
@settings(max_examples=100)
def test_both_maps_say_the_same(pair: tuple[Placement, Placement]) -> None:
    placement, _ = pair
    wasted = 0
    for layer, slots in enumerate(placement.slot_to_expert.tolist()):
        for expert in range(placement.num_experts):
            held = [slot for slot, other in enumerate(slots) if other == expert]
            inverse = placement.expert_to_slots[layer, expert].tolist()
            assert inverse == held + [-1] * (placement.max_replicas - len(held))
            assert placement.replica_counts[layer, expert] == len(held)
            wasted += len(held) - len({s // placement.topology.slots_per_rank for s in held})
    assert placement.num_wasted() == wasted
    assert placement.expert_to_slots.dtype == placement.replica_counts.dtype == np.int64


@given(placement_pairs())
@settings(max_examples=50)
def test_equality_hash_and_fingerprint_agree(pair: tuple[Placement, Placement]) -> None:
    one, other = pair
    same = one.slot_to_expert.tolist() == other.slot_to_expert.tolist()
    assert (one == other) == same == (one.fingerprint() == other.fingerprint())
    copy = Placement(one.slot_to_expert.astype(np.int32), one.num_experts, one.topology)
    assert copy == one
    assert hash(copy) == hash(one)
    assert copy.fingerprint() == one.fingerprint()


def test_shape_is_part_of_what_a_placement_is() -> None:
    table = [[0, 1, 0, 1]]
    placements = [
        Placement(np.array(table), 2, topology)
        for topology in (Topology(2, 2), Topology(4, 1), Topology(2, 2, 2))
    ]
    assert len({p.fingerprint() for p in placements}) == len(set(placements)) == 3
    assert placements[0] != "a placement"


def test_in_order_goes_round() -> None:
    placement = place_in_order(2, 3, Topology(2, 4))
    assert placement.slot_to_expert.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]] * 2
    with pytest.raises(PlacementError, match="2 slots cannot hold 3 experts"):
        place_in_order(2, 3, Topology(2, 1))


# JSON


@given(placement_pairs())
@settings(max_examples=30)
def test_json_round_trip(pair: tuple[Placement, Placement]) -> None:
    assert Placement.from_json(pair[0].to_json()) == pair[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "a placement is a JSON object with a format_version"),
        (PLACEMENT.to_json().replace('"format_version": 1', '"format_version": 9'), "is 9, .* 1"),
        (PLACEMENT.to_json().replace('"num_experts": 3', '"num_experts": true'), "num_experts"),
        (PLACEMENT.to_json().replace('"num_nodes"', '"num_hosts"'), "num_nodes must be .* None"),
        (PLACEMENT.to_json().replace('"slot_to_expert"', '"slots"'), "slot_to_expert must be"),
        (PLACEMENT.to_json().replace("[[0, 1,", '[["0", 1,'), "slot_to_expert must be"),
        (PLACEMENT.to_json().replace("[[0, 1,", "[[0.5, 1,"), "slot_to_expert must be"),
        (PLACEMENT.to_json().replace("[[0, 1,", "[[1,"), "slot_to_expert must be"),
        (PLACEMENT.to_json().replace("[[0, 1,", f"[[{10**30}, 1,"), "slot_to_expert must be"),
    ],
)
def test_json_that_is_no_placement_is_refused_by_key(text: str, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement.from_json(text)


# Load on ranks


@given(placement_pairs(), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_load_is_shared_by_replicas_and_none_is_lost(
    pair: tuple[Placement, Placement], seed: int
) -> None:
    placement, _ = pair
    shape = (2, placement.num_layers, placement.num_experts)
    load = np.random.default_rng(seed).integers(0, 1000, shape)
    by_rank = spread_load(load, placement)
    expected = np.zeros_like(by_rank)
    for (layer, slot), expert in np.ndenumerate(placement.slot_to_expert):
        if expert >= 0:
            rank = slot // placement.topology.slots_per_rank
            share = load[:, layer, expert] / placement.replica_counts[layer, expert]
            expected[:, layer, rank] += share
    assert np.allclose(by_rank, expected, rtol=1e-12)
    assert np.allclose(by_rank.sum(axis=-1), load.sum(axis=-1), rtol=1e-12)
    assert spread_load(load[:0], placement).shape == (0, *by_rank.shape[1:])


@pytest.mark.parametrize("shape", [(3,), (2, 4), (1, 3), (3, 2, 4)])
def test_load_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PlacementError, match=r"load must be \[\.\.\., 2, 3\], got"):
        spread_load(np.ones(shape), PLACEMENT)


def test_balancedness_is_mean_over_max() -> None:
    assert measure_balancedness([[4, 4, 4], [6, 0, 0], [0, 0, 0]]).tolist() == [1.0, 1 / 3, 1.0]
    assert measure_balancedness(np.ones((2, 5, 4))).shape == (2, 5)
