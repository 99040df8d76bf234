"""A plan from nothing: counts, packing, and the search to the target."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from equipoise.policy.flow.packing import count_replicas, pack_apart, pack_slots, sort_experts
from equipoise.policy.flow.pairs import pair_up, tune_counts
from equipoise.policy.flow.problem import Problem
from equipoise.policy.flow.search import improve
from equipoise.topology import FloatArray, IntArray, Topology


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
    if problem.in_pairs:
        padded = np.column_stack((counts, slots - counts.sum(axis=1)))
        load = pad(problem.load)
        looks = problem.options.max_looks
        no_goal = np.zeros(load.shape[0])
        return pair_up(load, tune_counts(load, padded, problem.least, problem.most, no_goal, looks))
    share = problem.load / counts
    order = sort_experts(share)
    if problem.spread > 1:
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
    return table


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
    home = np.empty((layers, num_groups), dtype=np.int64)
    np.put_along_axis(home, table, np.repeat(np.arange(nodes), slots)[None, :], axis=1)
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
