"""Where ranks sit and how many slots each of them has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from equipoise.errors import PlacementError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Topology:
    """Ranks, their nodes and their slots.

    Ranks are numbered node by node: node n holds ranks n*R/N .. (n+1)*R/N - 1. Slots are
    numbered rank by rank: rank r holds slots r*S .. (r+1)*S - 1.

    Attributes:
        num_ranks: R, expert-parallel ranks.
        slots_per_rank: S, slots of each rank in every layer.
        num_nodes: N, hosts that the ranks are spread over evenly.
    Raises: PlacementError if a count is not positive or nodes do not divide ranks.
    """

    num_ranks: int
    slots_per_rank: int
    num_nodes: int = 1

    def __post_init__(self) -> None:
        for name in ("num_ranks", "slots_per_rank", "num_nodes"):
            if getattr(self, name) < 1:
                raise PlacementError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_ranks % self.num_nodes:
            raise PlacementError(
                f"{self.num_ranks} ranks cannot be spread evenly over {self.num_nodes} nodes"
            )

    @property
    def num_slots(self) -> int:
        """P = R * S, slots of all ranks in one layer."""
        return self.num_ranks * self.slots_per_rank

    @property
    def ranks_per_node(self) -> int:
        """R / N."""
        return self.num_ranks // self.num_nodes

    def rank_of_slot(self, slot: IntArray) -> IntArray:
        """Rank that owns each slot; any shape, -1 where the slot is -1."""
        return np.floor_divide(slot, self.slots_per_rank)

    def node_of_rank(self, rank: IntArray) -> IntArray:
        """Node on which each rank sits; any shape."""
        return np.floor_divide(rank, self.ranks_per_node)


def choose_num_redundant(num_experts: int, num_ranks: int, requested: int | None) -> int:
    """Settle how many redundant slots a layer has.

    Args:
        num_experts: E, experts of each layer.
        num_ranks: R.
        requested: redundant slots asked for, or None for the fewest that make slots divide by
            ranks and leave at least one spare slot per rank.
    Returns:
        P - E, so that R divides E plus the result.
    Raises: PlacementError if `requested` is negative or leaves slots that R does not divide.
    """
    if requested is None:
        return -num_experts % num_ranks + num_ranks
    if requested < 0:
        raise PlacementError(f"redundant experts must be 0 or more, got {requested}")
    if (num_experts + requested) % num_ranks:
        least = -num_experts % num_ranks
        raise PlacementError(
            f"{num_experts} experts and {requested} redundant ones make "
            f"{num_experts + requested} slots, which {num_ranks} ranks do not divide: "
            f"ask for {least}, {least + num_ranks} or {least + 2 * num_ranks} redundant experts"
        )
    return requested
