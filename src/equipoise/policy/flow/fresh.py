"""A plan from nothing: counts, packing, and the search to the target."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from equipoise.policy.flow.packing import count_replicas, pack_apart, pack_slots, sort_experts
from equipoise.policy.flow.pairs import pair_up, tune_counts
from equipoise.policy.flow.problem import Problem
from equipoise.policy.flow.published import pack_heaviest_first, publish
from equipoise.policy.flow.search import improve
from equipoise.topology import FloatArray, IntArray, Topology

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


def _place_flat(problem: Problem) -> IntArray:
    topology, slots = problem.topology, problem.topology.num_slots
    counts = count_replicas(problem.load, slots, problem.least, problem.most, 0.0)
    share = problem.load / counts
    order = sort_experts(share)
    if problem.in_pairs:
        padded = np.column_stack((counts, slots - counts.sum(axis=1)))
        table = _place_pairs(problem, padded)
    elif problem.spread > 1:
        table = pack_apart(
            order,
            counts,
            topology.slots_per_rank,
            topology.num_ranks,
            problem.node_of_rank,
            problem.spread,
        )
    else:
        table = pack_slots(share, order, counts, topology.slots_per_rank, problem.slowness)
    _search(problem, table, None)
    if problem.least == 1 and problem.most == topology.num_ranks:
        _start_from_published(problem, table)
    return table


def _place_pairs(problem: Problem, counts: IntArray) -> IntArray:
    load = pad(problem.load)
    no_goal = np.zeros(load.shape[0])
    least, most, looks = problem.least, problem.most, problem.options.max_looks
    return pair_up(load, tune_counts(load, counts, least, most, no_goal, looks))


def _start_from_published(problem: Problem, table: IntArray) -> None:
    """Where the published layout is better, search from there; no layer stays below it.

    Only where no search did as well does it stand as it is, a second replica on a rank included.
    """
    topology = problem.topology
    published = publish(problem.load, topology.num_slots, topology.num_ranks)
    reached, balance = problem.balance(table), problem.balance(published)
    layers = np.flatnonzero(balance > reached * ROUNDING)
    if layers.size == 0:
        return
    some = replace(problem, load=problem.load[layers])
    published, balance = published[layers], balance[layers]
    searched = published.copy()
    _search(some, searched, None)
    better = some.balance(searched) * ROUNDING >= balance
    table[layers] = np.where(better[:, None], searched, published)


def _search(problem: Problem, table: IntArray, home: IntArray | None) -> None:
    goal = problem.ideal / problem.options.target
    steps = 4 * problem.topology.num_slots
    improve(
        problem.load,
        table,
        table,
        problem.bounds(goal, frugal=False, max_steps=steps, home=home),
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
