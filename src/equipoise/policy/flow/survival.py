"""Which experts would be lost with each rank or node."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.placement import Placement
from equipoise.topology import IntArray


@dataclass(frozen=True)
class Survival:
    """What a placement outlives.

    Attributes:
        lost_with_rank: [L, R] int64, experts that no other rank holds.
        lost_with_node: [L, N] int64, experts that no other node holds.
        fewest_ranks: ranks that hold the least covered expert.
        fewest_nodes: nodes that hold the least covered expert.
    """

    lost_with_rank: IntArray
    lost_with_node: IntArray
    fewest_ranks: int
    fewest_nodes: int

    @property
    def outlives_any_rank(self) -> bool:
        """Whether every expert outlives the death of any one rank."""
        return self.fewest_ranks > 1

    @property
    def outlives_any_node(self) -> bool:
        """Whether every expert outlives the death of any one node."""
        return self.fewest_nodes > 1


def report_survival(placement: Placement) -> Survival:
    """Count what the death of each rank and node would lose.

    Args:
        placement: where experts are.
    Collective: none.
    """
    topology = placement.topology
    by_rank = _holders(placement, topology.num_ranks)
    by_node = _holders(placement, topology.num_nodes)
    return Survival(
        lost_with_rank=_lost(by_rank),
        lost_with_node=_lost(by_node),
        fewest_ranks=int(by_rank.sum(axis=1).min()),
        fewest_nodes=int(by_node.sum(axis=1).min()),
    )


def _holders(placement: Placement, num_groups: int) -> IntArray:
    """[L, G, E] 1 where a group of slots holds an expert."""
    slots = placement.slot_to_expert.reshape(placement.num_layers, num_groups, -1)
    holds = np.zeros((*slots.shape[:2], placement.num_experts + 1), dtype=np.int64)
    np.put_along_axis(holds, np.where(slots >= 0, slots, placement.num_experts), 1, axis=2)
    return holds[..., :-1]


def _lost(holds: IntArray) -> IntArray:
    alone = holds.sum(axis=1, keepdims=True) == 1
    return np.asarray((holds * alone).sum(axis=2), dtype=np.int64)
