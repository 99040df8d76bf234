"""Replays: figures worked out by hand, no look ahead, and the choice among configurations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from equipoise.bundled.traces import gptoss_routes
from equipoise.errors import ConfigError, TraceError
from equipoise.load.trace import LoadTrace
from equipoise.load.trace_files import read_trace
from equipoise.placement import Placement
from equipoise.policy import get_policy
from equipoise.sim.cost import CostModel, fit_times, share_times
from equipoise.sim.policies import FlowChoices, make_policy
from equipoise.sim.proposal import count_matched, propose
from equipoise.sim.recommend import Replay, describe, make_configurations
from equipoise.sim.replay import IN_ORDER, Configuration, Setting, play
from equipoise.topology import Topology

TWO = Topology(2, 2)
EARLY, LATE = [4, 4, 1, 1], [4, 1, 4, 1]
"""In order 8 and 2 tokens, then 5 and 5; balanced by {0, 2}, {1, 3}, then by {0, 1}, {2, 3}."""
COST = CostModel(
    layer_s=0.001, token_s=0.001, expert_bytes=1_000_000, link_gb_per_s=1.0, stall_s=0.002
)


def make_trace(num_early=4, num_late=4):
    return LoadTrace(np.array([[EARLY]] * num_early + [[LATE]] * num_late))


def make_replay(trace, configurations, setting):
    baseline = play(trace, Configuration(policy=IN_ORDER, topology=TWO), setting)
    outcomes = tuple(play(trace, one, setting) for one in configurations)
    return Replay(trace, setting, baseline, outcomes)


def test_every_figure_of_a_small_replay():
    setting = Setting(cost=COST, warm_up_steps=2)
    anew = Configuration(policy="deepseek", topology=TWO, interval_steps=2)
    replay = make_replay(make_trace(), [anew], setting)
    (outcome,) = replay.outcomes
    assert outcome.start is not None
    # In force: {0, 2}, {1, 3} for two early steps, still for two late ones, then {0, 1}, {2, 3}.
    plans = (outcome.start, *outcome.rebalances)
    assert [one.step for one in plans] == [2, 4, 6]
    assert [one.planned for one in plans] == [1.0, 1.0, 1.0]
    assert [one.following for one in plans] == [1.0, 5 / 8, 1.0]
    assert [one.received for one in outcome.rebalances] == [0, 2]
    assert [one.received_matched for one in outcome.rebalances] == [0, 2]
    assert outcome.bytes == 2_000_000
    assert outcome.received_share == 2 / (2 * 4)
    # Each rank receives one expert of 1 MB over 1 GB/s; both plans stall for 2 ms.
    assert outcome.lost_s == pytest.approx(0.002 + 0.002 + 0.001)
    assert outcome.step_s == pytest.approx([0.006, 0.006, 0.009, 0.009, 0.006, 0.006])
    assert outcome.per_step.tolist() == [1.0, 1.0, 5 / 8, 5 / 8, 1.0, 1.0]
    assert outcome.realised == 30 / (5 + 5 + 8 + 8 + 5 + 5)
    assert outcome.rank_load.tolist() == [[5 + 5 + 8 + 8 + 5 + 5, 5 + 5 + 2 + 2 + 5 + 5]]
    assert replay.baseline.step_s == pytest.approx([0.009] * 2 + [0.006] * 4)
    assert replay.gain(outcome) == pytest.approx(0.0)
    assert replay.net_gain(outcome) == pytest.approx(-0.005 / 0.042)


def test_the_reason_says_that_none_pays():
    anew = Configuration(policy="deepseek", topology=TWO, interval_steps=2)
    replay = make_replay(make_trace(), [anew], Setting(cost=COST, warm_up_steps=2))
    assert replay.recommended() is None
    assert replay.reason() == (
        "None pays: the best, deepseek every 2 steps, 4 slots, saves 0.0% of the step time and "
        "loses 11.9% to 2 received experts; leave experts in order."
    )


def test_of_those_that_gain_alike_the_one_that_moves_least_is_recommended():
    trace = make_trace(num_late=0)
    configurations = make_configurations(["deepseek"], [1, None], [TWO], [])
    setting = Setting(cost=dataclasses.replace(COST, stall_s=0.0), warm_up_steps=1)
    replay = make_replay(trace, configurations, setting)
    assert [replay.net_gain(one) for one in replay.outcomes] == pytest.approx([1 / 3, 1 / 3])
    assert replay.recommended() is replay.outcomes[0]
    assert replay.outcomes[0].received == replay.outcomes[1].received == 0
    drifting = make_replay(make_trace(3, 9), configurations, setting)
    anew, once = drifting.outcomes
    assert drifting.net_gain(anew) > drifting.net_gain(once)
    assert drifting.recommended() is anew
    assert drifting.reason() == (
        "deepseek every 1 steps, 4 slots, saves 4.2% of the step time and loses 1.4% to 2 received "
        "experts, net +2.8%; next is deepseek planned once, 4 slots: -29.2% for 0 received experts."
    )


def test_plans_see_the_past_alone():
    trace = read_trace(gptoss_routes())
    setting = Setting(cost=COST, warm_up_steps=20, window_steps=15)
    flow = Configuration(policy="flow", topology=Topology(8, 5), interval_steps=10)
    whole = play(trace, flow, setting)
    turned = trace.counts.copy()
    turned[60:] = turned[60:, :, ::-1]
    other = play(LoadTrace(turned), flow, setting)
    assert whole.rebalances[:3] == other.rebalances[:3]
    # The fourth plan, before step 60, is the same; what follows it is not.
    assert whole.rebalances[3].received == other.rebalances[3].received
    assert whole.rebalances[3].planned == other.rebalances[3].planned
    assert whole.rebalances[3].following != other.rebalances[3].following


def test_a_replay_is_the_same_every_time_and_flow_keeps_its_budget():
    trace = read_trace(gptoss_routes())
    setting = Setting(cost=COST, warm_up_steps=50)
    flow, anew = (
        Configuration(policy=policy, topology=Topology(8, 5), interval_steps=50, move_budget=budget)
        for policy, budget in (("flow", 0.02), ("deepseek", None))
    )
    outcome = play(trace, flow, setting)
    again = play(trace, flow, setting)
    assert outcome.rebalances == again.rebalances
    assert outcome.step_s.tobytes() == again.step_s.tobytes()
    assert 0 < max(one.received for one in outcome.rebalances) <= 0.02 * 12 * 40
    published = play(trace, anew, setting)
    assert published.received_matched < published.received
    assert outcome.received < published.received_matched / 10


def test_steps_are_all_played_in_pieces_too(monkeypatch):
    trace = make_trace(7, 6)
    setting = Setting(cost=COST, warm_up_steps=2)
    anew = Configuration(policy="deepseek", topology=TWO, interval_steps=3)
    seen = []
    whole = play(trace, anew, setting, seen.append)
    assert seen == [3, 3, 3, 2]
    monkeypatch.setattr("equipoise.sim.replay.CHUNK_ENTRIES", 8)
    pieces = play(trace, anew, setting)
    assert pieces.most.tolist() == whole.most.tolist()
    assert pieces.rank_load.tolist() == whole.rank_load.tolist()


def test_an_idle_step_takes_no_time_and_is_balanced():
    trace = LoadTrace(np.array([[EARLY], [[0] * 4], [EARLY]]))
    setting = Setting(cost=COST, warm_up_steps=1)
    outcome = play(trace, Configuration(policy=IN_ORDER, topology=TWO), setting)
    assert outcome.per_step.tolist() == [1.0, 5 / 8]
    assert outcome.step_s == pytest.approx([0.0, 0.009])


def test_sums_have_no_time_to_set_moves_against():
    counts = np.array([[EARLY], [LATE], [LATE]])
    anew = Configuration(policy="deepseek", topology=TWO, interval_steps=1)
    replay = make_replay(
        LoadTrace(counts, is_sum=True), [anew], Setting(cost=COST, warm_up_steps=1)
    )
    assert replay.outcomes[0].lost_s > 0
    assert replay.loss(replay.outcomes[0]) == 0.0


@pytest.mark.parametrize(
    ("counts", "is_sum", "message"),
    [
        (
            [[EARLY]],
            True,
            "1 sums, each played as a step, leave none to judge after a warm-up of 1",
        ),
        ([[EARLY]], False, "1 steps leave none to judge after a warm-up of 1: give a longer trace"),
        ([[EARLY], [[0] * 4]], False, "no tokens at all after the warm-up"),
    ],
)
def test_a_trace_that_cannot_be_judged_is_refused(counts, is_sum, message):
    trace = LoadTrace(np.array(counts), is_sum)
    with pytest.raises(TraceError) as caught:
        play(
            trace,
            Configuration(policy=IN_ORDER, topology=TWO),
            Setting(cost=COST, warm_up_steps=1),
        )
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("configuration", "setting", "message"),
    [
        ({"interval_steps": 0}, {}, "interval_steps must be at least 1, got 0"),
        ({}, {"window_steps": 0}, "window_steps must be at least 1, got 0"),
        ({}, {"warm_up_steps": 0}, "warm_up_steps must be at least 1, got 0"),
        ({"policy": "deepsek"}, {}, "no policy 'deepsek': did you mean 'deepseek'?"),
        ({"move_budget": 0.1}, {}, "policy 'deepseek' takes no move_budget: flow does"),
    ],
)
def test_options_that_cannot_be_are_refused(configuration, setting, message):
    with pytest.raises(ConfigError) as caught:
        play(
            make_trace(),
            Configuration(**{"policy": "deepseek", "topology": TWO} | configuration),
            Setting(**{"cost": COST, "warm_up_steps": 2} | setting),
        )
    assert message in str(caught.value)


def test_combinations_that_make_no_difference_are_played_once():
    made = make_configurations(["deepseek", "flow"], [10, None], [TWO], [0.02, 0.1])
    assert [describe(one) for one in made] == [
        "deepseek every 10 steps, 4 slots",
        "deepseek planned once, 4 slots",
        "flow every 10 steps, at most 2% of 4 slots moved",
        "flow every 10 steps, at most 10% of 4 slots moved",
        "flow planned once, 4 slots",
    ]


def test_ranks_that_only_exchange_names_receive_nothing():
    topology = Topology(4, 1, 2)
    old = Placement(np.array([[0, 1, 2, 3]]), 4, topology)
    assert (
        count_matched(old, Placement(np.array([[3, 0, 1, 2]]), 4, topology), within_nodes=False)
        == 0
    )
    # Whole nodes may exchange names, then ranks within each; 1 and 2 have left their partners.
    swapped = Placement(np.array([[3, 2, 1, 0]]), 4, topology)
    assert count_matched(old, swapped, within_nodes=True) == 0
    mixed = Placement(np.array([[0, 2, 1, 3]]), 4, topology)
    assert count_matched(old, mixed, within_nodes=True) == 2


def test_a_proposal_says_what_changes():
    load = np.array([EARLY])
    fresh = propose(load, TWO, get_policy("deepseek"))
    assert fresh.plan.old.slot_to_expert.tolist() == [[0, 1, 2, 3]]
    assert fresh.rank_load_before.tolist() == [[8.0, 2.0]]
    assert fresh.rank_load_after.tolist() == [[5.0, 5.0]]
    assert (fresh.balancedness_before.tolist(), fresh.balancedness_after.tolist()) == ([0.625], [1])
    assert fresh.plan.num_moves == 2
    kept = propose(load, TWO, get_policy("deepseek"), fresh.plan.new)
    assert kept.plan.num_moves == 0


def test_policies_take_the_options_that_are_theirs():
    assert make_policy("deepseek", num_groups=2).num_groups == 2
    flow = make_policy("flow", 2, FlowChoices(move_budget=0.1))
    assert (flow.options.hierarchy, flow.options.move_budget) == ("strict", 0.1)
    assert make_policy("flow", 1, FlowChoices(hierarchy="relaxed")).options.hierarchy == "relaxed"
    with pytest.raises(ConfigError, match="policy 'deepseek' takes no hierarchy: flow does"):
        make_policy("deepseek", 1, FlowChoices(hierarchy="strict"))


def test_times_are_fitted_to_what_was_measured():
    assert fit_times([10, 20, 40], [0.3, 0.5, 0.9]) == pytest.approx((0.1, 0.02))
    # The line of least squares would begin below zero.
    assert fit_times([1, 2], [0.1, 0.4]) == pytest.approx((0.0, (0.1 + 0.8) / 5))


@pytest.mark.parametrize(
    ("tokens", "seconds", "message"),
    [
        ([1], [1], "measurements must be as many seconds as tokens, of at least two different"),
        ([1, 2], [1], "measurements must be as many seconds as tokens"),
        ([3, 3], [1, 2], "of at least two different loads"),
        ([1, 2], [1, float("nan")], "measurements must be finite"),
        ([1, 2], [2, 1], "measured seconds do not grow with tokens: -1 s per token"),
    ],
)
def test_measurements_that_say_nothing_are_refused(tokens, seconds, message):
    with pytest.raises(ConfigError) as caught:
        fit_times(tokens, seconds)
    assert message in str(caught.value)


def test_a_balanced_step_takes_the_time_that_was_given():
    trace = make_trace(0, 3)
    layer_s, token_s = share_times(trace, 2, 0.02, 0.5)
    assert (layer_s, token_s) == pytest.approx((0.01, 0.002))
    cost = CostModel(layer_s=layer_s, token_s=token_s)
    outcome = play(
        trace, Configuration(policy=IN_ORDER, topology=TWO), Setting(cost=cost, warm_up_steps=1)
    )
    assert outcome.step_s == pytest.approx([0.02, 0.02])
    for step_s, share, name in ((0.0, 0.5, "step_s"), (0.1, 0.0, "expert_share")):
        with pytest.raises(ConfigError, match=f"{name} must be above 0"):
            share_times(trace, 2, step_s, share)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layer_s", -1.0, "layer_s must be 0 or more seconds, got -1.0"),
        ("stall_s", float("inf"), "stall_s must be 0 or more seconds, got inf"),
        ("expert_bytes", 0, "expert_bytes must be at least 1, got 0"),
        ("link_gb_per_s", 0.0, "link_gb_per_s must be above 0, got 0.0"),
    ],
)
def test_costs_that_cannot_be_are_refused(field, value, message):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(COST, **{field: value})
    assert str(caught.value) == message
