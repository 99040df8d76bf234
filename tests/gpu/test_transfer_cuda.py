"""Experts on GPUs move byte for byte, over every wire."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.comm import create_eplb_communicator
from equipoise.comm.base import EplbCommunicator
from equipoise.comm.groups import RankGroup
from equipoise.comm.span_copies import SpanCopies
from equipoise.comm.spans import Spans
from equipoise.errors import EquipoiseError, TransferError
from equipoise.placement import Placement, place_in_order
from equipoise.topology import Topology
from equipoise.transfer.executor import rearrange_expert_weights_inplace
from tests.placements import make_random_placement
from tests.ranks import Rank, processes

SHAPES = [
    [((64, 32), torch.bfloat16), ((7,), torch.float32)],
    [((33, 5), torch.float8_e4m3fn), ((1,), torch.int8), ((3,), torch.bool)],
    [((48, 2048), torch.bfloat16)],
]
NUM_EXPERTS = 20
WIRES = ("torch_gloo", "nixl", "torch_nccl", "pynccl")
NUM_REBALANCES = int(os.environ.get("EQUIPOISE_GPU_REBALANCES", "60"))
# Memory that NCCL and NIXL take shows only where nobody else uses the GPU.
IS_ALONE = os.environ.get("EQUIPOISE_GPU_ALONE") == "1"


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


class Library:
    """Every expert's bytes on the device, to compare slots with."""

    def __init__(self, device: torch.device) -> None:
        self.layers: list[list[torch.Tensor]] = []
        for layer, tensors in enumerate(SHAPES):
            experts = [make_slot(layer, expert) for expert in range(NUM_EXPERTS)]
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
                for rows, (shape, dtype) in zip(library, SHAPES[layer], strict=True)
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


def make_group(rank: Rank, wire: str, **options: Any) -> RankGroup:
    return rank.make_group(
        device="cuda", device_group="nccl" if wire == "torch_nccl" else "gloo", **options
    )


def with_holes(rng: np.random.Generator, placement: Placement) -> Placement:
    """The placement with some spare slots empty."""
    table = placement.slot_to_expert.copy()
    for row in table:
        for slot in rng.permutation(len(row))[: len(row) // 3]:
            if np.count_nonzero(row == row[slot]) > 1:
                row[slot] = -1
    return Placement(table, placement.num_experts, placement.topology)


def move_about(rank: Rank, wire: str, num_rebalances: int) -> None:
    group = make_group(rank, wire)
    topology = Topology(rank.size, 24 // rank.size)
    library = Library(group.device)
    standing = place_in_order(len(SHAPES), NUM_EXPERTS, topology)
    weights = library.fill(standing, rank.rank)
    communicator = create_eplb_communicator(group, wire, weights)
    free: list[int] = []
    held: list[tuple[int, int]] = []
    for seed in range(num_rebalances):
        rng = np.random.default_rng(seed)
        target = make_random_placement(rng, len(SHAPES), NUM_EXPERTS, topology)
        if seed % 2:
            target = with_holes(rng, target)
        staging = [None, 2_400_000, 5_000_000][seed % 3]
        rearrange_expert_weights_inplace(
            standing,
            target,
            weights,
            communicator,
            group,
            staging_bytes=staging,
            verify="all" if seed % 5 == 0 else "off",
        )
        library.assert_hold(weights, target, rank.rank, seed)
        standing = target
        if seed in (num_rebalances // 2, num_rebalances - 1):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            free.append(torch.cuda.mem_get_info()[0] if IS_ALONE else 0)
            held.append((torch.cuda.memory_allocated(), len(list(Path("/proc/self/fd").iterdir()))))
    assert all(end <= middle for middle, end in zip(held[0], held[-1], strict=True)), held
    assert free[0] - free[-1] < 16 << 20, "memory beside torch's"
    communicator.close()
    group.close()


@pytest.mark.gpu
@pytest.mark.parametrize("wire", ["torch_gloo", "nixl"])
@pytest.mark.parametrize("num_ranks", [2, 4])
@processes(timeout_s=150)
@pytest.mark.timeout(160)
def test_ranks_that_share_a_gpu(rank: Rank, wire: str, num_ranks: int) -> None:
    move_about(rank, wire, min(NUM_REBALANCES, 30))


@pytest.mark.multi_gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("wire", WIRES)
@processes(2, timeout_s=580)
def test_every_slot_holds_what_the_map_says(rank: Rank, wire: str) -> None:
    move_about(rank, wire, NUM_REBALANCES if wire != "torch_gloo" else min(NUM_REBALANCES, 200))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("fate", ["dies", "hangs"])
@processes(2, dies=(1,), timeout_s=58)
def test_a_lost_peer_is_named_and_nothing_is_half_moved(rank: Rank, wire: str, fate: str) -> None:
    group = make_group(rank, wire, timeout_s=4)
    topology = Topology(2, 12)
    library = Library(group.device)
    old = place_in_order(len(SHAPES), NUM_EXPERTS, topology)
    new = make_random_placement(np.random.default_rng(1), len(SHAPES), NUM_EXPERTS, topology)
    weights = library.fill(old, rank.rank)
    communicator = create_eplb_communicator(group, wire, weights)
    rearrange_expert_weights_inplace(old, new, weights, communicator, group)
    committed: list[np.ndarray] = []
    if rank.rank == 1:
        rank.store.set("pid", str(os.getpid()))
        break_down(communicator, fate)
    began = time.monotonic()
    with pytest.raises(EquipoiseError) as caught:
        rearrange_expert_weights_inplace(
            new, old, weights, communicator, group, on_commit=committed.append
        )
    taken = time.monotonic() - began
    assert isinstance(caught.value, TransferError)
    assert caught.value.peer == 1
    assert taken < (30 if fate == "hangs" else 12)
    switched = np.concatenate([np.zeros(0, dtype=np.int64), *committed])
    table = new.slot_to_expert.copy()
    table[switched] = old.slot_to_expert[switched]
    library.assert_hold(weights, Placement(table, NUM_EXPERTS, topology), 0, fate)
    if fate == "hangs":
        os.kill(int(rank.store.get("pid")), signal.SIGKILL)
    with contextlib.suppress(EquipoiseError):
        communicator.close()
    # The device is usable, and a new generation of one rank alone works.
    alone = rank.make_group(generation=1, size=1, device="cuda")
    single = Topology(1, 24)
    whole = place_in_order(len(SHAPES), NUM_EXPERTS, single)
    turned = make_random_placement(np.random.default_rng(2), len(SHAPES), NUM_EXPERTS, single)
    held = library.fill(whole, 0)
    fresh = create_eplb_communicator(alone, "torch_gloo", held)
    rearrange_expert_weights_inplace(whole, turned, held, fresh, alone)
    library.assert_hold(held, turned, 0, "alone")


def break_down(communicator: EplbCommunicator, fate: str) -> None:
    """Have this rank die, or stop, when its next exchange is under way."""
    name = {"nixl": "_pair_up", "torch_gloo": "_carry"}.get(communicator.name, "_carry")

    def end(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL if fate == "dies" else signal.SIGSTOP)

    setattr(communicator, name, end)


@pytest.mark.gpu
def test_spans_are_copied_whatever_their_alignment() -> None:
    device = torch.device("cuda", 0)
    rng = np.random.default_rng(5)
    for _ in range(40):
        count = int(rng.integers(1, 50))
        sizes = rng.choice([1, 3, 16, 48, 1000, 4096, 70_001, 1 << 20], count)
        gaps = rng.integers(0, 40, count)
        starts = np.cumsum(sizes + gaps) - sizes
        source = torch.randint(
            256, (int(starts[-1] + sizes[-1]),), dtype=torch.uint8, device=device
        )
        target = torch.zeros_like(source)
        order = rng.permutation(count)
        landing = np.zeros(count, dtype=np.int64)
        landing[order] = np.cumsum(sizes[order]) - sizes[order]
        here = Spans(source.data_ptr() + starts, sizes)
        there = Spans(target.data_ptr() + landing, sizes)
        SpanCopies(here, there, device, (source, target)).run()
        wanted = torch.zeros_like(target)
        for start, size, land in zip(starts, sizes, landing, strict=True):
            wanted[land : land + size] = source[start : start + size]
        assert torch.equal(target, wanted)
