"""A plan from nothing where nodes do not matter: counts, packing, and the search to the target."""

from __future__ import annotations

import numpy as np

from equipoise.policy.flow.heavy import recount_heavy
from equipoise.policy.flow.packing import count_replicas, pack_apart, pack_slots, sort_experts
from equipoise.policy.flow.pairs import pair_up, tune_counts, weigh_pairs
from equipoise.policy.flow.problem import Problem
from equipoise.policy.flow.published import publish
from equipoise.policy.flow.search import improve
from equipoise.topology import FloatArray, IntArray

DELTAS = (0.5, 0.25, 0.75, 1.0)
"""Divisor rules whose counts are tried for pairs of slots, beside the published one, 0."""
HEAVY = 0.4
"""Part of the busiest rank that a slot fills if its expert's replicas are to be counted anew."""
ROUNDS = 8
"""Changes of heavy experts' counts per layer, at most."""
ROUNDING = 1.0 + 1e-13
"""Sums of the same loads in another order may differ by so much."""


def count_pairs(table: IntArray, num_experts: int) -> IntArray:
    """Replicas per expert, [L, E + 1] int64; the last counts empty slots.

    Args:
        table: [L, P] int64, -1 for an empty slot.
        num_experts: E.
    Collective: none.
    """
    layers = table.shape[0]
    index = np.where(table >= 0, table, num_experts) + np.arange(layers)[:, None] * (
        num_experts + 1
    )
    return np.bincount(index.reshape(-1), minlength=layers * (num_experts + 1)).reshape(layers, -1)


def pad(load: FloatArray) -> FloatArray:
    """Load with a last expert of no load, for empty slots: [L, E] -> [L, E + 1]."""
    return np.pad(load, ((0, 0), (0, 1)))


def pack_alone(problem: Problem) -> IntArray:
    """Count replicas and pack the largest first, without any search.

    Args:
        problem: load, ranks and options; groups of experts are not looked at.
    Returns:
        slot_to_expert [L, P] int64.
    Collective: none.
    """
    topology, counts = problem.topology, problem.counts
    share = problem.load / counts
    order = sort_experts(share)
    if problem.spread > 1:
        node_of_rank = problem.node_of_rank
        ranks, slots = topology.num_ranks, topology.slots_per_rank
        return pack_apart(order, counts, slots, ranks, node_of_rank, problem.spread)
    return pack_slots(share, order, counts, topology.slots_per_rank, problem.slowness)


def place_flat(problem: Problem, aim: FloatArray | None = None) -> IntArray:
    """Place every layer on ranks whose nodes do not matter.

    Args:
        problem: load, ranks and options.
        aim: [L] float64, busy time below which nothing is gained; None where there is none.
    Returns:
        slot_to_expert [L, P] int64, no layer below what `deepseek` gives, or what is aimed at.
    Collective: none.
    """
    if problem.in_pairs:
        return _place_pairs(problem)
    table = pack_alone(problem)
    least_peak = problem.least_peak if aim is None else np.maximum(problem.least_peak, aim)
    goal = least_peak / problem.options.target
    search(problem, table, goal=goal)
    _recount(problem, table, goal)
    _start_from_published(problem, table, least_peak)
    return table


def _recount(problem: Problem, table: IntArray, goal: FloatArray) -> None:
    """Where the search missed the goal and slots are heavy, search from counts that pack evenly."""
    reached = problem.ideal / problem.balance(table)
    heavy = (problem.load / problem.counts).max(axis=1) > HEAVY * goal
    layers = np.flatnonzero(heavy & (reached > goal * ROUNDING))
    if problem.spread > 1 or layers.size == 0:
        return
    some, slots = problem.take(layers), problem.topology.slots_per_rank
    counts = recount_heavy(
        some.load, some.counts, slots, some.slowness, some.least, some.most, goal[layers], ROUNDS
    )
    share = some.load / counts
    other = pack_slots(share, sort_experts(share), counts, slots, some.slowness)
    search(some, other, goal=goal[layers])
    better = some.ideal / some.balance(other) < reached[layers]
    table[layers[better]] = other[better]


def _place_pairs(problem: Problem) -> IntArray:
    """Pairs of slots: counts by a divisor rule, tuned where they miss the target."""
    load, layers = pad(problem.load), problem.load.shape[0]
    published = _count_padded(problem, 0.0)
    weight = weigh_pairs(load, published)
    floor, counts = weight[:, 0] * problem.ideal, published.copy()
    missed = np.arange(layers)
    for delta in DELTAS:
        missed = missed[weight[missed, 0] * problem.options.target > 1.0]
        some = problem.take(missed)
        other = _count_padded(some, delta)
        weighed = weigh_pairs(load[missed], other)
        enough = weighed[:, 0] * problem.options.target <= 1.0
        # Even pairs are what tuning is best begun with, not a low peak.
        better = enough | (weighed[:, 1] < weight[missed, 1])
        counts[missed[better]], weight[missed[better]] = other[better], weighed[better]
    for start in (counts, published):
        missed = missed[weight[missed, 0] * problem.options.target > 1.0]
        other = _tune(problem.take(missed), start[missed])
        heaviest = weigh_pairs(load[missed], other)[:, 0]
        better = heaviest < weight[missed, 0]
        counts[missed[better]], weight[missed[better], 0] = other[better], heaviest[better]
    table = pair_up(load, counts)
    # Where an expert may want more than R replicas, the published counts are not known here.
    floor[(published == problem.most).any(axis=1)] = 0.0
    _start_from_published(problem, table, floor)
    return table


def _count_padded(problem: Problem, delta: float) -> IntArray:
    slots = problem.topology.num_slots
    counts = count_replicas(problem.load, slots, problem.least, problem.most, delta)
    return np.column_stack((counts, slots - counts.sum(axis=1)))


def _tune(problem: Problem, counts: IntArray) -> IntArray:
    """Tune counts of pairs, with half of the looks that the options allow."""
    looks, enough = problem.options.max_looks // 2, 1.0 / problem.options.target
    no_goal = np.zeros(len(counts))
    load = pad(problem.load)
    return tune_counts(load, counts, problem.least, problem.most, no_goal, enough, looks)


def _start_from_published(problem: Problem, table: IntArray, floor: FloatArray) -> None:
    """Where the published layout is better, search from there; no layer stays below it.

    Only where no search did as well does it stand as it is, a second replica on a rank included.

    Args:
        problem: load, ranks and options.
        table: [L, P] int64, changed in place.
        floor: [L] float64, tokens that the published layout's busiest rank has at least.
    """
    topology = problem.topology
    if problem.least > 1 or problem.most < topology.num_ranks:
        return  # the published layout does not spread replicas as asked
    reached = problem.balance(table)
    layers = np.flatnonzero(reached * np.maximum(floor, problem.ideal) * ROUNDING < problem.ideal)
    some, reached = problem.take(layers), reached[layers]
    published = publish(some.load, topology.num_slots, topology.num_ranks)
    if layers.size == 0:  # only now: the first plan compiles what later ones run
        return
    balance = some.balance(published)
    better = np.flatnonzero(balance > reached * ROUNDING)
    if better.size == 0:
        return
    layers, published, balance = layers[better], published[better], balance[better]
    some, searched = problem.take(layers), published.copy()
    if problem.in_pairs:  # tuned as far as they go; to be as good as published is enough
        searched = table[layers].copy()
        search(some, searched, goal=some.ideal / balance)
    else:
        search(some, searched)
    as_good = some.balance(searched) * ROUNDING >= balance
    table[layers] = np.where(as_good[:, None], searched, published)


def search(
    problem: Problem,
    table: IntArray,
    home: IntArray | None = None,
    goal: FloatArray | None = None,
    max_steps: int | None = None,
    may_leave: FloatArray | None = None,
) -> None:
    """Search every layer until it is good enough, changing the table in place.

    Args:
        problem: load, ranks and options.
        table: [L, P] int64.
        home: [L, E] int64, nodes that experts must stay on; None where nodes do not matter.
        goal: [L] float64, busy time at which a layer is good enough; None for the problem's.
        max_steps: changes per layer, at most; None for four per slot.
        may_leave: [L] float64, fraction of each layer's tokens that may leave home; None for
            what the options say.
    Collective: none.
    """
    improve(
        problem.load,
        table,
        table,
        problem.bounds(
            problem.goal if goal is None else goal,
            frugal=False,
            max_steps=4 * problem.topology.num_slots if max_steps is None else max_steps,
            home=home,
            may_leave=may_leave,
        ),
    )
