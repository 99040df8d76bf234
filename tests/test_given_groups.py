"""Groups that an engine brings along: taken as they are, and left as they were."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from equipoise.comm import create_eplb_communicator
from equipoise.comm.groups import RankGroup
from equipoise.errors import ConfigError, MembershipError
from equipoise.placement import Placement, place_in_order
from equipoise.topology import Topology
from equipoise.transfer import rearrange_expert_weights_inplace
from tests.expert_weights import Shapes
from tests.ranks import Rank, processes

CPU = torch.device("cpu")
SHAPES = Shapes(((((3, 5), torch.float32), ((7,), torch.int8)),) * 2)


def init_world(rank: Rank) -> dist.ProcessGroup:
    dist.init_process_group("gloo", store=rank.store, rank=rank.rank, world_size=rank.size)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def take(group: dist.ProcessGroup, timeout_s: float = 20.0, **options: object) -> RankGroup:
    timeout = timedelta(seconds=timeout_s)
    return RankGroup.from_process_groups(group, device=CPU, timeout=timeout, **options)  # type: ignore[arg-type]


def sum_ranks(group: RankGroup) -> int:
    total = torch.tensor([dist.get_rank()])
    group.all_reduce(total)
    return int(total)


def move_experts(group: RankGroup) -> None:
    """Turn all slots of all ranks round."""
    topology = Topology(group.size, 2)
    old = place_in_order(2, topology.num_slots, topology)
    new = Placement(np.flip(old.slot_to_expert, 1), old.num_experts, topology)
    weights = SHAPES.weights(old, group.rank)
    communicator = create_eplb_communicator(group, "torch_gloo", weights)
    rearrange_expert_weights_inplace(old, new, weights, communicator, group)
    SHAPES.assert_hold(weights, new, group.rank)


@processes(4)
def test_the_default_group_and_subgroups_serve_and_stay(rank: Rank) -> None:
    world = init_world(rank)
    odd_even = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = odd_even[rank.rank % 2]
    of_world, of_half = take(world), take(mine)
    assert (of_world.rank, of_world.size) == (rank.rank, 4)
    assert (of_half.rank, of_half.size) == (rank.rank // 2, 2)
    assert sum_ranks(of_world) == 6
    assert sum_ranks(of_half) == (2, 4)[rank.rank % 2]
    move_experts(of_world)
    move_experts(of_half)
    for group in (of_world, of_half):
        group.close()
        with pytest.raises(MembershipError, match="was closed"):
            group.barrier()
    total = torch.tensor([1])
    dist.all_reduce(total)
    dist.all_reduce(total, group=mine)
    assert total.item() == 8


@processes(4)
def test_decisions_of_groups_that_share_a_store_stay_apart(rank: Rank) -> None:
    world = init_world(rank)
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half = rank.rank // 2
    # The caller's store is everybody's here.
    group = take(halves[half], store=rank.store)
    assert group.decide(f"half {half}") == f"half {half}"
    again = take(halves[half], store=rank.store)
    assert again.decide(f"again {half}") == f"again {half}"
    assert take(world).decide("world") == "world"
    group.barrier()


@processes(2)
def test_a_group_that_torch_does_not_know_serves_as_well(rank: Rank) -> None:
    made = rank.make_group(generation=5)
    group = take(made.cpu_group)
    total = torch.tensor([rank.rank + 1])
    group.all_reduce(total)
    assert total.item() == 3
    assert group.decide("mine") == "mine"
    assert not dist.is_initialized()
    made.barrier()


@processes(4)
def test_a_dimension_of_a_mesh_is_taken(rank: Rank) -> None:
    init_world(rank)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    timeout = timedelta(seconds=20)
    for dim in ("ep", 1, "ep"):
        group = RankGroup.from_device_mesh(mesh, dim, timeout=timeout)
        assert (group.rank, group.size, group.device) == (rank.rank % 2, 2, CPU)
        assert group.device_group is mesh.get_group("ep")
        assert sum_ranks(group) == (1, 5)[rank.rank // 2]
        move_experts(group)
        group.close()
    for dim in (None, "tp"):
        with pytest.raises(ConfigError, match=f"dim {dim!r} is none .*: ask for one of dp, ep$"):
            RankGroup.from_device_mesh(mesh, dim, timeout=timeout)
    total = torch.tensor([1])
    dist.all_reduce(total, group=mesh.get_group("ep"))
    assert total.item() == 2


@processes(2)
def test_a_deadline_that_passes_leaves_the_mesh_as_it_is(rank: Rank) -> None:
    init_world(rank)
    mesh = init_device_mesh("cpu", (2,))
    group = RankGroup.from_device_mesh(mesh, timeout=timedelta(seconds=20))
    group.timeout = timedelta(seconds=1)
    if rank.rank == 0:
        with pytest.raises(MembershipError, match="rank 1 did not answer within 1"):
            group.barrier()
        rank.store.set("over", "yes")
    else:
        rank.store.wait(["over"], timedelta(seconds=20))
    total = torch.tensor([1])
    dist.all_reduce(total, group=mesh.get_group())
    assert total.item() == 2


@processes(2)
def test_groups_that_do_not_fit_are_refused(rank: Rank) -> None:
    world = init_world(rank)
    alone = [dist.new_group([0]), dist.new_group([1])]
    with pytest.raises(ConfigError, match="cpu_group is no group that this process is a member of"):
        take(alone[1 - rank.rank])
    told = f"is rank {rank.rank} of 2 in cpu_group, but 0 of 1 in device_group"
    with pytest.raises(ConfigError, match=told):
        take(world, device_group=alone[rank.rank])
    bare = dist.ProcessGroup(rank.store, rank.rank, 2)
    with pytest.raises(ConfigError, match="needs the backend gloo for CPU tensors, and has none"):
        take(bare)
    dist.barrier()


@processes(2)
def test_a_rank_that_does_not_come_is_named(rank: Rank) -> None:
    world = init_world(rank)
    if rank.rank == 1:
        rank.store.wait(["over"], timedelta(seconds=20))
        return
    with pytest.raises(MembershipError, match=r"rank 1 did not answer within 1\.0 s"):
        take(world, timeout_s=1.0)
    rank.store.set("over", "yes")
