"""A plan from nothing where groups of experts have a home node."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from equipoise.policy.flow.compiled import kernel
from equipoise.policy.flow.flat import place_flat, search
from equipoise.policy.flow.packing import pack_slots, sort_experts
from equipoise.policy.flow.problem import Problem
from equipoise.policy.flow.published import pack_heaviest_first
from equipoise.topology import FloatArray, IntArray, Topology


def place_in_groups(problem: Problem) -> IntArray:
    """Place every layer so that groups of experts have a home node.

    Args:
        problem: load, ranks and options, the hierarchy not off.
    Returns:
        slot_to_expert [L, P] int64; in a strict hierarchy no layer below what `deepseek` gives.
    Collective: none.
    """
    home = _home_groups(problem)
    if problem.options.hierarchy == "relaxed":
        may_leave, peak = _allow_leaving(problem, home)
        table = _place_relaxed(problem, home, may_leave)
        goal = np.maximum(problem.least_peak, peak) / problem.options.target
        search(problem, table, home, goal, problem.topology.num_slots, may_leave)
        return table
    table = _place_by_node(problem, home)
    _home_as_published(problem, home, table)
    return table


def _home_groups(problem: Problem) -> IntArray:
    """Node of each expert, [L, E]: groups packed onto nodes by their load, then exchanged."""
    layers, num_groups = problem.load.shape[0], problem.options.num_groups
    nodes = problem.topology.num_nodes
    load = problem.load.reshape(layers, num_groups, -1).sum(axis=2)
    speed = (1.0 / problem.slowness).reshape(nodes, -1).sum(axis=1)
    slots = num_groups // nodes
    ones = np.ones(load.shape, dtype=np.int64)
    table = pack_slots(load, sort_experts(load), ones, slots, speed.mean() / speed)
    if slots > 2 or problem.options.rank_speeds is not None:  # two are paired best already
        of_nodes = replace(
            problem,
            load=load,
            topology=Topology(nodes, slots),
            slowness=speed.mean() / speed,
            least=1,
            most=1,
            spread=1,
        )
        search(of_nodes, table)
    return _spread_homes(problem, table)


def _home_as_published(problem: Problem, home: IntArray, table: IntArray) -> None:
    """Where the published homes of groups may do better than ours, see whether they do."""
    layers, num_groups = problem.load.shape[0], problem.options.num_groups
    nodes = problem.topology.num_nodes
    load = problem.load.reshape(layers, num_groups, -1).sum(axis=2)
    order = pack_heaviest_first(load, nodes)
    heaviest = np.take_along_axis(load, order, axis=1).reshape(layers, nodes, -1).sum(axis=2).max(1)
    published = _spread_homes(problem, order)
    balance = problem.balance(table)
    may = balance * heaviest < problem.ideal * problem.topology.ranks_per_node
    layers_left = np.flatnonzero(may & (published != home).any(axis=1))
    if layers_left.size == 0:
        return
    published = published[layers_left]
    some = problem.take(layers_left)
    other = _place_by_node(some, published)
    better = some.balance(other) > balance[layers_left]
    table[layers_left[better]] = other[better]


def _spread_homes(problem: Problem, groups: IntArray) -> IntArray:
    """Node of each expert, [L, E], from the groups of each node, [L, G] in the nodes' order."""
    num_groups, nodes = groups.shape[1], problem.topology.num_nodes
    home = np.empty_like(groups)
    np.put_along_axis(home, groups, np.repeat(np.arange(nodes), num_groups // nodes)[None], axis=1)
    return np.repeat(home, problem.num_experts // num_groups, axis=1)


def _allow_leaving(problem: Problem, home: IntArray) -> tuple[FloatArray, FloatArray]:
    """What may leave home in each layer, so that the mean over layers is what the options allow.

    A layer that cannot reach the target with the mean gets what it needs, of what others do not
    need; where that is too little for all, those that need most get equally much.

    Args:
        problem: load, ranks and options.
        home: [L, E] int64, nodes.
    Returns:
        [L] float64, the fraction of each layer's tokens, and [L] float64, the busy time that
        its busiest rank has at least once so much has left.
    """
    nodes, layers, mean = problem.topology.num_nodes, len(home), problem.options.leaving
    speed = (1.0 / problem.slowness).reshape(nodes, -1).sum(axis=1)
    power = speed / speed.sum()
    total = np.maximum(problem.load.sum(axis=1, keepdims=True), 1.0)
    at_home = np.stack(
        [np.where(home == node, problem.load, 0.0).sum(axis=1) for node in range(nodes)], axis=1
    )
    at_home /= total
    need = np.maximum(at_home - power / problem.options.target, 0.0).sum(axis=1)
    lacking, spare = np.maximum(need - mean, 0.0), np.maximum(mean - need, 0.0)
    if lacking.sum() <= spare.sum():
        given = lacking.sum() / spare.sum() if lacking.any() else 0.0
        allowed = mean + lacking - given * spare
    else:
        least = np.sort(need)
        left = mean * layers - (least.cumsum() - least)
        allowed = np.minimum(need, (left / np.arange(layers, 0, -1)).max())
    # The busiest nodes are brought down together, to the level of the next.
    order = np.argsort(-at_home / power, axis=1, kind="stable")
    over = np.take_along_axis(at_home, order, axis=1).cumsum(axis=1) - allowed[:, None]
    level = (over / power[order].cumsum(axis=1)).max(axis=1)
    return allowed, np.asarray(np.maximum(level, 1.0) * problem.ideal)


def _place_by_node(problem: Problem, home: IntArray) -> IntArray:
    """Place each node's experts on its ranks alone; only the busiest node need be even."""
    topology = problem.topology
    layers, nodes, ranks = len(home), topology.num_nodes, topology.ranks_per_node
    # Experts in the order of their nodes; each node has equally many.
    experts = np.argsort(home, axis=1, kind="stable").reshape(layers, nodes, -1)
    speed = (1.0 / problem.slowness).reshape(nodes, ranks).mean(axis=1)
    # Nodes of the same speeds are planned as further layers.
    _, kind = np.unique(problem.slowness.reshape(nodes, ranks), axis=0, return_inverse=True)
    alike = [np.flatnonzero(kind.reshape(-1) == one) for one in range(kind.max() + 1)]
    stacks = [
        replace(
            problem,
            load=np.take_along_axis(problem.load[:, None], experts[:, some], axis=2)
            .swapaxes(0, 1)
            .reshape(some.size * layers, -1),
            topology=Topology(ranks, topology.slots_per_rank),
            slowness=problem.slowness.reshape(nodes, ranks)[some[0]] * speed[some[0]],
            most=min(problem.most, ranks),
            spread=1,
        )
        for some in alike
    ]
    peaks = [
        stack.least_peak.reshape(-1, layers) / speed[some[0]]
        for some, stack in zip(alike, stacks, strict=True)
    ]
    aim = np.concatenate(peaks).max(axis=0)
    table = np.empty((layers, nodes, ranks * topology.slots_per_rank), np.int64)
    for some, stack in zip(alike, stacks, strict=True):
        local = place_flat(stack, np.tile(aim * speed[some[0]], some.size))
        local = local.reshape(some.size, layers, -1).swapaxes(0, 1)
        named = np.take_along_axis(experts[:, some], np.maximum(local, 0), axis=2)
        table[:, some] = np.where(local >= 0, named, -1)
    return table.reshape(layers, -1)


def _place_relaxed(problem: Problem, home: IntArray, may_leave: FloatArray) -> IntArray:
    """Give nodes replicas so that they are even, and pack each node's onto its ranks."""
    topology = problem.topology
    layers, nodes = len(home), topology.num_nodes
    counts = problem.counts
    order = sort_experts(problem.load / counts)
    speed = (1.0 / problem.slowness).reshape(nodes, -1)
    by_node = _share_out(
        problem.load,
        counts,
        order,
        home,
        speed.sum(axis=1) / speed.sum(),
        topology.ranks_per_node * topology.slots_per_rank,
        may_leave,
    )
    share = problem.load / by_node.sum(axis=1)
    order = sort_experts(share)
    slots = topology.slots_per_rank
    tables = [
        pack_slots(share, order, np.ascontiguousarray(by_node[:, node]), slots, slowness)
        for node, slowness in enumerate(problem.slowness.reshape(nodes, -1))
    ]
    return np.stack(tables, axis=1).reshape(layers, -1)


@kernel
def _least_over(over: FloatArray, free: IntArray, home: int) -> int:
    """The node with room, other than home, that has least; -1 where there is none."""
    least = -1
    for node in range(over.size):
        if node != home and free[node] > 0 and (least < 0 or over[node] < over[least]):
            least = node
    return least


@kernel
def _call_back(load: FloatArray, by_node: IntArray, home: IntArray, most: float) -> None:
    """Drop replicas off home until no more tokens leave than may; for lack of room some did.

    The least that is enough goes, or the most that one replica brings back.
    """
    while True:
        leaves, best, brings = 0.0, -1, 0.0
        for expert in range(load.size):
            count, at_home = by_node[:, expert].sum(), by_node[home[expert], expert]
            leaves += load[expert] * (count - at_home) / count
        for expert in range(load.size):
            count, at_home = by_node[:, expert].sum(), by_node[home[expert], expert]
            if count > at_home:
                back = load[expert] * at_home / (count * (count - 1))
                enough, was_enough = back >= leaves - most, brings >= leaves - most
                if back < brings if enough and was_enough else back > brings:
                    best, brings = expert, back
        if leaves <= most or best < 0:
            return
        for node in range(by_node.shape[0] - 1, -1, -1):
            if node != home[best] and by_node[node, best] > 0:
                by_node[node, best] -= 1
                break


@kernel
def _share_out(
    load: FloatArray,
    counts: IntArray,
    order: IntArray,
    home: IntArray,
    power: FloatArray,
    slots_per_node: int,
    leaving: FloatArray,
) -> IntArray:
    """Which node each replica goes to: the first stays at home, others even the nodes out.

    Args:
        load: [L, E] float64.
        counts: [L, E] int64, replicas wanted.
        order: [L, E] int64, experts by falling share.
        home: [L, E] int64, nodes.
        power: [N] float64, fraction of the load that a node shall have.
        slots_per_node: slots of each.
        leaving: [L] float64, fraction of a layer's tokens that may be served off their home.
    Returns:
        [L, N, E] int64 replicas; fewer than wanted where there is no room that may be used.
    Collective: none.
    """
    num_layers, num_experts = load.shape
    num_nodes = power.size
    by_node = np.zeros((num_layers, num_nodes, num_experts), dtype=np.int64)
    for layer in range(num_layers):
        total = load[layer].sum()
        over, free = -power * total, np.full(num_nodes, slots_per_node)
        may_leave = leaving[layer] * total
        for expert in range(num_experts):
            node = home[layer, expert]
            by_node[layer, node, expert] = 1
            free[node] -= 1
            over[node] += load[layer, expert]
        for expert in order[layer]:
            node, share = home[layer, expert], load[layer, expert] / counts[layer, expert]
            for _ in range(counts[layer, expert] - 1):
                other = _least_over(over, free, node)
                goes = other >= 0 and share <= may_leave
                stays = free[node] > 0
                if stays and goes:
                    goes = over[other] + share < over[node]
                if goes:
                    may_leave -= share
                    over[node] -= share
                    over[other] += share
                    free[other] -= 1
                    by_node[layer, other, expert] += 1
                elif stays:
                    free[node] -= 1
                    by_node[layer, node, expert] += 1
        _call_back(load[layer], by_node[layer], home[layer], leaving[layer] * total)
    return by_node
