"""Weights on a GPU: staged through pinned memory, and beside an NCCL group."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
import torch

from equipoise.comm import create_eplb_communicator
from equipoise.comm.groups import create_rank_group
from equipoise.comm.torch_gloo import TorchDistGlooStagedEplbCommunicator
from equipoise.placement import Placement
from equipoise.topology import Topology
from equipoise.transfer import rearrange_expert_weights_inplace
from tests.expert_weights import random_placement, random_shapes
from tests.ranks import Rank, processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@processes(3)
def test_weights_on_a_gpu_move_through_pinned_memory(rank: Rank) -> None:
    group = rank.make_group()
    device = torch.device("cuda", 0)
    topology = Topology(3, 4)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        shapes = random_shapes(rng, 3)
        old, new = (random_placement(rng, 3, 9, topology) for _ in range(2))
        weights = [[t.to(device) for t in layer] for layer in shapes.weights(old, rank.rank)]
        communicator = create_eplb_communicator(group, "torch_gloo", weights)
        if seed % 2:
            communicator.set_stream(torch.cuda.Stream(device))
            torch.cuda.synchronize()
        rearrange_expert_weights_inplace(
            old, new, weights, communicator, group, verify="all" if seed % 3 else "off"
        )
        home = [[t.cpu() for t in layer] for layer in weights]
        shapes.assert_hold(home, new, rank.rank, seed)
        assert isinstance(communicator, TorchDistGlooStagedEplbCommunicator)
        pool = communicator._recv_pool
        assert pool.is_pinned() or not pool.numel()


@processes(2)
def test_tensors_on_a_gpu_travel(rank: Rank) -> None:
    group = rank.make_group()
    communicator = create_eplb_communicator(group, "torch_gloo", ())
    other = 1 - rank.rank
    sent = [torch.arange(n, device="cuda") * (rank.rank + 1) for n in (3, 0, 1 << 20)]
    landed = [torch.zeros_like(tensor) for tensor in sent]
    for tensor, into in zip(sent, landed, strict=True):
        communicator.add_send(tensor, other)
        communicator.add_recv(into, other)
    communicator.execute()
    for into in landed:
        assert torch.equal(into, torch.arange(len(into), device="cuda") * (other + 1))
    with pytest.raises(ValueError, match="works on cuda:0, got a tensor on cpu"):
        communicator.add_send(torch.zeros(1), other)


@processes(1)
def test_an_nccl_group_stands_beside_the_gloo_one(rank: Rank) -> None:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    group = create_rank_group(
        rank.store,
        0,
        1,
        device,
        timeout=timedelta(seconds=20),
        device_group="nccl",
    )
    ones = torch.ones(4, device=device)
    group.device_group.allreduce([ones]).wait()
    assert ones.tolist() == [1.0] * 4
    group.all_reduce(ones)
    assert ones.tolist() == [1.0] * 4
    placement = Placement(np.array([[0, 1]]), 2, Topology(1, 2))
    swapped = Placement(np.array([[1, 0]]), 2, Topology(1, 2))
    weights = [[torch.tensor([[1.0], [2.0]], device=device)]]
    communicator = create_eplb_communicator(group, "auto", weights)
    rearrange_expert_weights_inplace(placement, swapped, weights, communicator, group)
    assert weights[0][0].tolist() == [[2.0], [1.0]]
    group.close()
