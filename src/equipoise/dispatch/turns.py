"""In which order an expert's replicas take turns: the ways of choosing, as tables.

A token at global position p goes to turn p modulo the number of turns: whichever way replicas are
chosen the device does the same, and another placement is other numbers in the same tables.
Axis letters: l layers, E experts, P slots, R ranks, W the most turns that an expert may have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from equipoise.errors import ConfigError
from equipoise.placement import Placement
from equipoise.topology import IntArray


@dataclass(frozen=True)
class Turns:
    """Who comes when.

    Attributes:
        slots: [l, E, W] int64, slots in order; what is behind the last turn is never read.
        counts: [l, E] int64, turns of each expert, at least 1.
    """

    slots: IntArray
    counts: IntArray


class ReplicaChoice(Protocol):
    """A way of choosing: a pure function of the placement, the same length W for all of a shape."""

    def take_turns(self, placement: Placement, layers: Sequence[int]) -> Turns:
        """Lay down the turns of these layers. Collective: none."""


@dataclass(frozen=True)
class SpreadReplicas:
    """All replicas of an expert in turn, by slot: the default."""

    def take_turns(self, placement: Placement, layers: Sequence[int]) -> Turns:
        """As the protocol says."""
        chosen = list(layers)
        return Turns(placement.expert_to_slots[chosen], placement.replica_counts[chosen])


@dataclass(frozen=True)
class NearestReplicas:
    """Replicas on the token's own rank in turn; where there is none, those on its node; else all.

    Attributes:
        rank: the token's own, so tables differ between ranks.
    """

    rank: int

    def take_turns(self, placement: Placement, layers: Sequence[int]) -> Turns:
        """As the protocol says."""
        chosen = list(layers)
        slots, topology = placement.expert_to_slots[chosen], placement.topology
        if not 0 <= self.rank < topology.num_ranks:
            raise ConfigError(f"rank {self.rank} is not of a placement on {topology.num_ranks}")
        rank = topology.rank_of_slot(slots)
        own_node = topology.node_of_rank(np.array(self.rank))
        # 0 where there is no slot, then farther to nearer.
        nearness = 1 + (topology.node_of_rank(rank) == own_node) + (rank == self.rank)
        nearness = np.where(slots < 0, 0, nearness)
        is_nearest = nearness == nearness.max(axis=-1, keepdims=True)
        order = np.argsort(~is_nearest, axis=-1, kind="stable")
        return Turns(np.take_along_axis(slots, order, axis=-1), is_nearest.sum(axis=-1))


@dataclass(frozen=True)
class SharedReplicas:
    """Replicas in proportion to what their ranks are to carry.

    Turns are dealt so that after any number of them each replica is within one of its share.

    Attributes:
        rank_shares: [R], what each rank is to carry beside the others; at least 0, not all 0. An
            expert whose replicas are all on ranks of 0 is spread over them evenly.
        num_turns: W, after which the order repeats: shares are met to within one of W.
    """

    rank_shares: tuple[float, ...]
    num_turns: int = 32

    def __post_init__(self) -> None:
        shares = np.array(self.rank_shares)
        if not (np.isfinite(shares).all() and (shares >= 0).all() and shares.any()):
            raise ConfigError(
                f"shares of ranks must be numbers of at least 0, not all 0: got {self.rank_shares}"
            )
        if self.num_turns < 1:
            raise ConfigError(f"num_turns must be at least 1, got {self.num_turns}")

    def take_turns(self, placement: Placement, layers: Sequence[int]) -> Turns:
        """As the protocol says."""
        topology = placement.topology
        if len(self.rank_shares) != topology.num_ranks:
            raise ConfigError(
                f"{len(self.rank_shares)} shares were given for a placement on "
                f"{topology.num_ranks} ranks: give one for each"
            )
        slots = placement.expert_to_slots[list(layers)]
        is_there = slots >= 0
        share = np.where(is_there, np.array(self.rank_shares)[topology.rank_of_slot(slots)], 0.0)
        is_idle = share.sum(axis=-1, keepdims=True) == 0
        share = np.where(is_idle, is_there, share)
        share = share / share.sum(axis=-1, keepdims=True)
        return Turns(
            _deal(slots, share, self.num_turns),
            np.full(slots.shape[:2], self.num_turns, dtype=np.int64),
        )


def _deal(slots: IntArray, share: np.ndarray, num_turns: int) -> IntArray:
    """Each turn to the replica that is furthest behind its share; ties by slot. -> [l, E, W]."""
    dealt = np.zeros_like(share)
    turns = []
    for turn in range(1, num_turns + 1):
        behind = np.where(share > 0, turn * share - dealt, -np.inf)
        # Sums of shares that differ in their last bits must not decide.
        pick = behind.round(9).argmax(axis=-1)[..., None]
        np.put_along_axis(dealt, pick, np.take_along_axis(dealt, pick, -1) + 1, axis=-1)
        turns.append(np.take_along_axis(slots, pick, axis=-1))
    return np.concatenate(turns, axis=-1)


SPREAD = SpreadReplicas()
"""What is used unless something else is asked for."""
