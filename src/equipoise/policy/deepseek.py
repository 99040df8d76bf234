"""The published algorithm: replicate what is hot, then pack the heaviest first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from equipoise.errors import ConfigError, PlacementError
from equipoise.placement import Placement
from equipoise.policy.base import PlacementPolicy, check_load
from equipoise.topology import FloatArray, IntArray, Topology


class DeepSeekPolicy(PlacementPolicy):
    """Expert Parallelism Load Balancer as DeepSeek published it; it plans from nothing.

    Hierarchical where `num_groups` divides by nodes: groups of experts are packed onto nodes,
    experts are replicated within their node, replicas are packed onto its ranks. Global
    otherwise. It may put two replicas of an expert on one rank.

    Args:
        num_groups: equal groups that consecutive experts form and that stay on one node; 1 for a
            model that does not limit routing to groups.
    Raises: ConfigError if num_groups is below 1.
    Source: DeepSeek-AI, "Expert Parallelism Load Balancer (EPLB)", 2025.
    """

    name: ClassVar[str] = "deepseek"

    def __init__(self, num_groups: int = 1) -> None:
        if num_groups < 1:
            raise ConfigError(f"num_groups must be at least 1, got {num_groups}")
        self.num_groups = num_groups

    def place(
        self,
        load: IntArray,
        topology: Topology,
        *,
        standing: Placement | None = None,  # noqa: ARG002 - plans from nothing
    ) -> Placement:
        """Choose which experts each slot holds.

        Args:
            load: [L, E] int64, tokens per expert over the window.
            topology: ranks, nodes and slots.
            standing: not used.
        Returns:
            Placement with slot_to_expert [L, P]; no slot is empty.
        Collective: none; the same on every rank for the same input.
        Raises: PlacementError if P < E, num_groups does not divide E, or the load is not [L, E]
            of whole numbers from 0 on.
        """
        tokens = check_load(load, topology)
        num_experts = tokens.shape[1]
        if num_experts % self.num_groups:
            raise PlacementError(
                f"{num_experts} experts cannot form {self.num_groups} equal groups: "
                f"choose num_groups so that it divides {num_experts}"
            )
        hierarchical = self.num_groups % topology.num_nodes == 0
        num_groups, num_nodes = (self.num_groups, topology.num_nodes) if hierarchical else (1, 1)
        table = _place_hierarchically(tokens, topology, num_groups, num_nodes)
        return Placement(table, num_experts, topology)


def _place_hierarchically(
    load: IntArray, topology: Topology, num_groups: int, num_nodes: int
) -> IntArray:
    """[L, P] int64, the expert of each slot; num_nodes=1 disregards nodes."""
    layers, num_experts = load.shape
    group_size = num_experts // num_groups
    group_load = load.reshape(layers, num_groups, group_size).sum(axis=2)
    # Experts in the order of the nodes that they go to, [L, E].
    groups = _pack(group_load.astype(np.float64), num_nodes)
    homed = (groups[:, :, None] * group_size + np.arange(group_size)).reshape(layers, -1)
    # From here on each row is a node of a layer: [L * N, E / N] experts, [L * N, P / N] slots.
    homed = homed.reshape(layers * num_nodes, -1)
    tokens = np.take_along_axis(load.repeat(num_nodes, axis=0), homed, axis=1)
    local, share = _replicate(tokens, topology.num_slots // num_nodes)
    order = _pack(share, topology.num_ranks // num_nodes)
    slots = np.take_along_axis(homed, np.take_along_axis(local, order, axis=1), axis=1)
    return slots.reshape(layers, topology.num_slots)


def _replicate(load: IntArray, num_slots: int) -> tuple[IntArray, FloatArray]:
    """Give spare slots, one at a time, to the expert whose replicas carry most.

    Args:
        load: [X, n], tokens per expert.
        num_slots: slots of each row, n or more.
    Returns:
        The expert of each slot, [X, num_slots] int64, first every expert once; and the tokens
        that each slot carries, [X, num_slots] float64.
    """
    rows, num_experts = load.shape
    every = np.arange(rows)
    experts = np.empty((rows, num_slots), dtype=np.int64)
    experts[:, :num_experts] = np.arange(num_experts)
    counts = np.ones((rows, num_experts), dtype=np.int64)
    each = load.astype(np.float64)
    for slot in range(num_experts, num_slots):
        hottest = each.argmax(axis=1)
        experts[:, slot] = hottest
        counts[every, hottest] += 1
        each[every, hottest] = load[every, hottest] / counts[every, hottest]
    return experts, np.take_along_axis(each, experts, axis=1)


def _pack(weight: FloatArray, num_packs: int) -> IntArray:
    """Pack items, heaviest first, each into the lightest pack that has room.

    Args:
        weight: [X, n].
        num_packs: packs of n / num_packs items each.
    Returns:
        [X, n] int64, the items, pack by pack, in the order in which they were packed.
    """
    rows, num_items = weight.shape
    capacity = num_items // num_packs
    if capacity == 1:
        # Nothing to balance: the published algorithm leaves the order as it is.
        return np.tile(np.arange(num_items), (rows, 1))
    every = np.arange(rows)
    packed = np.empty((rows, num_packs, capacity), dtype=np.int64)
    filled = np.zeros((rows, num_packs), dtype=np.int64)
    carried = np.zeros((rows, num_packs))
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        pack = carried.argmin(axis=1)
        place = filled[every, pack]
        packed[every, pack, place] = item
        filled[every, pack] = place + 1
        carried[every, pack] += np.where(place + 1 == capacity, np.inf, weight[every, item])
    return packed.reshape(rows, num_items)
