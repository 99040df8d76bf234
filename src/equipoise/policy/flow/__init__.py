"""The policy `flow`: from the placement that stands, the moves that gain most."""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import numpy as np

from equipoise.errors import PlacementError
from equipoise.placement import Placement
from equipoise.policy.base import PlacementPolicy, check_load
from equipoise.policy.flow.fresh import plan_fresh
from equipoise.policy.flow.options import FlowOptions
from equipoise.policy.flow.problem import pose
from equipoise.policy.flow.standing import plan_from
from equipoise.policy.flow.survival import Survival, report_survival
from equipoise.topology import IntArray, Topology

__all__ = ["FlowOptions", "FlowPolicy", "Survival", "measure_leaving", "report_survival"]


class FlowPolicy(PlacementPolicy):
    """Balance for few moves: a local search from the standing placement under a budget.

    Without a standing placement it plans from nothing: replicas by a divisor rule, largest slots
    first onto the least busy rank, then swaps and replica transfers until the target. With one,
    every layer's gain per received expert is weighed against the other layers'. It does not put an
    expert twice on one rank and leaves a slot empty instead; only a layer for which no search
    does as well as the published layout is laid out as published. Its loops are compiled when it is
    made, and run without the interpreter lock.

    Args:
        options: budgets, hierarchy, speeds, survival; the defaults move at most 5% of the slots.
    """

    name: ClassVar[str] = "flow"

    def __init__(self, options: FlowOptions | None = None) -> None:
        self.options = options or FlowOptions()
        warm_up()

    def place(
        self, load: IntArray, topology: Topology, *, standing: Placement | None = None
    ) -> Placement:
        """Choose which experts each slot holds.

        Args:
            load: [L, E] int64, tokens per expert over the window.
            topology: ranks, nodes and slots.
            standing: the placement in force; no layer's balance falls below what it gives.
        Returns:
            Placement with slot_to_expert [L, P]; -1 where a slot stays empty.
        Collective: none; the same on every rank for the same input.
        Raises: PlacementError if P < E, the load or the standing placement is of another shape,
            or the options do not fit.
        """
        tokens = check_load(load, topology)
        problem = pose(tokens, topology, self.options)
        if standing is None:
            table = plan_fresh(problem)
        else:
            _check_alike(standing, tokens, topology)
            table = plan_from(problem, np.array(standing.slot_to_expert))
        return Placement(table, tokens.shape[1], topology)


@cache
def warm_up() -> None:
    """Compile every loop that a plan runs, or load it from numba's cache; once per process.

    Collective: none.
    """
    load = np.arange(1, 9, dtype=np.int64)[None, :].repeat(2, axis=0)
    load[1, -1] = 99
    for topology, options in (
        (Topology(4, 3), FlowOptions(rank_move_budget=0.5)),
        (Topology(6, 2), FlowOptions()),
        (Topology(4, 4, 2), FlowOptions(survival="node")),
    ):
        problem = pose(load, topology, options)
        plan_from(problem, plan_fresh(problem))


def measure_leaving(load: IntArray, placement: Placement, num_groups: int) -> float:
    """Fraction of tokens that are served off the node of their expert's group.

    Args:
        load: [L, E] int64, tokens per expert.
        placement: where experts are; each group must be whole on some node.
        num_groups: equal groups that consecutive experts form.
    Returns:
        Mean over layers, 0 to 1.
    Collective: none.
    Raises: PlacementError if a group is whole on no node, so that it has no home.
    """
    tokens = check_load(load, placement.topology)
    _check_alike(placement, tokens, placement.topology)
    options = FlowOptions(num_groups=num_groups, hierarchy="relaxed")
    problem = pose(tokens, placement.topology, options)
    home = problem.find_homes(placement.slot_to_expert)
    if (home < 0).any():
        layer, expert = np.argwhere(home < 0)[0]
        raise PlacementError(
            f"layer {layer}: no node holds all of expert {expert}'s group, so it has no home"
        )
    return float(problem.leaving_share(placement.slot_to_expert, home).mean())


def _check_alike(standing: Placement, load: IntArray, topology: Topology) -> None:
    shape = (standing.num_layers, standing.num_experts)
    if shape != load.shape or standing.topology != topology:
        raise PlacementError(
            f"the standing placement is {shape[0]} layers x {shape[1]} experts on "
            f"{standing.topology}, the load is {load.shape[0]} x {load.shape[1]} for {topology}"
        )
