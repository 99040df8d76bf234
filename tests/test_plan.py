from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError, PlacementError
from equipoise.placement import Placement, place_in_order
from equipoise.plan.sources import spread_sources
from equipoise.plan.transfer_plan import TransferPlan, make_plan
from equipoise.topology import Topology
from equipoise.transfer.staging import share_plan
from tests.placements import make_random_placement, placement_pairs


def apply_plan(plan: TransferPlan) -> np.ndarray:
    """What slots hold after staging every row from the old table and then doing the writes."""
    staged = plan.old.slot_to_expert[plan.layer, plan.src_slot]
    table = plan.old.slot_to_expert.copy()
    table[plan.layer[plan.write_row], plan.write_slot] = staged[plan.write_row]
    return table


@given(placement_pairs())
@settings(max_examples=150)
def test_a_plan_turns_the_old_table_into_the_new_one(pair: tuple[Placement, Placement]) -> None:
    old, new = pair
    plan = make_plan(old, new)
    kept_empty = new.slot_to_expert < 0
    assert np.array_equal(apply_plan(plan)[~kept_empty], new.slot_to_expert[~kept_empty])
    written = set(zip(plan.layer[plan.write_row], plan.write_slot, strict=True))
    changed = (old.slot_to_expert != new.slot_to_expert) & ~kept_empty
    assert written == set(zip(*np.nonzero(changed), strict=True))
    assert len(written) == len(plan.write_slot)


@given(placement_pairs())
@settings(max_examples=150)
def test_rows_are_one_per_rank_and_expert_and_come_from_the_nearest_holder(
    pair: tuple[Placement, Placement],
) -> None:
    old, new = pair
    topology = old.topology
    plan = make_plan(old, new)
    rows = list(zip(plan.layer.tolist(), plan.dst_rank.tolist(), plan.expert.tolist(), strict=True))
    assert len(rows) == len(set(rows))
    read = list(zip(plan.layer, plan.dst_rank, plan.src_slot, strict=True))
    assert read == sorted(read)
    assert set(plan.write_row.tolist()) == set(range(len(rows)))
    assert np.array_equal(topology.rank_of_slot(plan.write_slot), plan.dst_rank[plan.write_row])
    sources = zip(rows, plan.src_slot.tolist(), plan.is_local.tolist(), strict=True)
    for (layer, rank, expert), src_slot, is_local in sources:
        assert old.slot_to_expert[layer, src_slot] == expert
        holders = np.flatnonzero(old.slot_to_expert[layer] == expert) // topology.slots_per_rank
        assert is_local == (rank in holders)
        if not is_local:
            home = rank // topology.ranks_per_node
            source_node = src_slot // topology.slots_per_rank // topology.ranks_per_node
            assert (source_node == home) == (home in holders // topology.ranks_per_node)
    assert plan.num_moves == plan.moves_per_layer.sum() == (~plan.is_local).sum()


def test_equal_placements_need_nothing() -> None:
    placement = place_in_order(3, 6, Topology(4, 2))
    plan = make_plan(placement, placement)
    assert (plan.num_moves, len(plan.layer), len(plan.write_slot)) == (0, 0, 0)
    assert plan.moves_per_layer.tolist() == [0, 0, 0]
    assert plan.chunks(np.array([5, 5, 5]), None) == []


def test_a_rank_receives_once_and_copies_to_its_second_slot() -> None:
    topology = Topology(2, 3)
    old = Placement(np.array([[0, 1, 2, 3, 3, -1]]), 4, topology)
    new = Placement(np.array([[3, 3, 2, 0, 1, 2]]), 4, topology)
    plan = make_plan(old, new)
    got = [plan.dst_rank, plan.expert, plan.src_slot, plan.write_row, plan.write_slot]
    assert [column.tolist() for column in got] == [
        [0, 1, 1, 1],
        [3, 0, 1, 2],
        [3, 0, 1, 2],
        [0, 0, 1, 2, 3],
        [0, 1, 3, 4, 5],
    ]
    assert plan.num_moves == 4


def test_a_rank_that_holds_an_expert_copies_from_itself() -> None:
    topology = Topology(2, 2)
    old = Placement(np.array([[0, 1, 0, 2]]), 3, topology)
    new = Placement(np.array([[1, 0, 2, 0]]), 3, topology)
    plan = make_plan(old, new)
    assert plan.is_local.all()
    assert plan.src_slot.tolist() == [0, 1, 2, 3]
    assert plan.src_rank.tolist() == [0, 0, 1, 1]


def fewest_possible(candidates: list[list[int]], num_ranks: int) -> int:
    """Smallest maximum of sends per rank, by augmenting paths."""
    most = -(-len(candidates) // num_ranks)
    held: list[list[int]] = [[] for _ in range(num_ranks)]

    def assign(row: int, seen: set[int]) -> bool:
        for rank in candidates[row]:
            if rank in seen:
                continue
            seen.add(rank)
            if len(held[rank]) < most:
                held[rank].append(row)
                return True
            for other in list(held[rank]):
                if assign(other, seen):
                    held[rank].remove(other)
                    held[rank].append(row)
                    return True
        return False

    for row in range(len(candidates)):
        while not assign(row, set()):
            most += 1
    return most


@pytest.mark.parametrize("shape", [(256, Topology(32, 9)), (128, Topology(32, 8))])
def test_senders_share_each_layer_and_the_whole(shape: tuple[int, Topology]) -> None:
    num_experts, topology = shape
    rng = np.random.default_rng(7)
    old, new = (make_random_placement(rng, 8, num_experts, topology) for _ in range(2))
    plan = make_plan(old, new)
    remote = ~plan.is_local
    for layer in range(8):
        rows = np.flatnonzero(remote & (plan.layer == layer))
        candidates = [
            sorted({*np.flatnonzero(old.slot_to_expert[layer] == e) // topology.slots_per_rank})
            for e in plan.expert[rows]
        ]
        most = np.bincount(plan.src_rank[rows]).max()
        assert most <= fewest_possible(candidates, topology.num_ranks) + 1
    sends = np.bincount(plan.src_rank[remote], minlength=topology.num_ranks)
    assert sends.max() <= 1.2 * sends.mean()


def test_totals_even_out_where_a_layer_does_not_care() -> None:
    # In every layer rank 2 fetches expert 0, which ranks 0 and 1 hold; taking turns within a
    # layer would ask rank 0 each time.
    old = np.tile([0, 0, 1, 2], (40, 1))
    new = np.tile([1, 0, 0, 2], (40, 1))
    plan = make_plan(*(Placement(table, 3, Topology(4, 1)) for table in (old, new)))
    of_expert_0 = plan.expert == 0
    assert np.bincount(plan.src_rank[of_expert_0]).tolist() == [20, 20]


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(0, 40))
@settings(max_examples=100)
def test_shifting_never_makes_a_layer_worse_than_taking_turns(
    seed: int, num_ranks: int, num_rows: int
) -> None:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 20, num_rows)
    end = first + rng.integers(1, 4, num_rows)
    holder_rank = rng.integers(0, num_ranks, 24)
    layer = np.sort(rng.integers(0, 3, num_rows))
    chosen = spread_sources(holder_rank, first, end, layer, num_ranks)
    assert ((first <= chosen) & (chosen < end)).all()
    turns = [
        first[i] + (np.count_nonzero(first[:i] == first[i]) + first[i]) % (end[i] - first[i])
        for i in range(num_rows)
    ]
    for which in range(3):
        mine, plain = (
            np.bincount(holder_rank[np.array(pick, dtype=int)[layer == which]], minlength=1).max()
            for pick in (chosen, turns)
        )
        assert mine <= plain


def test_plans_are_the_same_everywhere_and_told_apart_by_fingerprint() -> None:
    rng = np.random.default_rng(3)
    topology = Topology(4, 4, 2)
    a, b, c = (make_random_placement(rng, 3, 10, topology) for _ in range(3))
    assert make_plan(a, b).fingerprint() == make_plan(a, b).fingerprint()
    prints = {make_plan(x, y).fingerprint() for x in (a, b, c) for y in (a, b, c)}
    assert len(prints) == 9
    assert all(len(print_) == 16 for print_ in prints)


@given(placement_pairs(), st.data())
@settings(max_examples=100)
def test_chunks_hold_whole_layers_within_the_budget(
    pair: tuple[Placement, Placement], data: st.DataObject
) -> None:
    plan = make_plan(*pair)
    num_layers = plan.old.num_layers
    each = np.array(data.draw(st.lists(st.integers(1, 9), min_size=num_layers, max_size=4)))
    each = each[:num_layers]
    staged = plan.staged_bytes(each)
    for layer in range(num_layers):
        for rank in range(plan.old.topology.num_ranks):
            rows = ((plan.layer == layer) & (plan.dst_rank == rank)).sum()
            assert staged[layer, rank] == rows * each[layer]
    least = int(staged.max())
    budget = data.draw(st.one_of(st.none(), st.integers(least, 3 * least + 1)))
    chunks = plan.chunks(each, budget)
    joined = [int(layer) for chunk in chunks for layer in chunk]
    assert joined == sorted(set(plan.layer.tolist()))
    allowed = least if budget is None else budget
    for chunk in chunks:
        assert staged[chunk].sum(axis=0).max() <= allowed
    for chunk, following in itertools.pairwise(chunks):
        assert staged[[*chunk, following[0]]].sum(axis=0).max() > allowed


@given(placement_pairs(), st.integers(0, 40), st.integers(1, 9))
@settings(max_examples=100)
def test_chunks_end_with_a_single_layer_and_keep_their_budget(
    pair: tuple[Placement, Placement], more: int, first: int
) -> None:
    plan = make_plan(*pair)
    each = np.arange(plan.old.num_layers) % 3 + first
    staged = plan.staged_bytes(each)
    budget = int(staged.max()) + more
    plain = plan.chunks(each, budget)
    chunks = share_plan(plan, 0, each, budget, ends_small=True).chunks
    busy = sorted(set(plan.layer.tolist()))
    assert [int(layer) for chunk in chunks for layer in chunk if layer in busy] == busy
    assert len(plain) <= len(chunks) <= len(plain) + 1 or not plain
    for chunk in chunks:
        assert staged[chunk].sum(axis=0).max() <= budget
    if len(chunks) > 1:
        assert len(chunks[-1]) == 1


def test_a_plan_of_many_chunks_leaves_none_but_the_last_short() -> None:
    old = place_in_order(20, 4, Topology(2, 2))
    new = Placement(np.array([[2, 1, 0, 3]] * 20), 4, Topology(2, 2))
    shares = share_plan(make_plan(old, new), 0, np.full(20, 5), 15, ends_small=True)
    assert [len(layers) for layers in shares.chunks] == [3, 3, 3, 3, 3, 2, 2, 1]


def test_what_lands_in_empty_slots_needs_no_room_and_comes_in_large_chunks() -> None:
    old = Placement(np.array([[0, 1, -1, 2, 3, -1]] * 20), 4, Topology(2, 3))
    new = Placement(np.array([[0, 1, 3, 2, 3, 0]] * 20), 4, Topology(2, 3))
    plan = make_plan(old, new)
    each = np.full(20, 1 << 30)
    shares = share_plan(plan, 0, each, 2 << 30, in_place=True, ends_small=True)
    assert [len(layers) for layers in shares.chunks] == [2, 6, 6, 6]
    assert not shares.num_bytes.any()
    # A layer with an expert that is staged counts with that one.
    swapped = np.array([[0, 1, 3, 2, 3, 0]] * 14 + [[2, 1, 3, 0, 3, -1]] * 6)
    shares = share_plan(
        make_plan(old, Placement(swapped, 4, Topology(2, 3))),
        0,
        each,
        2 << 30,
        in_place=True,
        ends_small=True,
    )
    assert sum(map(len, shares.chunks)) == 20
    assert len(shares.chunks[-1]) == 1
    assert shares.num_bytes.max() == 2 << 30


def test_a_budget_that_is_too_small_says_the_least_that_works() -> None:
    topology = Topology(2, 2)
    old = Placement(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), 4, topology)
    new = Placement(np.array([[0, 1, 3, 2], [2, 3, 0, 1]]), 4, topology)
    plan = make_plan(old, new)
    each = np.array([10, 100])
    with pytest.raises(ConfigError, match=r"is 199, .* layer 1 stages 200 .* at least 200"):
        plan.chunks(each, 199)
    assert [chunk.tolist() for chunk in plan.chunks(each, 200)] == [[0], [1]]
    assert [chunk.tolist() for chunk in plan.chunks(each, 220)] == [[0, 1]]
    with pytest.raises(PlacementError, match=r"expert_bytes must be \[2\], got \[3\]"):
        plan.staged_bytes(np.array([1, 2, 3]))


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (place_in_order(3, 4, Topology(2, 2)), "same layers: old has 2, new 3"),
        (place_in_order(2, 3, Topology(2, 2)), "same experts: old has 4, new 3"),
        (place_in_order(2, 4, Topology(4, 1)), "same topology"),
    ],
)
def test_placements_of_different_shapes_are_refused(other: Placement, what: str) -> None:
    with pytest.raises(PlacementError, match=what):
        make_plan(place_in_order(2, 4, Topology(2, 2)), other)
