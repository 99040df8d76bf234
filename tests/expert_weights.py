"""Random placements, and weights of which every byte says which expert it belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from equipoise.comm.byte_views import view_bytes
from equipoise.placement import Placement
from equipoise.topology import Topology

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.bool,
    torch.int64,
)


@dataclass(frozen=True)
class Shapes:
    """Per layer, for each tensor, the shape of one expert and the dtype."""

    layers: tuple[tuple[tuple[tuple[int, ...], torch.dtype], ...], ...]

    def expert(self, layer: int, expert: int) -> list[torch.Tensor]:
        """One expert's tensors, always the same."""
        made = []
        for index, (shape, dtype) in enumerate(self.layers[layer]):
            generator = torch.Generator().manual_seed(10_000 * layer + 10 * expert + index)
            width = torch.empty(0, dtype=dtype).element_size()
            most = 2 if dtype == torch.bool else 256
            count = int(np.prod(shape)) * width
            data = torch.randint(0, most, (count,), dtype=torch.uint8, generator=generator)
            made.append(data.view(dtype).view(shape))
        return made

    def weights(self, placement: Placement, rank: int) -> list[list[torch.Tensor]]:
        """A rank's weights as the placement says; empty slots hold zeros."""
        slots = placement.topology.slots_per_rank
        made = []
        for layer, tensors in enumerate(self.layers):
            made.append([torch.zeros((slots, *shape), dtype=dtype) for shape, dtype in tensors])
            for slot, expert in enumerate(local_slots(placement, rank)[layer]):
                if expert >= 0:
                    for tensor, value in zip(made[layer], self.expert(layer, expert), strict=True):
                        tensor[slot] = value
        return made

    def assert_hold(
        self, weights: list[list[torch.Tensor]], placement: Placement, rank: int, note: object = ""
    ) -> None:
        """Every slot that holds an expert holds exactly its bytes."""
        for layer, experts in enumerate(local_slots(placement, rank)):
            for slot, expert in enumerate(experts):
                if expert < 0:
                    continue
                for tensor, value in zip(weights[layer], self.expert(layer, expert), strict=True):
                    got = view_bytes(tensor[slot].contiguous())
                    assert torch.equal(got, view_bytes(value)), (note, rank, layer, slot, expert)


def local_slots(placement: Placement, rank: int) -> list[list[int]]:
    """[L][S], experts of a rank's slots."""
    slots = placement.topology.slots_per_rank
    table = placement.slot_to_expert[:, rank * slots : (rank + 1) * slots]
    return [[int(expert) for expert in layer] for layer in table]


def random_shapes(rng: np.random.Generator, num_layers: int) -> Shapes:
    return Shapes(
        tuple(
            tuple(
                (
                    tuple(int(n) for n in rng.integers(0 if index else 1, 9, rng.integers(0, 3))),
                    DTYPES[rng.integers(len(DTYPES))],
                )
                for index in range(rng.integers(1, 4))
            )
            for _ in range(num_layers)
        )
    )


def random_placement(
    rng: np.random.Generator, num_layers: int, num_experts: int, topology: Topology
) -> Placement:
    """Every expert once, and what is left over redundant or empty, all at random."""
    table = np.full((num_layers, topology.num_slots), -1)
    for layer in table:
        order = rng.permutation(topology.num_slots)
        layer[order[:num_experts]] = rng.permutation(num_experts)
        spare = order[num_experts:]
        filled = rng.random(len(spare)) < 0.7
        layer[spare[filled]] = rng.integers(0, num_experts, int(filled.sum()))
    return Placement(table, num_experts, topology)
