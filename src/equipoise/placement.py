"""Which expert each slot holds, in every layer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from equipoise.errors import PlacementError
from equipoise.topology import FloatArray, IntArray, Topology

FORMAT_VERSION = 1
EMPTY = -1
"""What a slot that holds no expert says in `slot_to_expert`."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Which expert each slot holds; immutable and checked when it is made.

    Attributes:
        slot_to_expert: [L, P] int64, the expert of each slot, -1 for an empty one; read-only.
        num_experts: E, experts of each layer.
        topology: ranks and slots per rank; P = R * S.
    Raises: PlacementError if the shape does not fit the topology, an expert is out of range, or
        an expert has no slot.
    """

    slot_to_expert: IntArray
    num_experts: int
    topology: Topology

    def __post_init__(self) -> None:
        try:
            given = np.asarray(self.slot_to_expert)
        except (TypeError, ValueError) as error:
            raise PlacementError("slot_to_expert must be [layers][slots] whole numbers") from error
        # Neither a fraction nor an unsigned number may turn into another expert by a cast.
        if given.dtype.kind not in "iu" or not (given < 2**63).all():
            raise PlacementError(
                f"slot_to_expert must be [layers][slots] whole numbers, got {given.dtype}"
            )
        table = np.array(given, dtype=np.int64)
        table.setflags(write=False)
        object.__setattr__(self, "slot_to_expert", table)
        self._check()

    def _check(self) -> None:
        table, num_experts = self.slot_to_expert, self.num_experts
        num_slots = self.topology.num_slots
        if table.ndim != 2 or table.shape[0] < 1:
            raise PlacementError(f"slot_to_expert must be [layers, slots], got {list(table.shape)}")
        if table.shape[1] != num_slots:
            raise PlacementError(
                f"slot_to_expert has {table.shape[1]} slots per layer, but "
                f"{self.topology.num_ranks} ranks of {self.topology.slots_per_rank} slots make "
                f"{num_slots}"
            )
        if num_experts < 1:
            raise PlacementError(f"num_experts must be at least 1, got {num_experts}")
        if num_slots < num_experts:
            ranks = self.topology.num_ranks
            raise PlacementError(
                f"{num_slots} slots cannot hold {num_experts} experts on {ranks} ranks: "
                f"ask for at least {-(-num_experts // ranks)} slots per rank"
            )
        outside = np.argwhere((table < EMPTY) | (table >= num_experts))
        if outside.size:
            layer, slot = outside[0]
            raise PlacementError(
                f"layer {layer}, slot {slot} holds expert {table[layer, slot]}: experts are "
                f"0 to {num_experts - 1}, and -1 is an empty slot"
            )
        missing = np.argwhere(self.replica_counts == 0)
        if missing.size:
            layer, expert = missing[0]
            raise PlacementError(
                f"layer {layer}: expert {expert} has no slot; every expert needs at least one"
            )

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.slot_to_expert.shape[0])

    @property
    def num_slots(self) -> int:
        """P."""
        return self.topology.num_slots

    @property
    def max_replicas(self) -> int:
        """Most slots that any expert could have here: P - E + 1."""
        return self.num_slots - self.num_experts + 1

    @cached_property
    def replica_counts(self) -> IntArray:
        """[L, E] int64, slots that hold each expert."""
        layers, _ = self.slot_to_expert.shape
        flat = self.slot_to_expert + np.arange(layers)[:, None] * self.num_experts
        counts = np.bincount(
            flat[self.slot_to_expert >= 0], minlength=layers * self.num_experts
        ).reshape(layers, self.num_experts)
        counts.setflags(write=False)
        return counts

    @cached_property
    def expert_to_slots(self) -> IntArray:
        """[L, E, P - E + 1] int64, the slots of each expert, ascending, padded with -1."""
        layers, num_slots = self.slot_to_expert.shape
        order = np.argsort(self.slot_to_expert, axis=1, kind="stable")
        experts = np.take_along_axis(self.slot_to_expert, order, axis=1)
        starts = np.cumsum(self.replica_counts, axis=1) - self.replica_counts
        num_empty = (self.slot_to_expert == EMPTY).sum(axis=1, keepdims=True)
        ordinal = np.arange(num_slots)[None, :] - num_empty
        inverse = np.full((layers, self.num_experts, self.max_replicas), EMPTY, dtype=np.int64)
        layer, column = np.nonzero(experts >= 0)
        expert = experts[layer, column]
        inverse[layer, expert, ordinal[layer, column] - starts[layer, expert]] = order[
            layer, column
        ]
        inverse.setflags(write=False)
        return inverse

    def num_wasted(self) -> int:
        """Slots, over all layers, that repeat an expert which their rank already holds."""
        per_rank = np.sort(
            self.slot_to_expert.reshape(self.num_layers, self.topology.num_ranks, -1), axis=2
        )
        return int(((per_rank[..., 1:] == per_rank[..., :-1]) & (per_rank[..., 1:] >= 0)).sum())

    def fingerprint(self) -> str:
        """16 hexadecimal digits, equal exactly for equal placements.

        Collective: none; ranks compare the results to see that they agree.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        shape = (self.num_experts, self.num_layers, *_numbers(self.topology))
        digest = hashlib.blake2b(repr(shape).encode(), digest_size=8)
        digest.update(self.slot_to_expert.astype("<i8").tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return self is other or (
            self.num_experts == other.num_experts
            and self.topology == other.topology
            and np.array_equal(self.slot_to_expert, other.slot_to_expert)
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def to_json(self) -> str:
        """The placement as one JSON object with a `format_version`."""
        num_ranks, slots_per_rank, num_nodes = _numbers(self.topology)
        return json.dumps(
            {
                "format_version": FORMAT_VERSION,
                "num_experts": self.num_experts,
                "num_ranks": num_ranks,
                "slots_per_rank": slots_per_rank,
                "num_nodes": num_nodes,
                "slot_to_expert": self.slot_to_expert.tolist(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Placement:
        """Read what `to_json` wrote.

        Raises: PlacementError if the text is not such an object, naming the key.
        """
        try:
            record: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlacementError(f"not JSON: {error}") from error
        if not isinstance(record, dict):
            raise PlacementError("a placement is a JSON object with a format_version")
        if record.get("format_version") != FORMAT_VERSION:
            raise PlacementError(
                f"format_version is {record.get('format_version')!r}, "
                f"this version reads {FORMAT_VERSION}"
            )
        whole = {}
        for key in ("num_experts", "num_ranks", "slots_per_rank", "num_nodes"):
            value = record.get(key)
            if not isinstance(value, int) or isinstance(value, bool):
                raise PlacementError(f"{key} must be a whole number, got {value!r}")
            whole[key] = value
        topology = Topology(whole["num_ranks"], whole["slots_per_rank"], whole["num_nodes"])
        table: Any = record.get("slot_to_expert")
        return cls(table, whole["num_experts"], topology)


def place_in_order(num_layers: int, num_experts: int, topology: Topology) -> Placement:
    """The placement before any load is known: slot p holds expert p mod E, in every layer.

    Returns:
        Placement with slot_to_expert [L, P].
    Collective: none.
    Raises: PlacementError if P < E.
    """
    row = np.arange(topology.num_slots, dtype=np.int64) % num_experts
    return Placement(np.tile(row, (num_layers, 1)), num_experts, topology)


def spread_load(load: npt.ArrayLike, placement: Placement) -> FloatArray:
    """Share each expert's load equally among its replicas and sum it by rank.

    Args:
        load: [..., L, E], tokens per expert.
        placement: where experts are.
    Returns:
        [..., L, R] float64, tokens per rank.
    Collective: none.
    Raises: PlacementError if the load is not of the placement's layers and experts.
    """
    tokens = np.asarray(load, dtype=np.float64)
    if tokens.shape[-2:] != placement.replica_counts.shape:
        layers, experts = placement.replica_counts.shape
        raise PlacementError(f"load must be [..., {layers}, {experts}], got {list(tokens.shape)}")
    per_replica = tokens / placement.replica_counts
    slots = placement.slot_to_expert
    index = np.broadcast_to(np.maximum(slots, 0), (*tokens.shape[:-2], *slots.shape))
    per_slot = np.where(slots >= 0, np.take_along_axis(per_replica, index, axis=-1), 0.0)
    by_rank = (placement.topology.num_ranks, placement.topology.slots_per_rank)
    summed: FloatArray = per_slot.reshape(*tokens.shape[:-1], *by_rank).sum(axis=-1)
    return summed


def measure_balancedness(rank_load: npt.ArrayLike) -> FloatArray:
    """Mean over max rank load; 1.0 is perfect, and what no load at all counts as.

    Args:
        rank_load: [..., R], tokens per rank.
    Returns:
        [...] float64 in (0, 1].
    Collective: none.
    """
    tokens = np.asarray(rank_load, dtype=np.float64)
    most = tokens.max(axis=-1)
    return np.where(most > 0, tokens.mean(axis=-1) / np.where(most > 0, most, 1.0), 1.0)


def _numbers(topology: Topology) -> tuple[int, int, int]:
    return topology.num_ranks, topology.slots_per_rank, topology.num_nodes
