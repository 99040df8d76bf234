"""One plan, and what it would change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.placement import Placement, measure_balancedness, place_in_order, spread_load
from equipoise.plan.transfer_plan import TransferPlan, make_plan
from equipoise.policy.base import PlacementPolicy
from equipoise.policy.flow.matching import match_ranks
from equipoise.topology import FloatArray, IntArray, Topology


@dataclass(frozen=True, eq=False)
class Proposal:
    """A placement made from a load, beside the one that it would replace.

    Attributes:
        load: [L, E] int64, tokens per expert that it was made from.
        plan: what moves from `plan.old` to `plan.new`.
    """

    load: IntArray
    plan: TransferPlan

    @property
    def rank_load_before(self) -> FloatArray:
        """[L, R] float64, tokens per rank on the placement that stands."""
        return spread_load(self.load, self.plan.old)

    @property
    def rank_load_after(self) -> FloatArray:
        """[L, R] float64, tokens per rank on the one that is planned."""
        return spread_load(self.load, self.plan.new)

    @property
    def balancedness_before(self) -> FloatArray:
        """[L] float64."""
        return measure_balancedness(self.rank_load_before)

    @property
    def balancedness_after(self) -> FloatArray:
        """[L] float64."""
        return measure_balancedness(self.rank_load_after)


def propose(
    load: IntArray,
    topology: Topology,
    policy: PlacementPolicy,
    previous: Placement | None = None,
) -> Proposal:
    """Make a plan from a load.

    Args:
        load: [L, E] int64, tokens per expert.
        topology: ranks, nodes and slots.
        policy: who plans.
        previous: the placement that stands; None to plan from nothing, and to count what moves
            against experts in order.
    Collective: none.
    Raises: PlacementError if they do not fit together.
    """
    new = policy.place(load, topology, standing=previous)
    num_layers, num_experts = load.shape
    old = previous or place_in_order(num_layers, num_experts, topology)
    return Proposal(load, make_plan(old, new))


def count_matched(old: Placement, new: Placement, *, within_nodes: bool) -> int:
    """Experts that would be received if ranks exchanged names so that most are where they were.

    Args:
        old: the placement that stands.
        new: the one that is planned, for the same ranks.
        within_nodes: whether ranks must stay with those that share their node; whole nodes may
            exchange names.
    Returns:
        Receives over all layers.
    Collective: none.
    """
    topology = new.topology
    ranks = np.arange(topology.num_ranks)
    kinds = topology.node_of_rank(ranks) if within_nodes else np.zeros_like(ranks)
    table = match_ranks(
        np.array(old.slot_to_expert),
        np.array(new.slot_to_expert),
        new.num_experts,
        kinds,
        topology.num_nodes if within_nodes else 1,
    )
    return make_plan(old, Placement(table, new.num_experts, topology)).num_moves
