"""What a change is made of: plans, placements, words, and who gives what to whom."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.elastic.membership import PHASES, Holding, MembershipPlan, Serving, SetShape
from equipoise.elastic.placing import Redundancy, place_members
from equipoise.elastic.planning import plan_change, plan_recovery, rehearse
from equipoise.elastic.traffic import IN_HOST, RESTORE, list_fetches, split_runs
from equipoise.elastic.verdict import Word, settle
from equipoise.errors import MembershipError
from equipoise.models.host_copies import CopyKey, CopyRule, HostCopies, assign_copies
from equipoise.placement import Placement, place_in_order
from equipoise.topology import IntArray, Topology

EXPERT_BYTES = (100, 300)


def split(placement: Placement) -> list[IntArray]:
    """What each rank's slots hold."""
    return np.split(placement.slot_to_expert, placement.topology.num_ranks, axis=1)


def make_serving(num_experts: int, num_ranks: int, redundancy: Redundancy) -> Serving:
    slots = redundancy.choose_slots(num_experts, num_ranks)
    placement = place_in_order(len(EXPERT_BYTES), num_experts, Topology(num_ranks, slots))
    held = {f"rank-{rank}": Holding((mine,)) for rank, mine in enumerate(split(placement))}
    copies = {"rank-0": (CopyKey(0, 1, 2),)}
    return Serving(7, (SetShape(num_experts, EXPERT_BYTES),), 1000, held, copies)


REDUNDANCIES = st.one_of(
    st.just(Redundancy()),
    st.integers(0, 5).map(lambda redundant: Redundancy(num_redundant=redundant)),
    st.integers(12, 20).map(lambda slots: Redundancy(slots_per_rank=slots)),
)


@settings(max_examples=60)
@given(
    num_experts=st.integers(4, 12),
    num_ranks=st.integers(1, 5),
    redundancy=REDUNDANCIES,
    steps=st.lists(
        st.tuples(st.sets(st.integers(0, 4), min_size=1), st.integers(0, 3)), max_size=4
    ),
)
def test_whoever_comes_and_goes_each_expert_has_a_slot_and_survivors_keep_theirs(
    num_experts: int,
    num_ranks: int,
    redundancy: Redundancy,
    steps: list[tuple[set[int], int]],
) -> None:
    serving = make_serving(num_experts, num_ranks, redundancy)
    for number, (staying, num_new) in enumerate(steps):
        names = [name for turn, name in enumerate(serving.held) if turn in staying]
        names += [f"new-{number}-{one}" for one in range(num_new)]
        if not names:
            continue
        plan = plan_change(serving, names, serving.generation + 1, redundancy)
        plan = MembershipPlan.from_json(json.loads(json.dumps(plan.to_json())))
        placement = plan.placements[0]
        carry_out(plan)
        after = split(placement)
        held = {name: Holding((after[turn],)) for turn, name in enumerate(names)}
        kept = [name for name in names if name in serving.held]
        for name in kept:
            before, now = serving.held[name].slots[0], held[name].slots[0]
            if before.shape == now.shape and set(kept) == set(serving.held):
                # Nobody left, so nothing has to make way.
                assert np.array_equal(before, now)
        serving = Serving(plan.generation, serving.shapes, serving.shared_bytes, held)


def carry_out(plan: MembershipPlan) -> None:
    """Each member ends with what the placement says, brought from who held it."""
    names = plan.participants
    held = [plan.find_holding(name).slots[0] for name in names]
    size = plan.placements[0].topology.slots_per_rank
    now = []
    for place in range(len(plan.members)):
        stays = held[place].shape[1] == size
        now.append(held[place].copy() if stays else np.full((len(EXPERT_BYTES), size), -1))
    for fetch in list_fetches(plan):
        assert fetch.source != RESTORE
        assert held[fetch.source][fetch.layer, fetch.held_in] == fetch.expert
        now[fetch.member][fetch.layer, list(fetch.slots)] = fetch.expert
    for mine, wanted in zip(now, split(plan.placements[0]), strict=True):
        assert np.array_equal(np.where(wanted < 0, -1, mine), wanted)


def test_newcomers_get_replicas_of_all_without_repeating_any() -> None:
    held = [np.arange(8)[None], np.empty((1, 0), dtype=np.int64), np.empty((1, 0), dtype=np.int64)]
    placement = place_members(held, 8, 8)
    assert placement.num_wasted() == 0
    assert placement.replica_counts.tolist() == [[3] * 8]


def test_a_size_that_is_too_small_says_which_is_not() -> None:
    serving = make_serving(12, 4, Redundancy(slots_per_rank=4))
    with pytest.raises(
        MembershipError, match="2 ranks of 4 slots cannot hold 12 experts: at least 3"
    ):
        plan_change(serving, ["rank-1", "rank-3"], 8, Redundancy(slots_per_rank=4))
    with pytest.raises(MembershipError, match="at least one rank"):
        plan_change(serving, [], 8, Redundancy())
    with pytest.raises(MembershipError, match="rank-1 repeats"):
        plan_change(serving, ["rank-1", "rank-1"], 8, Redundancy())
    with pytest.raises(MembershipError, match="generation 7 cannot follow generation 7"):
        plan_change(serving, ["rank-1"], 7, Redundancy())


def test_a_rehearsal_counts_what_travels_and_what_is_held_at_once() -> None:
    serving = make_serving(8, 2, Redundancy(num_redundant=0))
    plan = plan_change(serving, ["rank-0", "rank-1", "a", "b"], 8, Redundancy(num_redundant=0))
    rehearsal = rehearse(plan)
    # Two newcomers: two experts of each layer, and what all have.
    assert rehearsal.bytes == 2 * (2 * sum(EXPERT_BYTES) + 1000)
    # Survivors hold four old slots and two new ones; newcomers two.
    assert rehearsal.peak_bytes_per_rank["rank-0"] == 1000 + 6 * sum(EXPERT_BYTES)
    assert rehearsal.peak_bytes_per_rank["a"] == 1000 + 2 * sum(EXPERT_BYTES)
    assert rehearsal.restored_bytes == 0


def test_experts_that_died_come_from_host_memory_or_are_restored() -> None:
    whole = make_serving(8, 2, Redundancy(num_redundant=0))
    left = Serving(7, whole.shapes, 1000, {"rank-1": whole.held["rank-1"]})
    fetches = list_fetches(plan_recovery(left, 8, Redundancy()))
    assert {fetch.expert for fetch in fetches if fetch.source == RESTORE} == {0, 1, 2, 3}
    kept = Serving(7, whole.shapes, 1000, left.held, {"rank-1": (CopyKey(0, 1, 2),)})
    fetches = list_fetches(plan_recovery(kept, 8, Redundancy()))
    (copy,) = [one for one in fetches if one.source != RESTORE and one.held_in < 0]
    assert (copy.layer, copy.expert, copy.source) == (1, 2, 0)


def test_copies_are_with_ranks_that_have_no_slot_and_stay_where_they_are() -> None:
    placement = place_in_order(3, 8, Topology(4, 3))
    for backup, expected in (("unreplicated", 4), ("all", 8), ("none", 0)):
        given = assign_copies([placement], backup, [()] * 4)  # type: ignore[arg-type]
        assert sum(map(len, given)) == 3 * expected
        for mine, slots in zip(given, split(placement), strict=True):
            assert not any(key.expert in slots[key.layer] for key in mine)
        assert assign_copies([placement], backup, given) == given  # type: ignore[arg-type]


def test_experts_that_lie_side_by_side_travel_as_one() -> None:
    serving = make_serving(12, 1, Redundancy(num_redundant=0))
    plan = plan_change(serving, ["rank-0", "rank-1"], 8, Redundancy(num_redundant=0))
    fetches = [fetch for fetch in list_fetches(plan) if fetch.travels]
    runs = list(split_runs(fetches))
    assert [fetch for run in runs for fetch in run] == fetches
    for run in runs:
        first = run[0]
        for place, fetch in enumerate(run):
            assert fetch.held_in == first.held_in + place
            assert fetch.slots[0] == first.slots[0] + place
            assert (fetch.layer, fetch.source, fetch.member) == (first.layer, 0, 1)
    # Six experts of each layer, which its one holder has in order.
    assert len(runs) == 2
    in_host = [fetch._replace(held_in=IN_HOST) for fetch in fetches]
    assert len(list(split_runs(in_host))) == len(fetches)


def test_copies_follow_what_is_committed() -> None:
    before = place_in_order(1, 4, Topology(2, 2))
    # Rank 0 has slots of experts 0 and 1, rank 1 of 2 and 3.
    kept_by = assign_copies([before], "unreplicated", [(), ()])
    assert kept_by == [{CopyKey(0, 0, 2), CopyKey(0, 0, 3)}, {CopyKey(0, 0, 0), CopyKey(0, 0, 1)}]
    read: list[CopyKey] = []

    def read_copy(key: CopyKey) -> list[torch.Tensor]:
        read.append(key)
        return [torch.full((2,), float(key.expert))]

    rule = CopyRule("unreplicated", 0, kept_by, read_copy)
    copies = HostCopies({key: read_copy(key) for key in kept_by[0]}, rule)
    read.clear()
    swapped = Placement(np.array([[2, 1, 0, 3]]), 4, Topology(2, 2))
    copies.follow([swapped])
    assert copies.wait(10.0)
    assert set(copies) == {CopyKey(0, 0, 0), CopyKey(0, 0, 3)}
    assert read == [CopyKey(0, 0, 0)]
    assert copies[CopyKey(0, 0, 0)][0].tolist() == [0.0, 0.0]
    # Where a copy cannot be read, a death finds it missing.
    failing = HostCopies({}, CopyRule("unreplicated", 1, kept_by, {}.__getitem__))
    failing.follow([swapped])
    assert failing.wait(10.0)
    assert len(failing) == 0
    HostCopies().follow([swapped])


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        ([Word.OPEN, Word.OPEN], Word.OPEN),
        ([Word.OPEN, Word.SWITCH], Word.SWITCH),
        ([Word.LOST, Word.SWITCH], Word.SWITCH),
        ([Word.LOST, Word.ABORT], Word.ABORT),
        ([Word.LOST, Word.OPEN], Word.OPEN),
        ([Word.LOST, Word.LOST], Word.ABORT),
        ([Word.ASIDE, Word.ASIDE], Word.ASIDE),
        ([Word.ASIDE, Word.OPEN], Word.OPEN),
        ([Word.ASIDE, Word.LOST], Word.OPEN),
        ([Word.ASIDE, Word.ABORT], Word.ABORT),
        ([Word.BACK, Word.BACK], Word.BACK),
        ([Word.BACK, Word.OPEN], Word.OPEN),
        ([Word.BACK, Word.ASIDE], Word.OPEN),
    ],
)
def test_one_rank_that_knows_is_enough(words: list[Word], verdict: Word) -> None:
    assert settle([int(word) for word in words]) is verdict


def test_until_the_decision_whatever_fails_aborts() -> None:
    assert PHASES["preparing"].rollback == "abort"
    assert [PHASES["idle"].then, PHASES["preparing"].then] == ["preparing", "committing"]
    assert all(rule.deadline for rule in PHASES.values() if rule.rollback != "nothing")
