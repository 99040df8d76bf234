from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError, PlacementError
from equipoise.placement import (
    Placement,
    measure_balancedness,
    place_in_order,
    spread_load,
)
from equipoise.plan.transfer_plan import make_plan
from equipoise.policy import get_policy
from equipoise.policy.deepseek import DeepSeekPolicy
from equipoise.policy.flow import FlowOptions, FlowPolicy, measure_leaving, report_survival
from equipoise.policy.flow.published import publish
from equipoise.topology import IntArray, Topology

UNBOUNDED = FlowOptions(move_budget=None, target=1.0)
property_test = settings(max_examples=150)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    FlowPolicy()


def balance(load: IntArray, placement: Placement) -> np.ndarray:
    return measure_balancedness(spread_load(load, placement))


def received(old: Placement, new: Placement) -> IntArray:
    """Experts that each rank holds in `new` and not in `old`, [R]."""
    per_rank = np.zeros(old.topology.num_ranks, dtype=np.int64)
    shape = (old.num_layers, old.topology.num_ranks, old.topology.slots_per_rank)
    before, after = old.slot_to_expert.reshape(shape), new.slot_to_expert.reshape(shape)
    for layer in range(shape[0]):
        for rank in range(shape[1]):
            per_rank[rank] += len(set(after[layer, rank]) - set(before[layer, rank]) - {-1})
    return per_rank


@st.composite
def problems(draw: st.DrawFn, max_slots: int = 4) -> tuple[IntArray, Topology]:
    topology = Topology(draw(st.integers(1, 6)), draw(st.integers(1, max_slots)))
    num_experts = draw(st.integers(1, topology.num_slots))
    # Few distinct values, so that ties are common.
    values = st.sampled_from([0, 1, 1, 7, 7, 50, 400, 10**6])
    rows = draw(
        st.lists(
            st.lists(values, min_size=num_experts, max_size=num_experts), min_size=1, max_size=3
        )
    )
    return np.array(rows, dtype=np.int64), topology


@st.composite
def standing_problems(draw: st.DrawFn) -> tuple[IntArray, Placement]:
    load, topology = draw(problems())
    layers, num_experts = load.shape
    rows = []
    for _ in range(layers):
        spare = topology.num_slots - num_experts
        extra = draw(st.lists(st.integers(-1, num_experts - 1), min_size=spare, max_size=spare))
        rows.append(draw(st.permutations([*range(num_experts), *extra])))
    return load, Placement(np.array(rows), num_experts, topology)


@property_test
@given(problems())
def test_a_plan_from_nothing_holds_every_expert_once_per_rank(
    problem: tuple[IntArray, Topology],
) -> None:
    load, topology = problem
    placement = FlowPolicy().place(load, topology)
    published = DeepSeekPolicy().place(load, topology)
    assert placement.slot_to_expert.shape == (load.shape[0], topology.num_slots)
    assert (placement.replica_counts >= 1).all()
    for layer in range(load.shape[0]):
        row = placement.slot_to_expert[layer].reshape(topology.num_ranks, -1)
        twice = any(np.unique(slots[slots >= 0], return_counts=True)[1].max() > 1 for slots in row)
        # Two replicas share a rank only in the published layout, where no search did as well.
        assert not twice or (row.reshape(-1) == published.slot_to_expert[layer]).all()


@property_test
@given(problems())
def test_the_compiled_published_layout_is_the_published_one(
    problem: tuple[IntArray, Topology],
) -> None:
    load, topology = problem
    compiled = publish(load.astype(np.float64), topology.num_slots, topology.num_ranks)
    assert (compiled == DeepSeekPolicy().place(load, topology).slot_to_expert).all()


@property_test
@given(problems())
def test_never_below_deepseek_at_an_unlimited_budget(
    problem: tuple[IntArray, Topology],
) -> None:
    load, topology = problem
    published = balance(load, DeepSeekPolicy().place(load, topology))
    for target in (1.0, 0.9):
        ours = FlowPolicy(FlowOptions(move_budget=None, target=target)).place(load, topology)
        assert (balance(load, ours) >= published - 1e-12).all()


@property_test
@given(standing_problems())
def test_never_below_deepseek_from_a_standing_placement(
    problem: tuple[IntArray, Placement],
) -> None:
    load, standing = problem
    published = balance(load, DeepSeekPolicy().place(load, standing.topology))
    ours = FlowPolicy(UNBOUNDED).place(load, standing.topology, standing=standing)
    assert (balance(load, ours) >= published - 1e-12).all()


@property_test
@given(standing_problems(), st.sampled_from([0.0, 0.05, 0.2, 0.5, None]))
def test_no_layer_gets_worse_and_the_budget_is_kept(
    problem: tuple[IntArray, Placement], budget: float | None
) -> None:
    load, standing = problem
    policy = FlowPolicy(FlowOptions(move_budget=budget))
    planned = policy.place(load, standing.topology, standing=standing)
    assert (balance(load, planned) >= balance(load, standing) - 1e-12).all()
    if budget is not None:
        slots = standing.num_slots * standing.num_layers
        assert received(standing, planned).sum() <= budget * slots


@property_test
@given(standing_problems(), st.sampled_from([0.0, 0.1, 0.3]))
def test_no_rank_receives_more_than_its_budget(
    problem: tuple[IntArray, Placement], budget: float
) -> None:
    load, standing = problem
    policy = FlowPolicy(FlowOptions(move_budget=None, rank_move_budget=budget))
    planned = policy.place(load, standing.topology, standing=standing)
    slots = standing.topology.slots_per_rank * standing.num_layers
    assert (received(standing, planned) <= budget * slots).all()


@property_test
@given(standing_problems())
def test_experts_that_stay_keep_their_slot(problem: tuple[IntArray, Placement]) -> None:
    load, standing = problem
    planned = FlowPolicy(UNBOUNDED).place(load, standing.topology, standing=standing)
    shape = (load.shape[0], standing.topology.num_ranks, standing.topology.slots_per_rank)
    before = standing.slot_to_expert.reshape(shape)
    after = planned.slot_to_expert.reshape(shape)
    for layer, rank in np.ndindex(shape[:2]):
        for expert in set(before[layer, rank]) & set(after[layer, rank]) - {-1}:
            held = np.flatnonzero(after[layer, rank] == expert)
            stood = np.flatnonzero(before[layer, rank] == expert)
            assert np.isin(held, stood).sum() == min(held.size, stood.size)


def drifting(layers: int, num_experts: int, steps: int, seed: int) -> list[IntArray]:
    random = np.random.default_rng(seed)
    log_load = random.normal(size=(layers, num_experts))
    loads = []
    for _ in range(steps):
        loads.append(np.round(np.exp(log_load) * 1000).astype(np.int64))
        log_load = log_load + 0.1 * random.normal(size=log_load.shape)
    return loads


def test_equal_loads_do_not_collapse_the_balance() -> None:
    for topology, num_experts in ((Topology(8, 9), 64), (Topology(16, 2), 24), (Topology(4, 4), 8)):
        load = np.full((3, num_experts), 1000)
        planned = FlowPolicy(UNBOUNDED).place(load, topology)
        published = DeepSeekPolicy().place(load, topology)
        assert (balance(load, planned) >= balance(load, published)).all()
        assert (balance(load, planned) > 0.74).all()


def test_no_load_at_all_is_placed_and_then_left_alone() -> None:
    topology = Topology(4, 3)
    load = np.zeros((2, 8), dtype=np.int64)
    first = FlowPolicy().place(load, topology)
    assert FlowPolicy().place(load, topology, standing=first) == first


@pytest.mark.parametrize(("ranks", "slots"), [(8, 9), (32, 2)])
def test_drift_is_followed_for_a_fraction_of_the_moves(ranks: int, slots: int) -> None:
    topology = Topology(ranks, slots)
    loads = drifting(8, ranks * slots * 7 // 8, 6, seed=3)
    policy = FlowPolicy(FlowOptions(move_budget=0.12))
    anew, standing = DeepSeekPolicy().place(loads[0], topology), policy.place(loads[0], topology)
    ours_received = published_received = 0
    for load in loads[1:]:
        planned = policy.place(load, topology, standing=standing)
        published = DeepSeekPolicy().place(load, topology)
        ours_received += received(standing, planned).sum()
        published_received += received(anew, published).sum()
        assert balance(load, planned).mean() >= balance(load, published).mean() - 0.005
        standing, anew = planned, published
    assert ours_received * 6 <= published_received


def test_a_plan_moves_what_the_policy_counted() -> None:
    loads = drifting(4, 28, 2, seed=5)
    topology = Topology(8, 4)
    standing = FlowPolicy().place(loads[0], topology)
    planned = FlowPolicy().place(loads[1], topology, standing=standing)
    plan = make_plan(standing, planned)
    assert plan.num_moves == received(standing, planned).sum() > 0


def test_byte_budgets_weigh_layers_by_their_size() -> None:
    topology = Topology(4, 4)
    loads = drifting(2, 14, 2, seed=7)
    standing = place_in_order(2, 14, topology)
    options = FlowOptions(expert_bytes=(100, 1), move_bytes=50, move_budget=None)
    planned = FlowPolicy(options).place(loads[1], topology, standing=standing)
    assert (planned.slot_to_expert[0] == standing.slot_to_expert[0]).all()
    assert (planned.slot_to_expert[1] != standing.slot_to_expert[1]).any()


def test_a_move_that_does_not_pay_is_not_made() -> None:
    loads = drifting(2, 28, 2, seed=9)
    topology = Topology(8, 4)
    standing = FlowPolicy().place(loads[0], topology)
    options = FlowOptions(move_budget=None, least_gain=0.5)
    assert FlowPolicy(options).place(loads[1], topology, standing=standing) == standing


def test_slower_ranks_get_less() -> None:
    topology = Topology(4, 8)
    load = drifting(3, 28, 1, seed=11)[0]
    speeds = (1.0, 1.0, 1.0, 0.5)
    planned = FlowPolicy(FlowOptions(rank_speeds=speeds)).place(load, topology)
    tokens = spread_load(load, planned)
    assert (measure_balancedness(tokens / np.array(speeds)) > 0.85).all()
    assert (tokens[:, 3] < 0.65 * tokens[:, :3].mean(axis=1)).all()
    uneven = FlowPolicy().place(load, topology)
    again = FlowPolicy(FlowOptions(rank_speeds=speeds, move_budget=0.3)).place(
        load, topology, standing=uneven
    )
    busy = spread_load(load, again) / np.array(speeds)
    assert busy.max() < (spread_load(load, uneven) / np.array(speeds)).max()


GROUPED = Topology(8, 5, 4)


@pytest.mark.parametrize("slots", [5, 2])
def test_strict_hierarchy_keeps_groups_on_nodes_also_from_a_standing_placement(slots: int) -> None:
    topology = Topology(8, slots, 4)
    loads = drifting(3, 8 * slots - 8, 3, seed=13)
    policy = FlowPolicy(FlowOptions(num_groups=8, hierarchy="strict", move_budget=0.3))
    standing = policy.place(loads[0], topology)
    for load in loads[1:]:
        planned = policy.place(load, topology, standing=standing)
        assert measure_leaving(load, planned, 8) == 0.0
        assert (balance(load, planned) >= balance(load, standing) - 1e-12).all()
        standing = planned


def test_strict_hierarchy_is_no_worse_than_the_published_one() -> None:
    load = drifting(6, 32, 1, seed=15)[0]
    options = FlowOptions(num_groups=8, hierarchy="strict", target=1.0)
    ours = FlowPolicy(options).place(load, GROUPED)
    assert (balance(load, ours) >= balance(load, DeepSeekPolicy(8).place(load, GROUPED))).all()


def test_a_few_heavy_experts_pack_evenly() -> None:
    # Smallest largest slots, 6, 3 and 2 replicas, leave a rank 18 % too busy; 5, 3 and 3 do not.
    heavy = [3_360_000, 1_680_000, 840_000]
    light = np.geomspace(180_000, 12_900, 61)
    light *= (8_000_000 - sum(heavy)) / light.sum()
    load = np.concatenate((heavy, light)).astype(np.int64)[None]
    placement = FlowPolicy().place(load, Topology(8, 9))
    assert measure_balancedness(spread_load(load, placement))[0] > 0.99
    counts = np.bincount(placement.slot_to_expert[0], minlength=64)
    assert counts[:3].tolist() == [5, 3, 3]


def test_relaxed_hierarchy_balances_better_with_bounded_leaving() -> None:
    loads = drifting(4, 32, 3, seed=17)
    strict = FlowPolicy(FlowOptions(num_groups=8, hierarchy="strict"))
    relaxed = FlowPolicy(FlowOptions(num_groups=8, hierarchy="relaxed", leaving=0.1))
    standing = relaxed.place(loads[0], GROUPED)
    assert (
        balance(loads[0], standing).mean()
        > balance(loads[0], strict.place(loads[0], GROUPED)).mean()
    )
    assert 0.0 < measure_leaving(loads[0], standing, 8) <= 0.1
    for load in loads[1:]:
        planned = relaxed.place(load, GROUPED, standing=standing)
        before = measure_leaving(load, standing, 8)
        assert measure_leaving(load, planned, 8) <= max(0.1, before) + 1e-12
        standing = planned


@pytest.mark.parametrize("leaving", [0.0, 0.03, 0.08])
def test_tokens_that_leave_are_pooled_over_layers(leaving: float) -> None:
    even = np.full((3, 32), 1000)
    skewed = even.copy()
    skewed[0, :4] *= 12
    skewed[:, 8] *= 3
    options = FlowOptions(num_groups=8, hierarchy="relaxed", leaving=leaving, move_budget=0.3)
    standing = None
    for load in (skewed, even, skewed[::-1].copy()):
        before = measure_leaving(load, standing, 8) if standing else 0.0
        planned = FlowPolicy(options).place(load, GROUPED, standing=standing)
        assert measure_leaving(load, planned, 8) <= max(leaving, before) + 1e-12
        standing = planned


def test_a_layer_that_needs_more_than_the_mean_gets_what_others_do_not_need() -> None:
    load = np.full((3, 32), 1000)
    load[0, :4] *= 12
    options = FlowOptions(num_groups=8, hierarchy="relaxed", leaving=0.08)
    planned = FlowPolicy(options).place(load, GROUPED)
    alone = FlowPolicy(options).place(load[:1], GROUPED)
    assert balance(load, planned)[0] > balance(load[:1], alone)[0]
    first = Placement(planned.slot_to_expert[:1], 32, GROUPED)
    assert measure_leaving(load[:1], first, 8) > 0.08 >= measure_leaving(load, planned, 8)


def test_a_placement_that_breaks_the_hierarchy_is_put_right_within_the_budget() -> None:
    load = drifting(3, 32, 1, seed=19)[0]
    standing = place_in_order(3, 32, GROUPED)
    with pytest.raises(PlacementError, match="group, so it has no home"):
        measure_leaving(load, standing, 8)
    policy = FlowPolicy(FlowOptions(num_groups=8, hierarchy="strict", move_budget=None))
    assert measure_leaving(load, policy.place(load, GROUPED, standing=standing), 8) == 0.0
    frozen = FlowPolicy(FlowOptions(num_groups=8, hierarchy="strict", move_budget=0.0))
    assert frozen.place(load, GROUPED, standing=standing) == standing


@pytest.mark.parametrize("survival", ["rank", "node"])
@pytest.mark.parametrize("min_copies", [2, None])
def test_survival_keeps_every_expert_twice(survival: str, min_copies: int | None) -> None:
    topology = Topology(8, 5, 4)
    loads = drifting(3, 18, 3, seed=21)
    policy = FlowPolicy(FlowOptions(survival=survival, min_copies=min_copies, move_budget=0.2))
    standing = policy.place(loads[0], topology)
    for load in loads[1:]:
        standing = policy.place(load, topology, standing=standing)
        report = report_survival(standing)
        assert report.outlives_any_rank
        assert report.lost_with_rank.sum() == 0
        if survival == "node":
            assert report.outlives_any_node
            assert report.lost_with_node.sum() == 0


def test_least_covered_first_spends_spare_slots_evenly() -> None:
    load = drifting(2, 30, 1, seed=23)[0]
    planned = FlowPolicy(FlowOptions(survival="rank")).place(load, Topology(8, 5))
    assert planned.replica_counts.max() == 2
    report = report_survival(planned)
    assert report.fewest_ranks == 1
    assert report.lost_with_rank.sum() == 2 * 20
    assert not report.outlives_any_rank


def test_the_plan_is_the_same_in_another_process() -> None:
    script = Path(__file__).with_name("flow_fingerprints.py")
    other = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=110
    )
    from tests.flow_fingerprints import fingerprints

    assert other.stdout.split() == fingerprints()
    assert len(set(fingerprints())) == len(fingerprints())


def test_flow_is_found_by_name() -> None:
    assert isinstance(get_policy("flow"), FlowPolicy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"move_budget": 1.5}, "move_budget must be between 0 and 1, got 1.5"),
        ({"target": 0.0}, "target must be above 0"),
        ({"max_looks": 0}, "max_looks must be at least 1, got 0"),
        ({"move_bytes": 10}, "move_bytes needs expert_bytes"),
        ({"expert_bytes": (1, 0)}, "expert_bytes must be 1 or more"),
        ({"rank_speeds": (1.0, float("nan"))}, "rank_speeds must be above 0"),
        ({"hierarchy": "loose"}, "hierarchy is off, strict or relaxed"),
        ({"survival": "rack"}, "survival is off, rank or node"),
        ({"survival": "node", "hierarchy": "strict"}, "choose hierarchy 'off'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_speeds": (1.0,)}, "1 entries for 4 ranks"),
        ({"num_groups": 5}, "12 experts cannot form 5 equal groups"),
        ({"num_groups": 3, "hierarchy": "strict"}, "3 groups cannot be spread evenly over 2 nodes"),
        ({"survival": "rank", "min_copies": 2}, "ask for at least 6 slots per rank"),
        ({"survival": "node", "min_copies": 3}, "there are 2"),
        ({"expert_bytes": (1, 2, 3)}, "3 entries for 2 layers"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        FlowPolicy(FlowOptions(**options)).place(np.ones((2, 12), np.int64), Topology(4, 4, 2))


def test_a_standing_placement_of_another_shape_is_refused() -> None:
    standing = place_in_order(2, 12, Topology(4, 4))
    with pytest.raises(PlacementError, match="standing placement is 2 layers x 12 experts"):
        FlowPolicy().place(np.ones((3, 12), np.int64), Topology(4, 4), standing=standing)
