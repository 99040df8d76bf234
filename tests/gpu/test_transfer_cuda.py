"""Experts on GPUs move byte for byte, over every wire."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.comm import create_eplb_communicator
from equipoise.comm.base import EplbCommunicator, ExpertMoves
from equipoise.comm.groups import RankGroup
from equipoise.comm.span_copies import SpanCopies, warm_up
from equipoise.comm.spans import Spans
from equipoise.errors import EquipoiseError, TransferError
from equipoise.placement import Placement, place_in_order
from equipoise.topology import Topology
from equipoise.transfer.executor import rearrange_expert_weights_inplace
from tests.placements import make_random_placement
from tests.ranks import Rank, processes
from tests.rebalances import NUM_EXPERTS, SHAPES, Library, move_about, soak

WIRES = ("torch_gloo", "nixl", "torch_nccl", "pynccl")
NUM_REBALANCES = int(os.environ.get("REBALANCES", "60"))


def make_group(rank: Rank, wire: str, **options: Any) -> RankGroup:
    return rank.make_group(
        device="cuda", device_group="nccl" if wire == "torch_nccl" else "gloo", **options
    )


@pytest.mark.gpu
@pytest.mark.parametrize("wire", ["torch_gloo", "nixl"])
@pytest.mark.parametrize("num_ranks", [2, 4])
@processes(timeout_s=150)
@pytest.mark.timeout(160)
def test_ranks_that_share_a_gpu(rank: Rank, wire: str, num_ranks: int) -> None:
    move_about(make_group(rank, wire), wire, min(NUM_REBALANCES, 30))


@pytest.mark.multi_gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("wire", WIRES)
@processes(2, timeout_s=580)
def test_every_slot_holds_what_the_map_says(rank: Rank, wire: str) -> None:
    num_rebalances = NUM_REBALANCES if wire != "torch_gloo" else min(NUM_REBALANCES, 200)
    move_about(make_group(rank, wire), wire, num_rebalances)


@pytest.mark.multi_gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("hidden_size", [1024, 2048])
@pytest.mark.parametrize("wire", ["nixl", "torch_nccl", "pynccl"])
@processes(2, timeout_s=580)
def test_thousands_of_rebalances_leave_nothing_behind(
    rank: Rank, wire: str, hidden_size: int
) -> None:
    soak(make_group(rank, wire), wire, hidden_size, NUM_REBALANCES)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("wire", WIRES)
@processes(2)
def test_a_wire_comes_behind_what_stands_on_the_stream(rank: Rank, wire: str) -> None:
    group = make_group(rank, wire)
    weights = [[torch.zeros(4, 1 << 20, dtype=torch.uint8, device=group.device)]]
    communicator = create_eplb_communicator(group, wire, weights)
    into = torch.full((1 << 20,), 77, dtype=torch.uint8, device=group.device)
    seen = torch.zeros_like(into)
    other = np.array([1 - rank.rank])
    for number in (1, 2, 3):
        torch.cuda.current_stream(group.device).synchronize()
        # Long enough for a READ, or a message, to pass what is behind it: the sender writes what
        # is sent, the receiver still reads what is to be filled.
        torch.cuda._sleep(1 << 28)
        weights[0][0][2].fill_(10 * number + rank.rank)
        seen.copy_(into)
        before = 77 if number == 1 else 10 * (number - 1) + 1 - rank.rank
        communicator.add_moves(
            ExpertMoves(other, np.array([0]), np.array([2]), other, np.array([0]), into)
        )
        communicator.execute()
        assert bool((into == 10 * number + 1 - rank.rank).all())
        assert bool((seen == before).all())
        group.barrier()
    communicator.close()


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
    for number in range(40):
        # Gently, a program may have many spans.
        count = int(rng.integers(1, 300))
        sizes = rng.choice([1, 3, 16, 48, 1000, 4096, 70_001, 1 << 18], count)
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
        SpanCopies(here, there, device, (source, target)).run(gently=number % 2 == 1)
        wanted = torch.zeros_like(target)
        for start, size, land in zip(starts, sizes, landing, strict=True):
            wanted[land : land + size] = source[start : start + size]
        assert torch.equal(target, wanted)


@pytest.mark.gpu
def test_copies_made_on_one_stream_run_on_another_as_they_were_made() -> None:
    device = torch.device("cuda", 0)
    source = torch.arange(1 << 16, device=device, dtype=torch.int64).view(torch.uint8)
    target = torch.zeros_like(source)
    half = source.numel() // 2
    halves = np.array([half, half])
    here = Spans(source.data_ptr() + np.array([0, half]), halves)
    there = Spans(target.data_ptr() + np.array([half, 0]), halves)
    # Importing Triton takes longer than the GPU sleeps.
    warm_up(device)
    torch.cuda.synchronize(device)
    slow = torch.cuda.Stream(device)
    with torch.cuda.stream(slow):
        # What tells the kernel where to copy comes to the GPU behind this.
        torch.cuda._sleep(1 << 29)
        copies = SpanCopies(here, there, device, (source, target))
    assert not slow.query()
    copies.run()
    torch.cuda.current_stream(device).synchronize()
    assert torch.equal(target, torch.cat([source[half:], source[:half]]))
