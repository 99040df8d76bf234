"""The cases that wires are compared on between GPUs, and one rank's weights in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from equipoise.errors import ConfigError, TransferError
from equipoise.placement import Placement, place_in_order
from equipoise.plan.transfer_plan import TransferPlan
from equipoise.topology import IntArray, Topology

Kind = Literal["swap", "deal", "fill"]

_WORD_BYTES = 8
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
"""Sets the words of neighbouring experts far apart."""


@dataclass(frozen=True)
class GpuCase:
    """One set of weights, and how they move.

    Attributes:
        name: for people.
        num_layers: L.
        slots_per_rank: S.
        tensor_bytes: of one expert, of each tensor of a layer; multiples of 8.
        kind: "swap" sends half of the slots' experts to another rank, and leaves the others where
            they are, as `flow` does; "deal" gives every slot another expert, so that about half
            come from elsewhere and half from another slot of the rank; "fill" brings experts to
            slots that are empty.
    """

    name: str
    num_layers: int
    slots_per_rank: int
    tensor_bytes: tuple[int, ...]
    kind: Kind = "swap"

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.slots_per_rank < 2:
            raise ConfigError("a case needs at least 1 layer and 2 slots of each rank")
        if any(size < _WORD_BYTES or size % _WORD_BYTES for size in self.tensor_bytes):
            raise ConfigError(
                f"tensors of experts must have a multiple of {_WORD_BYTES} bytes, got "
                f"{', '.join(map(str, self.tensor_bytes))}"
            )

    @property
    def expert_bytes(self) -> int:
        """Of one expert of one layer."""
        return sum(self.tensor_bytes)

    def make_placements(self, num_ranks: int, seed: int) -> tuple[Placement, Placement]:
        """Where experts stand, and where they go; the same on every rank."""
        topology = Topology(num_ranks, self.slots_per_rank)
        if self.kind == "deal":
            old = place_in_order(self.num_layers, topology.num_slots, topology)
            table = np.random.default_rng(seed).permuted(old.slot_to_expert, axis=1)
            return old, Placement(table, topology.num_slots, topology)
        if self.kind == "swap":
            old = place_in_order(self.num_layers, topology.num_slots, topology)
            return old, self._swap(old, np.random.default_rng(seed))
        half = self.slots_per_rank // 2
        own = np.full((num_ranks, self.slots_per_rank), -1)
        own[:, :half] = np.arange(num_ranks * half).reshape(num_ranks, half)
        both = own.copy()
        both[:, half : 2 * half] = np.roll(own[:, :half], -1, axis=0)
        old_table, new_table = (
            np.tile(table.reshape(1, -1), (self.num_layers, 1)) for table in (own, both)
        )
        num_experts = num_ranks * half
        return (
            Placement(old_table, num_experts, topology),
            Placement(new_table, num_experts, topology),
        )

    def _swap(self, old: Placement, rng: np.random.Generator) -> Placement:
        """Half of each rank's slots, others in each layer, get experts of the rank before it."""
        topology = old.topology
        shape = (self.num_layers, topology.num_ranks, self.slots_per_rank)
        table = old.slot_to_expert.reshape(shape).copy()
        order = rng.permuted(np.broadcast_to(np.arange(self.slots_per_rank), shape), axis=2)
        leaving = order[:, :, : self.slots_per_rank // 2]
        experts = np.take_along_axis(table, leaving, axis=2)
        np.put_along_axis(table, leaving, np.roll(experts, 1, axis=1), axis=2)
        return Placement(table.reshape(self.num_layers, -1), topology.num_slots, topology)


DEFAULT_CASES = (
    GpuCase("44 MB experts", 20, 32, (29_360_128, 14_680_064)),
    GpuCase("9.4 MB experts", 48, 80, (6_291_456, 3_145_728)),
    GpuCase("44 MB experts to empty slots", 20, 32, (29_360_128, 14_680_064), "fill"),
    GpuCase("44 MB experts, all dealt anew", 20, 32, (29_360_128, 14_680_064), "deal"),
)
"""DeepSeek-V3's experts in FP8, Qwen3-30B-A3B's in bfloat16."""


class GpuWeights:
    """One rank's experts on its GPU; every word tells which expert it is of, and where in it.

    Args:
        case: what they are like.
        placement: what the slots hold.
        rank: whose.
        device: where.

    Attributes:
        memory: [bytes] uint8, all of them.
        tensors: per layer [S, row bytes] uint8, in `memory`.
    """

    def __init__(
        self, case: GpuCase, placement: Placement, rank: int, device: torch.device
    ) -> None:
        self._case = case
        self._rank = rank
        sizes = [case.slots_per_rank * size for size in case.tensor_bytes] * case.num_layers
        self.memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        parts = [part.view(case.slots_per_rank, -1) for part in self.memory.split_with_sizes(sizes)]
        each = len(case.tensor_bytes)
        self.tensors = [parts[k * each : (k + 1) * each] for k in range(case.num_layers)]
        for layer, experts in enumerate(self._own(placement)):
            for index, tensor in enumerate(self.tensors[layer]):
                words = self._make_words(layer, index, experts, tensor)
                tensor.view(torch.int64).copy_(words)

    def check(self, placement: Placement, backend: str) -> None:
        """Compare every word of every slot that holds an expert with what belongs there.

        Collective: none.
        Raises: TransferError that names the first slot that is wrong.
        """
        for layer, experts in enumerate(self._own(placement)):
            for index, tensor in enumerate(self.tensors[layer]):
                held = np.flatnonzero(experts >= 0)
                wanted = self._make_words(layer, index, experts[held], tensor)
                rows = torch.from_numpy(held).to(tensor.device)
                right = (tensor.view(torch.int64)[rows] == wanted).all(1)
                if not bool(right.all()):
                    slot = int(held[int((~right).nonzero()[0])])
                    raise TransferError(
                        f"rank {self._rank}, {backend}: layer {layer}, slot {slot} does not hold "
                        f"expert {experts[slot]}",
                        rank=self._rank,
                        layer=layer,
                    )

    def _own(self, placement: Placement) -> IntArray:
        """[L, S], experts of this rank's slots."""
        first = self._rank * self._case.slots_per_rank
        table: IntArray = placement.slot_to_expert[:, first : first + self._case.slots_per_rank]
        return table

    def _make_words(self, layer: int, index: int, experts: IntArray, like: Tensor) -> Tensor:
        """[n, words] int64 of these experts."""
        num_words = like.shape[1] // _WORD_BYTES
        number = torch.from_numpy(np.array(experts, dtype=np.int64)).to(like.device)
        number = (number * self._case.num_layers + layer) * len(self._case.tensor_bytes) + index
        return number[:, None] * _STEP + torch.arange(num_words, device=like.device)


def count_received(plan: TransferPlan, rank: int) -> int:
    """Experts that a rank receives from others."""
    return int(((plan.dst_rank == rank) & ~plan.is_local).sum())
