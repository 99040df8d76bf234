"""Experts on GPUs move byte for byte, over gloo through pinned memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise.comm import create_eplb_communicator
from equipoise.placement import Placement, place_in_order
from equipoise.topology import Topology
from equipoise.transfer.executor import rearrange_expert_weights_inplace
from tests.placements import make_random_placement
from tests.ranks import Rank, processes

SHAPES = [
    [((64, 32), torch.bfloat16), ((7,), torch.float32)],
    [((33, 5), torch.float8_e4m3fn), ((1,), torch.int8), ((3,), torch.bool)],
]


def make_slot(layer: int, expert: int) -> list[torch.Tensor]:
    """The bytes of one expert's tensors, as nobody else has them."""
    parts = []
    for index, (shape, dtype) in enumerate(SHAPES[layer]):
        generator = np.random.default_rng([layer, expert, index])
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        high = 2 if dtype is torch.bool else 256
        raw = torch.from_numpy(generator.integers(0, high, num_bytes, dtype=np.uint8))
        parts.append(raw.view(dtype).reshape(shape))
    return parts


def fill(placement: Placement, rank: int, device: torch.device) -> list[list[torch.Tensor]]:
    per_rank = placement.topology.slots_per_rank
    table = placement.slot_to_expert[:, rank * per_rank : (rank + 1) * per_rank]
    return [
        [
            torch.stack([p.view(torch.uint8) for p in parts]).view(dtype).to(device)
            for parts, (_, dtype) in zip(
                zip(*(make_slot(layer, int(e)) for e in row), strict=True),
                SHAPES[layer],
                strict=True,
            )
        ]
        for layer, row in enumerate(table)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
@processes()
def test_every_slot_holds_what_the_map_says(rank: Rank, num_ranks: int) -> None:
    group = rank.make_group(device="cuda")
    topology = Topology(num_ranks, 12)
    standing = place_in_order(len(SHAPES), 20, topology)
    weights = fill(standing, rank.rank, group.device)
    communicator = create_eplb_communicator(group, "torch_gloo", weights)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        target = make_random_placement(rng, len(SHAPES), 20, topology)
        rearrange_expert_weights_inplace(
            standing, target, weights, communicator, group, verify="all"
        )
        for got, wanted in zip(weights, fill(target, rank.rank, group.device), strict=True):
            for tensor, expected in zip(got, wanted, strict=True):
                assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))
        standing = target
    communicator.close()
    group.close()
