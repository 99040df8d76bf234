"""A plan from nothing: counts, packing, and the search to the target."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from equipoise.policy.flow.packing import count_replicas, pack_apart, pack_slots, sort_experts
from equipoise.policy.flow.pairs import pair_up, tune_counts, weigh_pairs
from equipoise.policy.flow.problem import Problem
from equipoise.policy.flow.published import pack_heaviest_first, publish
from equipoise.policy.flow.search import improve
from equipoise.topology import FloatArray, IntArray, Topology

DELTAS = (0.5, 0.25, 0.75, 1.0)
"""Divisor rules whose counts are tried for pairs of slots, beside the published one, 0."""
ROUNDING = 1.0 + 1e-13
"""Sums of the same loads in another order may differ by so much."""


def plan_fresh(problem: Problem) -> IntArray:
    """Place every layer without regard to what stands.

    Args:
        problem: load, ranks and options.
    Returns:
        slot_to_expert [L, P] int64.
    Collective: none.
    """
    if not problem.in_groups:
        return _place_flat(problem)
    home = _home_groups(problem)
    table = _place_by_node(problem, home)
    _home_as_published(problem, home, table)
    if problem.options.hierarchy == "relaxed":
        _search(problem, table, home)
    return table


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


def _place_flat(problem: Problem) -> IntArray:
    if problem.in_pairs:
        return _place_pairs(problem)
    table = pack_alone(problem)
    _search(problem, table, None)
    _start_from_published(problem, table, problem.least_peak)
    return table


def _place_pairs(problem: Problem) -> IntArray:
    """Pairs of slots: counts by a divisor rule, tuned where they miss the target."""
    load, layers = pad(problem.load), problem.load.shape[0]
    published = _count_padded(problem, 0.0)
    weight = weigh_pairs(load, published)
    floor, counts = weight[:, 0] * problem.ideal, published.copy()
    missed = np.arange(layers)
    for delta in DELTAS:
        missed = missed[weight[missed, 0] * problem.options.target > 1.0]
        some = replace(problem, load=problem.load[missed])
        other = _count_padded(some, delta)
        weighed = weigh_pairs(load[missed], other)
        enough = weighed[:, 0] * problem.options.target <= 1.0
        # Even pairs are what tuning is best begun with, not a low peak.
        better = enough | (weighed[:, 1] < weight[missed, 1])
        counts[missed[better]], weight[missed[better]] = other[better], weighed[better]
    for start in (counts, published):
        missed = missed[weight[missed, 0] * problem.options.target > 1.0]
        other = _tune(replace(problem, load=problem.load[missed]), start[missed])
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
    some, reached = replace(problem, load=problem.load[layers]), reached[layers]
    published = publish(some.load, topology.num_slots, topology.num_ranks)
    if layers.size == 0:  # only now: the first plan compiles what later ones run
        return
    balance = some.balance(published)
    better = np.flatnonzero(balance > reached * ROUNDING)
    if better.size == 0:
        return
    layers, published, balance = layers[better], published[better], balance[better]
    some, searched = replace(problem, load=problem.load[layers]), published.copy()
    if problem.in_pairs:  # tuned as far as they go; to be as good as published is enough
        searched = table[layers].copy()
        _search(some, searched, None, some.ideal / balance)
    else:
        _search(some, searched, None)
    as_good = some.balance(searched) * ROUNDING >= balance
    table[layers] = np.where(as_good[:, None], searched, published)


def _search(
    problem: Problem, table: IntArray, home: IntArray | None, goal: FloatArray | None = None
) -> None:
    improve(
        problem.load,
        table,
        table,
        problem.bounds(
            problem.goal if goal is None else goal,
            frugal=False,
            max_steps=4 * problem.topology.num_slots,
            home=home,
        ),
    )


def _home_groups(problem: Problem) -> IntArray:
    """Node of each expert, [L, E]: groups packed onto nodes by their load, then exchanged."""
    layers, num_groups = problem.load.shape[0], problem.options.num_groups
    nodes = problem.topology.num_nodes
    load = problem.load.reshape(layers, num_groups, -1).sum(axis=2)
    speed = (1.0 / problem.slowness).reshape(nodes, -1).sum(axis=1)
    slots = num_groups // nodes
    ones = np.ones(load.shape, dtype=np.int64)
    table = pack_slots(load, sort_experts(load), ones, slots, speed.mean() / speed)
    of_nodes = replace(
        problem,
        load=load,
        topology=Topology(nodes, slots),
        slowness=speed.mean() / speed,
        least=1,
        most=1,
        spread=1,
    )
    _search(of_nodes, table, None)
    return _spread_homes(problem, table)


def _home_as_published(problem: Problem, home: IntArray, table: IntArray) -> None:
    """Where the published homes of groups may do better than ours, see whether they do."""
    layers, num_groups = problem.load.shape[0], problem.options.num_groups
    nodes = problem.topology.num_nodes
    load = problem.load.reshape(layers, num_groups, -1).sum(axis=2)
    order = pack_heaviest_first(load, nodes)
    heaviest = np.take_along_axis(load, order, axis=1).reshape(layers, nodes, -1).sum(axis=2).max(1)
    balance = problem.balance(table)
    may = balance * heaviest < problem.ideal * problem.topology.ranks_per_node
    layers_left = np.flatnonzero(may)
    if layers_left.size == 0:
        return
    published = _spread_homes(problem, order)[layers_left]
    some = replace(problem, load=problem.load[layers_left])
    other = _place_by_node(some, published)
    better = some.balance(other) > balance[layers_left]
    table[layers_left[better]], home[layers_left[better]] = other[better], published[better]


def _spread_homes(problem: Problem, groups: IntArray) -> IntArray:
    """Node of each expert, [L, E], from the groups of each node, [L, G] in the nodes' order."""
    num_groups, nodes = groups.shape[1], problem.topology.num_nodes
    home = np.empty_like(groups)
    np.put_along_axis(home, groups, np.repeat(np.arange(nodes), num_groups // nodes)[None], axis=1)
    return np.repeat(home, problem.num_experts // num_groups, axis=1)


def _place_by_node(problem: Problem, home: IntArray) -> IntArray:
    """Place each node's experts on its ranks alone."""
    topology = problem.topology
    nodes, ranks = topology.num_nodes, topology.ranks_per_node
    table = np.empty((problem.load.shape[0], nodes, ranks * topology.slots_per_rank), np.int64)
    # Experts in the order of their nodes; each node has equally many.
    experts = np.argsort(home, axis=1, kind="stable").reshape(home.shape[0], nodes, -1)
    for node in range(nodes):
        slowness = problem.slowness[node * ranks : (node + 1) * ranks]
        on_node = replace(
            problem,
            load=np.take_along_axis(problem.load, experts[:, node], axis=1),
            topology=Topology(ranks, topology.slots_per_rank),
            slowness=slowness / slowness.mean(),
            most=min(problem.most, ranks),
            spread=1,
        )
        local = _place_flat(on_node)
        named = np.take_along_axis(experts[:, node], np.maximum(local, 0), axis=1)
        table[:, node] = np.where(local >= 0, named, -1)
    return table.reshape(table.shape[0], -1)
