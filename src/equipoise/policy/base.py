"""The contract of a placement policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from equipoise.errors import PlacementError
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


def check_load(load: npt.ArrayLike, topology: Topology) -> IntArray:
    """Refuse a load that no policy can place.

    Args:
        load: tokens per expert.
        topology: where they shall be placed.
    Returns:
        [L, E] int64.
    Collective: none.
    Raises: PlacementError if it is not [L, E], an entry is negative or not whole, naming layer
        and expert, or E experts do not fit the topology's slots.
    """
    given = np.asarray(load)
    if given.ndim != 2 or 0 in given.shape:
        raise PlacementError(f"load must be [layers, experts], got {list(given.shape)}")
    if given.dtype.kind not in "iuf":
        raise PlacementError(f"load must be whole numbers of tokens, got {given.dtype}")
    # Written so that NaN is caught too.
    wrong = np.argwhere(~((given >= 0) & (given < 2**63) & (given == np.floor(given))))
    if wrong.size:
        layer, expert = wrong[0]
        raise PlacementError(
            f"load of layer {layer}, expert {expert} is {given[layer, expert]}: "
            "it must be a whole number of tokens, 0 or more"
        )
    if given.shape[1] > topology.num_slots:
        raise PlacementError(
            f"{topology.num_slots} slots cannot hold {given.shape[1]} experts on "
            f"{topology.num_ranks} ranks: ask for at least "
            f"{-(-given.shape[1] // topology.num_ranks)} slots per rank"
        )
    return given.astype(np.int64)
