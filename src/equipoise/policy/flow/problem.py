"""One planning problem: the load, the ranks, and what a plan must keep to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from equipoise.errors import PlacementError
from equipoise.policy.flow.bounds import Bounds
from equipoise.policy.flow.options import FlowOptions
from equipoise.policy.flow.packing import count_replicas, weigh_busiest
from equipoise.topology import FloatArray, IntArray, Topology

NOT_FOUND = -1


@dataclass(frozen=True)
class Problem:
    """A load to be placed, with everything that the options say about these ranks.

    Attributes:
        load: [L, E] float64, whole tokens per expert.
        topology: ranks, nodes and slots.
        options: what the user asked for.
        slowness: [R] float64, mean rank speed over the rank's.
        least: fewest replicas of an expert.
        most: most replicas of an expert.
        spread: fewest nodes that hold an expert.
    """

    load: FloatArray
    topology: Topology
    options: FlowOptions
    slowness: FloatArray
    least: int
    most: int
    spread: int

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.load.shape[1])

    @property
    def node_of_rank(self) -> IntArray:
        """[R] int64."""
        return self.topology.node_of_rank(np.arange(self.topology.num_ranks))

    @property
    def ideal(self) -> FloatArray:
        """Busy time of every rank in perfect balance, [L] float64."""
        ideal: FloatArray = self.load.sum(axis=1) / self.topology.num_ranks
        return ideal

    @cached_property
    def counts(self) -> IntArray:
        """Replicas by the rule that makes the largest slot smallest, [L, E] int64."""
        return count_replicas(self.load, self.topology.num_slots, self.least, self.most, 0.0)

    @cached_property
    def least_peak(self) -> FloatArray:
        """Busy time that no placement's busiest rank is below, [L] float64."""
        slot = (self.load / self.counts).max(axis=1) * self.slowness.min()
        return np.asarray(np.maximum(self.ideal, slot))

    @property
    def goal(self) -> FloatArray:
        """Busy time of the busiest rank at which a layer is good enough, [L] float64."""
        goal: FloatArray = self.least_peak / self.options.target
        return goal

    @property
    def has_rank_budget(self) -> bool:
        """Whether each rank's receipts are bounded on their own."""
        return self.options.rank_move_budget is not None or self.options.rank_move_bytes is not None

    @property
    def has_budget(self) -> bool:
        """Whether anything bounds what may be received."""
        bounded = self.options.move_budget is not None or self.options.move_bytes is not None
        return bounded or self.has_rank_budget

    @property
    def in_groups(self) -> bool:
        """Whether groups of experts have a home node."""
        return self.options.hierarchy != "off" and self.topology.num_nodes > 1

    @property
    def in_pairs(self) -> bool:
        """Whether ranks are plain pairs of slots, which have a search of their own."""
        alike = bool(np.all(self.slowness == 1.0))
        nodes_matter = self.in_groups or self.spread > 1
        return self.topology.slots_per_rank == 2 and alike and not nodes_matter

    def take(self, layers: IntArray) -> Problem:
        """The same problem for some of the layers, [X] int64."""
        return replace(self, load=self.load[layers])

    def bounds(
        self,
        goal: FloatArray,
        *,
        frugal: bool,
        max_steps: int,
        home: IntArray | None = None,
        swaps_only: bool = False,
        may_leave: FloatArray | None = None,
    ) -> Bounds:
        """What the local search shall keep to; `home` [L, E] binds experts to nodes."""
        if may_leave is None:
            strict = self.options.hierarchy == "strict"
            may_leave = np.full(len(self.load), 0.0 if strict else self.options.leaving)
        return Bounds(
            slowness=self.slowness,
            node_of_rank=self.node_of_rank,
            home=np.full(self.load.shape, NOT_FOUND) if home is None else home,
            least=self.topology.num_slots if swaps_only else self.least,
            most=self.most,
            spread=self.spread,
            leaving=may_leave,
            by_node=home is not None or self.spread > 1,
            goal=goal,
            frugal=frugal,
            max_looks=self.options.max_looks,
            max_steps=max_steps,
        )

    def balance(self, table: IntArray) -> FloatArray:
        """Mean over busiest of the ranks' busy times, [L] float64; 1 where there is no load.

        Args:
            table: [L, P] int64, every expert at least once.
        """
        most = weigh_busiest(self.load, np.ascontiguousarray(table), self.slowness)
        return np.where(most > 0.0, self.ideal / np.where(most > 0.0, most, 1.0), 1.0)

    def find_homes(self, table: IntArray) -> IntArray:
        """Node of each expert's group, [L, E] int64; -1 where no node holds the whole group.

        Args:
            table: [L, P] int64.
        """
        layers, nodes = table.shape[0], self.topology.num_nodes
        held = self.holds(table.reshape(layers, nodes, -1))
        groups = held.reshape(layers, nodes, self.options.num_groups, -1)
        whole = groups.all(axis=3)
        # Where several nodes hold all of a group, the one with most of its replicas is home.
        counts = np.zeros((layers, nodes, self.num_experts + 1), dtype=np.int64)
        at = (np.arange(layers)[:, None], np.repeat(np.arange(nodes), table.shape[1] // nodes))
        np.add.at(counts, (*at, np.where(table >= 0, table, self.num_experts)), 1)
        weight = counts[..., :-1].reshape(groups.shape).sum(axis=3)
        home = np.where(whole, weight, NOT_FOUND).argmax(axis=1)
        home = np.where(np.any(whole, axis=1), home, NOT_FOUND)
        return np.repeat(home, groups.shape[3], axis=1)

    def holds(self, grouped: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each group of slots holds each expert: [L, G, H] -> [L, G, E] bool."""
        layers, groups, _ = grouped.shape
        held = np.zeros((layers, groups, self.num_experts + 1), dtype=np.bool_)
        np.put_along_axis(held, np.where(grouped >= 0, grouped, self.num_experts), True, axis=2)
        return held[..., :-1]

    def leaving_share(self, table: IntArray, home: IntArray) -> FloatArray:
        """Fraction of tokens that are served off their expert's home, [L] float64.

        Args:
            table: [L, P] int64.
            home: [L, E] int64, -1 for experts that have none.
        """
        layers = table.shape[0]
        ranks = self.topology.rank_of_slot(np.arange(table.shape[1]))
        node = self.topology.node_of_rank(ranks)
        row = np.arange(layers)[:, None]
        held = table >= 0
        expert = np.where(held, table, 0)
        counts = np.zeros(self.load.shape)
        np.add.at(counts, (np.broadcast_to(row, table.shape)[held], table[held]), 1.0)
        share = self.load / np.maximum(counts, 1.0)
        off = held & (home[row, expert] >= 0) & (home[row, expert] != node)
        total = np.maximum(self.load.sum(axis=1), 1.0)
        away: FloatArray = np.where(off, share[row, expert], 0.0).sum(axis=1) / total
        return away

    def violates(self, table: IntArray) -> npt.NDArray[np.bool_]:
        """Layers of a standing table that the options do not allow, [L] bool."""
        layers = table.shape[0]
        by_rank = self.holds(table.reshape(layers, self.topology.num_ranks, -1))
        wrong: npt.NDArray[np.bool_] = (by_rank.sum(axis=1) < self.least).any(axis=1)
        if self.spread > 1:
            by_node = self.holds(table.reshape(layers, self.topology.num_nodes, -1))
            wrong |= (by_node.sum(axis=1) < self.spread).any(axis=1)
        if self.in_groups:
            home = self.find_homes(table)
            wrong |= (home < 0).any(axis=1)
            if self.options.hierarchy == "strict":
                wrong |= self.leaving_share(table, home) > 0.0
        return wrong


def pose(load: IntArray, topology: Topology, options: FlowOptions) -> Problem:
    """Put load, ranks and options together.

    Args:
        load: [L, E] int64, checked.
        topology: ranks, nodes and slots.
        options: what the user asked for.
    Collective: none.
    Raises: PlacementError if the options do not fit the load or the topology.
    """
    num_layers, num_experts = load.shape
    if num_experts % options.num_groups:
        raise PlacementError(
            f"{num_experts} experts cannot form {options.num_groups} equal groups: "
            f"choose num_groups so that it divides {num_experts}"
        )
    if options.hierarchy != "off" and options.num_groups % topology.num_nodes:
        raise PlacementError(
            f"{options.num_groups} groups cannot be spread evenly over {topology.num_nodes} "
            "nodes: choose hierarchy 'off', or num_groups that the nodes divide"
        )
    if options.expert_bytes is not None and len(options.expert_bytes) != num_layers:
        raise PlacementError(
            f"expert_bytes has {len(options.expert_bytes)} entries for {num_layers} layers"
        )
    least, most, spread = options.copies(num_experts, topology)
    return Problem(
        load.astype(np.float64),
        topology,
        options,
        options.slowness(topology),
        least,
        most,
        spread,
    )
