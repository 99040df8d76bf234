"""What a user may ask of the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from equipoise.errors import ConfigError, PlacementError
from equipoise.topology import FloatArray, Topology


@dataclass(frozen=True, kw_only=True)
class FlowOptions:
    """Options of the policy `flow`; they hold on every rank alike.

    Attributes:
        move_budget: experts received per plan, over all layers, as a fraction of all slots; None
            for no bound.
        rank_move_budget: the same for each rank, as a fraction of its slots over all layers.
        expert_bytes: bytes of one expert in each layer, for the two budgets that follow.
        move_bytes: bytes received per plan over all ranks, instead of `move_budget`.
        rank_move_bytes: bytes received per plan by each rank, instead of `rank_move_budget`.
        target: balancedness at which a layer is left alone.
        least_gain: balancedness that a layer must gain per expert received; less does not pay.
        max_looks: changes evaluated per layer and search, about at most.
        num_groups: equal groups that consecutive experts form, for `hierarchy`.
        hierarchy: "strict": a group's experts stay on one node; "relaxed": one replica of each
            does, others may leave; "off": nodes do not matter.
        leaving: fraction of tokens, mean over layers, that may be served off their group's node,
            relaxed.
        rank_speeds: relative speed of each rank; None where all are alike.
        survival: whose death no expert shall be lost by: "rank", "node", or "off".
        min_copies: ranks (or nodes) that hold each expert then; None spends redundant slots on
            the experts that fewest hold first, as far as they go.
    Raises: ConfigError if an option cannot be, naming it.
    """

    move_budget: float | None = 0.05
    rank_move_budget: float | None = None
    expert_bytes: tuple[int, ...] | None = None
    move_bytes: int | None = None
    rank_move_bytes: int | None = None
    target: float = 0.998
    least_gain: float = 0.0
    max_looks: int = 600_000
    num_groups: int = 1
    hierarchy: Literal["off", "strict", "relaxed"] = "off"
    leaving: float = 0.07
    rank_speeds: tuple[float, ...] | None = None
    survival: Literal["off", "rank", "node"] = "off"
    min_copies: int | None = None

    def __post_init__(self) -> None:
        for name in ("move_budget", "rank_move_budget", "leaving", "least_gain"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} must be between 0 and 1, got {value}")
        if not 0.0 < self.target <= 1.0:
            raise ConfigError(f"target must be above 0 and at most 1, got {self.target}")
        for name in ("max_looks", "num_groups", "min_copies"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("move_bytes", "rank_move_bytes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must be 0 or more, got {value}")
            if value is not None and not self.expert_bytes:
                raise ConfigError(f"{name} needs expert_bytes: the bytes of an expert, by layer")
        if self.expert_bytes is not None and min(self.expert_bytes, default=0) < 1:
            raise ConfigError("expert_bytes must be 1 or more for every layer")
        if self.hierarchy not in ("off", "strict", "relaxed"):
            raise ConfigError(f"hierarchy is off, strict or relaxed, got {self.hierarchy!r}")
        if self.survival not in ("off", "rank", "node"):
            raise ConfigError(f"survival is off, rank or node, got {self.survival!r}")
        if self.survival == "node" and self.hierarchy != "off":
            raise ConfigError(
                f"survival 'node' spreads experts over nodes, hierarchy {self.hierarchy!r} keeps "
                "them together: choose hierarchy 'off'"
            )
        speeds = self.rank_speeds
        if speeds is not None and not all(0.0 < speed < np.inf for speed in speeds):
            raise ConfigError(f"rank_speeds must be above 0 and finite, got {list(speeds)}")

    def slowness(self, topology: Topology) -> FloatArray:
        """Mean rank speed over each rank's, [R] float64.

        Raises: PlacementError if there are not R speeds.
        """
        if self.rank_speeds is None:
            return np.ones(topology.num_ranks)
        if len(self.rank_speeds) != topology.num_ranks:
            raise PlacementError(
                f"rank_speeds has {len(self.rank_speeds)} entries for {topology.num_ranks} ranks"
            )
        speeds = np.array(self.rank_speeds, dtype=np.float64)
        slowness: FloatArray = speeds.mean() / speeds
        return slowness

    def copies(self, num_experts: int, topology: Topology) -> tuple[int, int, int]:
        """Fewest and most replicas of an expert, and fewest nodes that hold it.

        Raises: PlacementError if the survival level cannot be reached, saying what would do.
        """
        places = topology.num_nodes if self.survival == "node" else topology.num_ranks
        if self.survival == "off":
            return 1, topology.num_ranks, 1
        afforded = topology.num_slots // num_experts
        if self.min_copies is None:
            least = min(afforded, topology.num_ranks)
            most = min(-(-topology.num_slots // num_experts), topology.num_ranks)
            return least, most, min(least, places) if self.survival == "node" else 1
        if self.min_copies > places:
            raise PlacementError(
                f"min_copies {self.min_copies} on as many {self.survival}s: there are {places}"
            )
        if self.min_copies > afforded:
            need = -(-self.min_copies * num_experts // topology.num_ranks)
            raise PlacementError(
                f"{topology.num_slots} slots cannot hold {self.min_copies} copies of "
                f"{num_experts} experts: ask for at least {need} slots per rank"
            )
        spread = self.min_copies if self.survival == "node" else 1
        return self.min_copies, topology.num_ranks, spread
