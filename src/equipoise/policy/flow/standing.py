"""A plan from the placement that stands: what the move budget is best spent on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from equipoise.policy.flow.bounds import Log
from equipoise.policy.flow.budget import choose_points
from equipoise.policy.flow.flat import ROUNDING, count_pairs, pad
from equipoise.policy.flow.fresh import plan_fresh
from equipoise.policy.flow.matching import drop_doubles, keep_slots, match_ranks
from equipoise.policy.flow.pairs import recount, tune_counts
from equipoise.policy.flow.problem import Problem
from equipoise.policy.flow.replay import receive_by_rank, replay
from equipoise.policy.flow.search import improve
from equipoise.topology import FloatArray, IntArray

MAX_STEPS = 200
"""Changes of one search from the standing placement."""
AIMS = (0.99, 0.996, 1.0)
"""Fractions of the target that searches aim at: an easier one wastes no moves on the last bit."""
SLACKS = (1.0, 1.02, 1.06)
"""The same for pairs of slots, as multiples of the heaviest pair that a plan from nothing has."""


@dataclass(frozen=True)
class _Path:
    """Where a search began and what it did; its steps are points that a layer may stop at."""

    start: IntArray  # [L, P]
    log: Log


class _Points(NamedTuple):
    """Where each layer may end: 0 is the standing placement."""

    received: IntArray  # [L, Q]
    balance: FloatArray  # [L, Q], below 0 where a layer may not end
    by_rank: IntArray  # [L, Q, R], R = 0 without a rank budget


def plan_from(problem: Problem, standing: IntArray) -> IntArray:
    """Change what stands where the budget gains most.

    Candidates of each layer are the steps of searches from the standing placement, and a plan
    from nothing whose ranks are named after the standing ones. A layer never gets worse; one
    that the options do not allow as it stands is put right first, as far as the budget goes.

    Args:
        problem: load, ranks and options.
        standing: [L, P] int64, slot_to_expert in force.
    Returns:
        slot_to_expert [L, P] int64; experts that stay on a rank keep their slot.
    Collective: none.
    """
    fresh = plan_fresh(problem)
    named = _name_after(problem, standing, fresh)
    paths = _search_pairs(problem, standing, fresh) if problem.in_pairs else []
    may_leave = _allow_leaving(problem, standing, named)
    paths += _search(problem, standing, may_leave)
    points = _collect(problem, standing, named, paths, may_leave)
    budget, rank_budget, prices = _budgets(problem)
    chosen = choose_points(*points, prices, budget, rank_budget, problem.options.least_gain)
    table = standing.copy()
    first = 1
    for path in paths:
        steps = path.log.peak.shape[1]
        layers = np.flatnonzero((chosen >= first) & (chosen < first + steps))
        table[layers] = path.start[layers]
        replay(table, path.log, layers, chosen[layers] - first)
        first += steps
    anew = chosen == first
    table[anew] = named[anew]
    changed = np.flatnonzero(chosen > 0)
    rows = table[changed]
    keep_slots(standing[changed], rows, problem.topology.slots_per_rank)
    table[changed] = rows
    return table


def _name_after(problem: Problem, standing: IntArray, fresh: IntArray) -> IntArray:
    """Ranks may exchange names where speed and, if nodes matter, node are the same."""
    nodes_matter = problem.in_groups or problem.spread > 1
    node = problem.node_of_rank if nodes_matter else np.zeros_like(problem.node_of_rank)
    features = np.column_stack((node.astype(np.float64), problem.slowness))
    _, kinds = np.unique(features, axis=0, return_inverse=True)
    by_node = problem.slowness.reshape(problem.topology.num_nodes, -1)
    alike = nodes_matter and bool(np.all(by_node == by_node[0]))
    return match_ranks(
        standing,
        fresh,
        problem.num_experts,
        kinds.reshape(-1).astype(np.int64),
        problem.topology.num_nodes if alike else 1,
    )


def _allow_leaving(problem: Problem, standing: IntArray, named: IntArray) -> FloatArray | None:
    """What may leave home in each layer, [L]: what does, and its part of what the options spare.

    A layer that must be planned from nothing has what that plan needs. None unless relaxed.
    """
    if not problem.in_groups or problem.options.hierarchy == "strict":
        return None
    leaves = problem.leaving_share(standing, problem.find_homes(standing))
    anew = problem.leaving_share(named, problem.find_homes(named))
    leaves = np.where(problem.violates(standing), anew, leaves)
    return np.asarray(leaves + max(problem.options.leaving - leaves.mean(), 0.0))


def _search(problem: Problem, standing: IntArray, may_leave: FloatArray | None) -> list[_Path]:
    home = problem.find_homes(standing) if problem.in_groups else None
    start = standing.copy()
    drop_doubles(start, problem.topology.slots_per_rank)
    paths = []
    for aim in AIMS:
        bounds = problem.bounds(
            problem.goal / aim,
            frugal=True,
            max_steps=MAX_STEPS,
            home=home,
            may_leave=may_leave,
        )
        log = improve(problem.load, start.copy(), standing, bounds)
        paths.append(_Path(start, log))
    return paths


def _search_pairs(problem: Problem, standing: IntArray, fresh: IntArray) -> list[_Path]:
    """Change counts until the best pairs would do, then form them by swaps and rings."""
    load = pad(problem.load)
    balance = problem.balance(fresh)
    paths = []
    for slack in SLACKS:
        heaviest = slack / balance
        counts = tune_counts(
            load,
            count_pairs(standing, problem.num_experts),
            problem.least,
            problem.most,
            heaviest,
            0.0,
            problem.options.max_looks,
        )
        start = standing.copy()
        recount(load, start, counts)
        drop_doubles(start, problem.topology.slots_per_rank)
        bounds = problem.bounds(
            heaviest * problem.ideal, frugal=True, max_steps=MAX_STEPS, swaps_only=True
        )
        log = improve(problem.load, start.copy(), standing, bounds)
        paths.append(_Path(start, log))
    return paths


def _collect(
    problem: Problem,
    standing: IntArray,
    named: IntArray,
    paths: list[_Path],
    may_leave: FloatArray | None,
) -> _Points:
    layers, ranks = standing.shape[0], problem.topology.num_ranks
    ideal = problem.ideal[:, None]
    broken = problem.violates(standing)
    now = np.where(broken, -1.0, problem.balance(standing))
    fresh_by_rank = _receive(problem, standing, named)
    received, balance = [np.zeros((layers, 1), dtype=np.int64)], [now[:, None]]
    by_rank = [np.zeros((layers, 1, ranks), dtype=np.int64)]
    for path in paths:
        log = path.log
        done = np.arange(log.peak.shape[1]) < log.num_steps[:, None]
        reached = np.where(log.peak > 0.0, ideal / np.where(log.peak > 0.0, log.peak, 1.0), 1.0)
        received.append(log.received)
        balance.append(np.where(done & ~broken[:, None], reached, -2.0))
        if problem.has_rank_budget:
            by_rank.append(receive_by_rank(standing, path.start, log, ranks, problem.num_experts))
    received.append(fresh_by_rank.sum(axis=1)[:, None])
    anew = problem.balance(named)
    if may_leave is not None:
        leaves = problem.leaving_share(named, problem.find_homes(named))
        anew = np.where(leaves > may_leave * ROUNDING, -2.0, anew)
    balance.append(anew[:, None])
    by_rank.append(fresh_by_rank[:, None])
    # Beyond the target nothing is worth a move, unless moves are free.
    enough = problem.options.target if problem.has_budget else 1.0
    return _Points(
        np.concatenate(received, axis=1),
        np.minimum(np.concatenate(balance, axis=1), enough),
        np.concatenate(by_rank, axis=1)
        if problem.has_rank_budget
        else np.zeros((layers, 0, 0), dtype=np.int64),
    )


def _receive(problem: Problem, standing: IntArray, table: IntArray) -> IntArray:
    """Experts that each rank receives, [L, R]."""
    layers, ranks = table.shape[0], problem.topology.num_ranks
    before = problem.holds(standing.reshape(layers, ranks, -1))
    after = problem.holds(table.reshape(layers, ranks, -1))
    return np.asarray((after & ~before).sum(axis=2), dtype=np.int64)


def _budgets(problem: Problem) -> tuple[float, float, FloatArray]:
    """Budget for all ranks, for each rank, and what an expert of each layer costs of them."""
    options, topology = problem.options, problem.topology
    layers = problem.load.shape[0]
    prices = np.ones(layers)
    total = each = np.inf
    if options.move_budget is not None:
        total = options.move_budget * topology.num_slots * layers
    if options.rank_move_budget is not None:
        each = options.rank_move_budget * topology.slots_per_rank * layers
    if options.move_bytes is not None or options.rank_move_bytes is not None:
        prices = np.array(options.expert_bytes, dtype=np.float64)
        total = np.inf if options.move_bytes is None else float(options.move_bytes)
        each = np.inf if options.rank_move_bytes is None else float(options.rank_move_bytes)
    return total, each, prices
