"""Random rebalances one after the other, on any device and wire, with every slot compared."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch

from equipoise.comm import create_eplb_communicator
from equipoise.comm.base import EplbCommunicator
from equipoise.comm.groups import RankGroup
from equipoise.placement import Placement, place_in_order
from equipoise.topology import Topology
from equipoise.transfer.executor import rearrange_expert_weights_inplace
from tests.placements import make_random_placement

SHAPES = [
    [((64, 32), torch.bfloat16), ((7,), torch.float32)],
    [((33, 5), torch.float8_e4m3fn), ((1,), torch.int8), ((3,), torch.bool)],
    [((48, 2048), torch.bfloat16)],
]
NUM_EXPERTS = 20
Shapes = list[list[tuple[tuple[int, ...], torch.dtype]]]
# An allocator may keep something of what was in use for a moment.
ROOM = {"resident memory": 16 << 20, "memory of the GPU": 16 << 20, "threads": 1, "files": 2}
# Memory that NCCL and NIXL take shows only where nobody else uses the GPU.
IS_ALONE = os.environ.get("GPU_ALONE") == "1"


def make_shapes(hidden_size: int) -> Shapes:
    """Two layers of small gated experts."""
    up, down = ((128, hidden_size), torch.bfloat16), ((hidden_size, 64), torch.bfloat16)
    return [[up, down], [up, down]]


def make_slot(layer: int, expert: int, shapes: Shapes = SHAPES) -> list[torch.Tensor]:
    """The bytes of one expert's tensors, as nobody else has them."""
    parts = []
    for index, (shape, dtype) in enumerate(shapes[layer]):
        generator = np.random.default_rng([layer, expert, index])
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        high = 2 if dtype is torch.bool else 256
        raw = torch.from_numpy(generator.integers(0, high, num_bytes, dtype=np.uint8))
        parts.append(raw.view(dtype).reshape(shape))
    return parts


class Library:
    """Every expert's bytes on the device, to compare slots with."""

    def __init__(self, device: torch.device, shapes: Shapes = SHAPES) -> None:
        self.shapes = shapes
        self.layers: list[list[torch.Tensor]] = []
        for layer, tensors in enumerate(shapes):
            experts = [make_slot(layer, expert, shapes) for expert in range(NUM_EXPERTS)]
            self.layers.append(
                [
                    torch.stack([e[index].reshape(-1).view(torch.uint8) for e in experts]).to(
                        device
                    )
                    for index in range(len(tensors))
                ]
            )

    def fill(self, placement: Placement, rank: int) -> list[list[torch.Tensor]]:
        """This rank's weights; empty slots hold expert 0."""
        return [
            [
                rows[self.experts(placement, rank, layer).clamp(min=0)]
                .view(dtype)
                .reshape(-1, *shape)
                .contiguous()
                for rows, (shape, dtype) in zip(library, self.shapes[layer], strict=True)
            ]
            for layer, library in enumerate(self.layers)
        ]

    def experts(self, placement: Placement, rank: int, layer: int) -> torch.Tensor:
        size = placement.topology.slots_per_rank
        row = placement.slot_to_expert[layer, rank * size : (rank + 1) * size]
        return torch.from_numpy(row.copy()).to(self.layers[0][0].device)

    def assert_hold(
        self, weights: list[list[torch.Tensor]], placement: Placement, rank: int, what: object
    ) -> None:
        for layer, (tensors, library) in enumerate(zip(weights, self.layers, strict=True)):
            experts = self.experts(placement, rank, layer)
            held = experts >= 0
            for tensor, rows in zip(tensors, library, strict=True):
                got = tensor.view(len(experts), -1).view(torch.uint8)
                assert torch.equal(got[held], rows[experts[held]]), (what, layer)

    def find_wrong(
        self, weights: list[list[torch.Tensor]], placement: Placement, rank: int
    ) -> torch.Tensor:
        """[] bool on the device, whether a byte of any slot is wrong; nobody waits for it."""
        wrong = []
        for layer, (tensors, library) in enumerate(zip(weights, self.layers, strict=True)):
            experts = self.experts(placement, rank, layer)
            held = experts >= 0
            for tensor, rows in zip(tensors, library, strict=True):
                got = tensor.view(len(experts), -1).view(torch.uint8)
                wrong.append(((got != rows[experts.clamp(min=0)]).any(1) & held).any())
        return torch.stack(wrong).any()


def with_holes(rng: np.random.Generator, placement: Placement) -> Placement:
    """The placement with some spare slots empty."""
    table = placement.slot_to_expert.copy()
    for row in table:
        for slot in rng.permutation(len(row))[: len(row) // 3]:
            if np.count_nonzero(row == row[slot]) > 1:
                row[slot] = -1
    return Placement(table, placement.num_experts, placement.topology)


def move_about(group: RankGroup, wire: str, num_rebalances: int) -> None:
    """Rebalance at random, and compare every slot each time; nothing may grow from the middle on.

    Collective: every rank of the group.
    """
    topology = Topology(group.size, 24 // group.size)
    library = Library(group.device)
    standing = place_in_order(len(SHAPES), NUM_EXPERTS, topology)
    weights = library.fill(standing, group.rank)
    communicator = create_eplb_communicator(group, wire, weights)
    held: list[dict[str, int]] = []
    for seed in range(num_rebalances):
        rng = np.random.default_rng(seed)
        target = make_random_placement(rng, len(SHAPES), NUM_EXPERTS, topology)
        if seed % 2:
            target = with_holes(rng, target)
        rearrange_expert_weights_inplace(
            standing,
            target,
            weights,
            communicator,
            group,
            staging_bytes=[None, 2_400_000, 5_000_000][seed % 3],
            verify="all" if seed % 5 == 0 else "off",
        )
        library.assert_hold(weights, target, group.rank, seed)
        standing = target
        if seed in (num_rebalances // 2, num_rebalances - 1):
            held.append(count_held(group.device, communicator))
    for name, middle in held[0].items():
        assert held[-1][name] <= middle + ROOM.get(name, 0), (name, held)
    communicator.close()


def soak(group: RankGroup, wire: str, hidden_size: int, num_rebalances: int) -> None:
    """As `move_about`, thousands of times: on a GPU every byte is compared there, and only now and
    then is it asked how that went. Then the communicator is replaced by another, too.

    Collective: every rank of the group.
    """
    topology = Topology(group.size, 24 // group.size)
    library = Library(group.device, make_shapes(hidden_size))
    layer_bytes = sum(rows.shape[1] for rows in library.layers[0]) * topology.slots_per_rank
    standing = place_in_order(len(library.shapes), NUM_EXPERTS, topology)
    weights = library.fill(standing, group.rank)
    communicator = create_eplb_communicator(group, wire, weights)
    wrong = torch.zeros(num_rebalances, dtype=torch.bool, device=group.device)
    period = max(1, num_rebalances // 4)
    began = time.monotonic()
    held: list[dict[str, int]] = []
    for seed in range(num_rebalances):
        rng = np.random.default_rng(seed)
        target = make_random_placement(rng, len(library.shapes), NUM_EXPERTS, topology)
        if seed % 2:
            target = with_holes(rng, target)
        rearrange_expert_weights_inplace(
            standing,
            target,
            weights,
            communicator,
            group,
            staging_bytes=[None, layer_bytes, 2 * layer_bytes][seed % 3],
            verify="all" if seed % 50 == 0 else "off",
        )
        wrong[seed] = library.find_wrong(weights, target, group.rank)
        standing = target
        if seed % period == period - 1:
            held.append(count_held(group.device, communicator))
            assert not wrong.any(), wrong.nonzero().flatten().tolist()[:20]
            if group.rank == 0:
                seconds = time.monotonic() - began
                print(f"{wire}, {hidden_size}: {seed + 1} in {seconds:.1f} s", held[-1], flush=True)
            communicator.close()
            if seed + 1 < num_rebalances:
                communicator = create_eplb_communicator(group, wire, weights)
    communicator.close()
    # What the first few took, once, stays.
    for name, before in held[min(1, len(held) - 1)].items():
        assert held[-1][name] <= before + ROOM.get(name, 0), (name, held)


def count_held(device: torch.device, communicator: EplbCommunicator) -> dict[str, int]:
    """What this process holds that could grow."""
    held = {"files": len(list(Path("/proc/self/fd").iterdir()))}
    held["threads"] = len(list(Path("/proc/self/task").iterdir()))
    held["handles"] = getattr(communicator, "num_open_handles", 0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        held["memory of torch's"] = torch.cuda.memory_allocated(device)
        if IS_ALONE:
            free, total = torch.cuda.mem_get_info(device)
            held["memory of the GPU"] = total - free
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held["resident memory"] = pages * os.sysconf("SC_PAGE_SIZE")
    return held
