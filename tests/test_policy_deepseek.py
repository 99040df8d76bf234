from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError, PlacementError
from equipoise.placement import measure_balancedness, place_in_order, spread_load
from equipoise.policy.deepseek import DeepSeekPolicy
from equipoise.topology import Topology

GOLDEN = Path(__file__).parent / "golden" / "eplb_readme.json"


def slow_pack(weights: list[float], num_packs: int) -> list[list[int]]:
    """Items of each pack: heaviest first into the lightest pack that has room."""
    capacity = len(weights) // num_packs
    if capacity == 1:
        return [[item] for item in range(len(weights))]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    carried = [0.0] * num_packs
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        with_room = [p for p in range(num_packs) if len(packs[p]) < capacity]
        lightest = min(with_room, key=lambda p: (carried[p], p))
        packs[lightest].append(item)
        carried[lightest] += weights[item]
    return packs


def slow_replicate(loads: list[int], num_slots: int) -> list[int]:
    """Expert of each slot: all once, then again and again the one with most per replica."""
    slots = list(range(len(loads)))
    while len(slots) < num_slots:
        slots.append(max(range(len(loads)), key=lambda e: (Fraction(loads[e], slots.count(e)), -e)))
    return slots


def slow_place(loads: list[int], topology: Topology, num_groups: int) -> list[int]:
    """One layer of the published algorithm, spelt out."""
    num_nodes = topology.num_nodes
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    size = len(loads) // num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    table = []
    for node_groups in slow_pack([sum(loads[e] for e in g) for g in groups], num_nodes):
        experts = [e for g in node_groups for e in groups[g]]
        slots = slow_replicate([loads[e] for e in experts], topology.num_slots // num_nodes)
        carried = [loads[experts[s]] / slots.count(s) for s in slots]
        for rank in slow_pack(carried, topology.num_ranks // num_nodes):
            table += [experts[slots[i]] for i in rank]
    return table


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, Topology, int]:
    """Loads [L, E], often with ties and zeros, a topology that holds them, groups."""
    num_nodes = draw(st.integers(1, 3))
    num_ranks = num_nodes * draw(st.integers(1, 4))
    num_groups = draw(st.integers(1, 6))
    num_experts = num_groups * draw(st.integers(1, 5))
    slots = -(-num_experts // num_ranks) + draw(st.integers(0, 2))
    most = draw(st.sampled_from([0, 1, 3, 60, 10**6]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load = rng.integers(0, most + 1, (draw(st.integers(1, 4)), num_experts))
    return load, Topology(num_ranks, slots, num_nodes), num_groups


def test_the_published_example_comes_out_as_published() -> None:
    golden = json.loads(GOLDEN.read_text())
    num_ranks = golden["num_ranks"]
    topology = Topology(num_ranks, golden["num_slots"] // num_ranks, golden["num_nodes"])
    placement = DeepSeekPolicy(golden["num_groups"]).place(np.array(golden["load"]), topology)
    assert placement.slot_to_expert.tolist() == golden["slot_to_expert"]


@given(problems())
@settings(max_examples=200)
def test_all_layers_at_once_are_what_one_layer_at_a_time_gives(
    problem: tuple[np.ndarray, Topology, int],
) -> None:
    load, topology, num_groups = problem
    placement = DeepSeekPolicy(num_groups).place(load, topology)
    expected = [slow_place(layer, topology, num_groups) for layer in load.tolist()]
    assert placement.slot_to_expert.tolist() == expected


@given(problems())
@settings(max_examples=100)
def test_every_slot_is_used_every_expert_placed_and_the_same_comes_out_twice(
    problem: tuple[np.ndarray, Topology, int],
) -> None:
    load, topology, num_groups = problem
    policy = DeepSeekPolicy(num_groups)
    placement = policy.place(load, topology)
    assert (placement.replica_counts >= 1).all()
    assert (placement.replica_counts.sum(axis=1) == topology.num_slots).all()
    standing = place_in_order(len(load), load.shape[1], topology)
    again = DeepSeekPolicy(num_groups).place(load.copy(), topology, standing=standing)
    assert again.fingerprint() == placement.fingerprint()


def test_groups_stay_on_a_node_when_they_divide_by_nodes_and_only_then() -> None:
    rng = np.random.default_rng(5)
    load = rng.integers(1, 1000, (4, 24))
    topology = Topology(8, 4, 2)
    table = DeepSeekPolicy(num_groups=4).place(load, topology).slot_to_expert
    for layer in table:
        home, away = (set((half // 6).tolist()) for half in (layer[:16], layer[16:]))
        assert not home & away
    whole = DeepSeekPolicy(num_groups=3).place(load, topology)
    assert whole == DeepSeekPolicy().place(load, topology)


def test_ties_do_not_cost_balance() -> None:
    topology = Topology(4, 9)
    load = np.full((2, 32), 7)
    placement = DeepSeekPolicy().place(load, topology)
    assert measure_balancedness(spread_load(load, placement)).min() > 0.9


def test_skewed_load_ends_up_balanced() -> None:
    rng = np.random.default_rng(11)
    load = (rng.pareto(1.2, (6, 128)) * 100 + 1).astype(np.int64)
    topology = Topology(8, 18)
    before = place_in_order(6, 128, topology)
    after = DeepSeekPolicy().place(load, topology)
    assert measure_balancedness(spread_load(load, before)).mean() < 0.8
    assert measure_balancedness(spread_load(load, after)).min() > 0.95


def test_groups_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_groups must be at least 1, got 0"):
        DeepSeekPolicy(num_groups=0)
    with pytest.raises(PlacementError, match="10 experts cannot form 4 equal groups"):
        DeepSeekPolicy(num_groups=4).place(np.ones((1, 10), dtype=np.int64), Topology(4, 3))
    with pytest.raises(PlacementError, match="layer 0, expert 1 is -1"):
        DeepSeekPolicy().place(np.array([[1, -1]]), Topology(2, 1))
