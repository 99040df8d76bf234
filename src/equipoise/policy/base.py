"""The contract of a placement policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from equipoise.placement import Placement
from equipoise.topology import IntArray, Topology


class PlacementPolicy(ABC):
    """Where experts go: a pure function from load to placement.

    The same input gives the same placement on every rank, so nothing need be sent: budgets count
    operations, never seconds; loads are integer sums; ties are broken by index.
    """

    name: ClassVar[str]
    """What the registry and `--policy` call it."""

    @abstractmethod
    def place(
        self, load: IntArray, topology: Topology, *, standing: Placement | None = None
    ) -> Placement:
        """Choose which experts each slot holds.

        Args:
            load: [L, E] int64, tokens per expert over the window.
            topology: ranks, nodes and slots.
            standing: the placement in force, which a policy may start from.
        Returns:
            Placement with slot_to_expert [L, P]; every expert at least once.
        Collective: none; the same on every rank for the same input.
        Raises: PlacementError if P < E, or the load's shape or values are wrong.
        """
