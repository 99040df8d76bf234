"""The wire torch_gloo beyond the contract of all: how it cuts messages, and what it copies."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.comm.base import ExpertMoves
from equipoise.comm.torch_gloo import TorchDistGlooStagedEplbCommunicator, cut_messages
from tests.contracts.communicators import noise
from tests.ranks import Rank, processes

MEGABYTE = 1 << 20
SIZES = st.lists(
    st.one_of(st.integers(0, 9), st.integers(0, 3 * MEGABYTE), st.just(MEGABYTE)), max_size=60
)


@given(SIZES)
def test_messages_hold_everything_once_large_tensors_alone_and_small_ones_together(
    sizes: list[int],
) -> None:
    cuts = cut_messages(np.array(sizes, dtype=np.int64))
    edges = list(itertools.accumulate(sizes, initial=0))
    flat = [edge for cut in cuts for edge in cut]
    assert all(start < stop for start, stop in cuts)
    assert flat[1:-1:2] == flat[2::2]
    assert (flat[:1], flat[-1:]) == (([0], [sum(sizes)]) if sum(sizes) else ([], []))
    assert set(flat) <= set(edges)
    for start, size in zip(edges, sizes, strict=False):
        assert size < MEGABYTE or (start, start + size) in cuts
    assert all(stop - start < 5 * MEGABYTE for start, stop in cuts)


def make(rank: Rank, weights: list[list[torch.Tensor]]) -> TorchDistGlooStagedEplbCommunicator:
    group = rank.make_group()
    return TorchDistGlooStagedEplbCommunicator(group, weights, 20.0)


@processes(2)
def test_large_experts_are_sent_and_received_without_a_copy(rank: Rank) -> None:
    size = MEGABYTE + 5
    weights = [[noise(3, size, dtype=torch.uint8, seed=7 + rank.rank)]]
    communicator = make(rank, weights)
    other = np.array([1 - rank.rank] * 2)
    layer = np.zeros(2, dtype=np.int64)
    into = torch.zeros(2 * size, dtype=torch.uint8)
    communicator.add_moves(ExpertMoves(other, layer, np.array([2, 0]), other, layer, into))
    communicator.execute()
    theirs = noise(3, size, dtype=torch.uint8, seed=7 + 1 - rank.rank)
    assert torch.equal(into.view(2, size), theirs[[2, 0]])
    assert communicator._send_pool.numel() == communicator._recv_pool.numel() == 0


@processes(2)
def test_large_and_small_tensors_and_experts_mix_over_many_messages(rank: Rank) -> None:
    large, small = MEGABYTE + 1, 300_000
    weights = [
        [
            noise(4, large, dtype=torch.uint8, seed=10 + rank.rank),
            noise(4, small, dtype=torch.uint8, seed=20 + rank.rank),
        ]
        for _ in range(5)
    ]
    communicator = make(rank, weights)
    other = 1 - rank.rank
    loose = [noise(n, dtype=torch.uint8, seed=n) for n in (3, 2 * MEGABYTE, 0, MEGABYTE // 2)]
    strided = noise(1500, 1600, dtype=torch.uint8, seed=3).t()
    for _ in range(2):
        landed = [torch.zeros_like(tensor) for tensor in loose]
        landed_strided = torch.zeros(1600, 1500, dtype=torch.uint8)
        for tensor, room in zip(loose, landed, strict=True):
            communicator.add_send(tensor, other)
            communicator.add_recv(room, other)
        layer = np.arange(5).repeat(2)
        to, slots = np.full(10, other), np.array([3, 1] * 5)
        into = torch.zeros(10 * (large + small), dtype=torch.uint8)
        communicator.add_moves(ExpertMoves(to, layer, slots, to, layer, into))
        communicator.add_send(strided, other)
        communicator.add_recv(landed_strided, other)
        communicator.execute()
        assert all(torch.equal(got, sent) for got, sent in zip(landed, loose, strict=True))
        assert torch.equal(landed_strided, strided)
        rows = [
            noise(4, size, dtype=torch.uint8, seed=base + other)[[3, 1]].flatten()
            for base, size in ((10, large), (20, small))
        ]
        assert torch.equal(into, torch.cat(rows * 5))
