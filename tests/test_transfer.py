"""After a transfer every slot on every rank holds the expert that the placement says."""

from __future__ import annotations

import gc
from unittest import mock

import numpy as np
import pytest
import torch

from equipoise.comm import create_eplb_communicator
from equipoise.comm.base import ExpertMoves
from equipoise.comm.groups import RankGroup
from equipoise.comm.torch_gloo import TorchDistGlooStagedEplbCommunicator
from equipoise.errors import ConfigError, PlacementError, TransferError
from equipoise.placement import Placement, place_in_order
from equipoise.plan.transfer_plan import make_plan
from equipoise.topology import IntArray, Topology
from equipoise.transfer import TransferStats, executor, rearrange_expert_weights_inplace
from equipoise.transfer.budget import StagingBudget
from equipoise.transfer.checksum import sum_experts
from equipoise.transfer.pipeline import Pipeline
from tests.expert_weights import Shapes, random_placement, random_shapes
from tests.ranks import Rank, processes

SHAPES = Shapes(
    (
        (((3, 5), torch.float32), ((7,), torch.float8_e4m3fn)),
        (((4,), torch.bfloat16),),
        (((2, 2), torch.int8), ((), torch.bool)),
    )
)


def sum_over_ranks(group: RankGroup, *numbers: int) -> list[int]:
    total = torch.tensor(numbers)
    group.all_reduce(total)
    return [int(n) for n in total]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@processes()
def test_every_slot_holds_its_expert(rank: Rank, num_ranks: int) -> None:
    group = rank.make_group()
    for seed in range(16):
        rng = np.random.default_rng((num_ranks, seed))
        topology = Topology(num_ranks, int(rng.integers(1, 6)))
        num_layers = int(rng.integers(1, 5))
        num_experts = int(rng.integers(1, topology.num_slots + 1))
        shapes = random_shapes(rng, num_layers)
        old, middle, new = (
            random_placement(rng, num_layers, num_experts, topology) for _ in range(3)
        )
        weights = shapes.weights(old, rank.rank)
        communicator = create_eplb_communicator(group, "torch_gloo", weights)
        for before, after in ((old, middle), (middle, new)):
            expert_bytes = np.array(
                [sum(t[0].numel() * t.element_size() for t in layer) for layer in weights]
            )
            plan = make_plan(before, after)
            least = int(plan.staged_bytes(expert_bytes).max())
            budget = [None, least, 2 * least + 1][int(rng.integers(3))] or None
            switched: list[int] = []
            stats = rearrange_expert_weights_inplace(
                before,
                after,
                weights,
                communicator,
                group,
                staging_bytes=budget,
                on_commit=lambda layers, into=switched: into.extend(layers.tolist()),  # type: ignore[misc]
                plan=plan if rng.random() < 0.5 else None,
                verify="all" if rng.random() < 0.5 else "off",
            )
            shapes.assert_hold(weights, after, rank.rank, (num_ranks, seed))
            changed = (before.slot_to_expert != after.slot_to_expert).any(axis=1)
            assert sorted(switched) == np.flatnonzero(changed).tolist()
            moved, sent = sum_over_ranks(group, stats.moves, stats.sent)
            assert moved == sent == plan.num_moves
            written, received, given = sum_over_ranks(
                group, stats.local_writes, stats.received_bytes, stats.sent_bytes
            )
            assert written == len(plan.write_slot) - plan.num_moves
            assert received == given == int(expert_bytes[plan.layer[~plan.is_local]].sum())
        communicator.close()


def move(
    rank: Rank, group: RankGroup, rows: list[list[int]], **options: object
) -> tuple[Placement, list[list[torch.Tensor]], TransferStats]:
    """From experts in order to the given slots, in every layer of SHAPES alike."""
    topology = Topology(rank.size, len(rows[0]) // rank.size)
    old = place_in_order(3, rank.size * topology.slots_per_rank - 1, topology)
    new = Placement(np.array(rows * 3), old.num_experts, topology)
    weights = SHAPES.weights(old, rank.rank)
    communicator = create_eplb_communicator(group, "torch_gloo", weights)
    stats = rearrange_expert_weights_inplace(
        old,
        new,
        weights,
        communicator,
        group,
        **options,  # type: ignore[arg-type]
    )
    return new, weights, stats


@processes(2)
def test_swaps_cycles_and_fan_out_within_a_rank(rank: Rank) -> None:
    group = rank.make_group()
    # Rank 0 turns 0, 1, 2, 3 into 1, 0, 4, 4; rank 1 turns 4, 5, 6, 0 into 2, 3, 5, 6.
    new, weights, stats = move(rank, group, [[1, 0, 4, 4, 2, 3, 5, 6]])
    SHAPES.assert_hold(weights, new, rank.rank)
    assert (stats.moves, stats.local_writes) == ((3, 9), (6, 6))[rank.rank]
    assert stats.received_bytes == (1, 2)[rank.rank] * (67 + 8 + 5)
    assert stats.num_chunks == 2


@processes(2)
def test_a_chunk_may_hold_all_layers_or_one(rank: Rank) -> None:
    group = rank.make_group()
    # Slot 3 keeps its expert, so a rank stages at most three experts of a layer.
    rows = [[6, 5, 4, 3, 2, 1, 0, 0]]
    committed: list[IntArray] = []
    _, _, stats = move(rank, group, rows, staging_bytes=3 * 80, on_commit=committed.append)
    assert [layers.tolist() for layers in committed] == [[0, 1, 2]]
    assert stats.num_chunks == 1
    with pytest.raises(ConfigError, match="staging_bytes is 100, but layer 0 stages"):
        move(rank, group, rows, staging_bytes=100)
    new, weights, stats = move(rank, group, rows, staging_bytes=3 * 67)
    SHAPES.assert_hold(weights, new, rank.rank)
    assert stats.num_chunks == 2


@processes(2)
def test_a_slot_that_only_becomes_empty_switches_its_map_and_keeps_its_bytes(rank: Rank) -> None:
    group = rank.make_group()
    committed: list[IntArray] = []
    new, weights, stats = move(rank, group, [[0, 1, 2, 3, 4, 5, 6, -1]], on_commit=committed.append)
    assert [layers.tolist() for layers in committed] == [[0, 1, 2]]
    assert (stats.moves, stats.local_writes, stats.num_chunks) == (0, 0, 1)
    SHAPES.assert_hold(weights, place_in_order(3, 7, new.topology), rank.rank)


@processes(2)
def test_nothing_to_do_is_nothing_done(rank: Rank) -> None:
    group = rank.make_group()
    committed: list[IntArray] = []
    _, _, stats = move(rank, group, [[0, 1, 2, 3, 4, 5, 6, 0]], on_commit=committed.append)
    assert committed == []
    assert (stats.moves, stats.sent, stats.local_writes, stats.num_chunks) == (0, 0, 0, 0)


@pytest.mark.parametrize("num_ranks", [1, 3])
@processes()
def test_a_profile_pass_changes_nothing_and_takes_the_buffers(rank: Rank, num_ranks: int) -> None:
    group = rank.make_group()
    topology = Topology(num_ranks, 4)
    old = place_in_order(3, 3, topology)
    weights = SHAPES.weights(old, rank.rank)
    communicator = TorchDistGlooStagedEplbCommunicator(group, weights, 20.0)
    stats = rearrange_expert_weights_inplace(
        old,
        old,
        weights,
        communicator,
        group,
        is_profile=True,
        on_commit=lambda layers: pytest.fail("a profile pass committed"),
    )
    assert (stats.moves, stats.num_chunks) == (0, 0)
    assert communicator._send_pool.numel() == (4 * 67 if num_ranks > 1 else 0)
    SHAPES.assert_hold(weights, old, rank.rank)


class Damaging(TorchDistGlooStagedEplbCommunicator):
    """Flips a bit of what rank 1 receives from rank 2."""

    def finish(self, *, may_be_read: bool = False) -> None:
        landings = self._under_way[0].inbox.get(2, []) if self.rank == 1 else []
        super().finish(may_be_read=may_be_read)
        for landing in landings:
            landing.data[-1] ^= 1


@pytest.mark.parametrize("verify", ["off", "all"])
@processes(3)
def test_damage_is_found_before_it_is_committed(rank: Rank, verify: str) -> None:
    group = rank.make_group()
    topology = Topology(3, 2)
    old = place_in_order(3, 6, topology)
    new = Placement(np.array([[1, 0, 2, 5, 4, 3]] * 3), 6, topology)
    weights = SHAPES.weights(old, rank.rank)
    communicator = Damaging(group, weights, 20.0)
    committed: list[IntArray] = []

    def run() -> None:
        rearrange_expert_weights_inplace(
            old,
            new,
            weights,
            communicator,
            group,
            on_commit=committed.append,
            verify=verify,  # type: ignore[arg-type]
        )

    if verify == "off":
        run()
        assert len(committed) == 2
        return
    with pytest.raises(
        TransferError, match="layer 0, expert 5 arrived damaged on rank 1 from rank 2"
    ) as caught:
        run()
    assert (caught.value.rank, caught.value.peer, caught.value.layer) == (rank.rank, 2, 0)
    assert committed == []
    SHAPES.assert_hold(weights, old, rank.rank)


def test_checksums_notice_changed_moved_and_exchanged_bytes() -> None:
    rows = torch.arange(200_000, dtype=torch.int64).view(torch.uint8).view(2, -1).clone()
    small = torch.zeros(2, 3, dtype=torch.uint8)
    whole = sum_experts([rows, small])
    assert int(whole[0]) != int(whole[1])
    for where in ((0, 5), (0, 700_000), (0, 799_999)):
        changed = rows.clone()
        changed[where] ^= 1
        differs = sum_experts([changed, small]) != whole
        assert differs.tolist() == [True, False]
    moved = rows.clone()
    moved[1] = rows[1].roll(1)
    assert (sum_experts([moved, small]) != whole).tolist() == [False, True]
    assert bool((sum_experts([small, rows]) != whole).all())
    assert bool((sum_experts([rows, small[:, :2]]) != whole).all())
    assert sum_experts([torch.zeros(4, 0, dtype=torch.uint8)]).tolist() == [0, 0, 0, 0]


@processes(3)
def test_ranks_that_come_with_different_arguments_are_named(rank: Rank) -> None:
    group = rank.make_group()
    topology = Topology(3, 2)
    old = place_in_order(3, 6, topology)
    new = Placement(np.array([[1, 0, 2, 5, 4, 3]] * 3), 6, topology)
    other = Placement(np.array([[0, 1, 2, 5, 4, 3]] * 3), 6, topology)
    thin = Shapes((SHAPES.layers[0], SHAPES.layers[1], (((2, 2), torch.int8),)))
    odd = rank.rank == 2

    def run(
        target: Placement, shapes: Shapes, standing: Placement = old, **options: object
    ) -> None:
        weights = shapes.weights(old, rank.rank)
        communicator = create_eplb_communicator(group, "torch_gloo", weights)
        try:
            rearrange_expert_weights_inplace(
                standing,
                target,
                weights,
                communicator,
                group,
                **options,  # type: ignore[arg-type]
            )
        finally:
            shapes.assert_hold(weights, old, rank.rank)

    for complaint, target, shapes, options in (
        ("old placement, plan", new, SHAPES, {"standing": other if odd else old}),
        ("new placement, plan", other if odd else new, SHAPES, {}),
        ("weights", new, thin if odd else SHAPES, {}),
        ("options", new, SHAPES, {"staging_bytes": 10_000 + rank.rank // 2}),
    ):
        told = f"nothing was moved, rank 2 and rank 0 come with different {complaint}$"
        with pytest.raises(TransferError, match=told) as caught:
            run(target, shapes, **options)  # type: ignore[arg-type]
        assert caught.value.peer == (0 if odd else 2)
    # A rank that cannot begin tells the others, and its own reason.
    wide = Placement(np.array([[1, 0, 2, 5, 4, 3]] * 4), 6, topology)
    complaint = "same layers" if odd else "rank 2 refused to begin: see the error there"
    with pytest.raises(PlacementError if odd else TransferError, match=complaint):
        run(wide if odd else new, SHAPES)


@processes(1)
def test_weights_that_do_not_fit_are_refused(rank: Rank) -> None:
    group = rank.make_group()
    topology = Topology(1, 2)
    old = place_in_order(2, 2, topology)

    def run(weights: list[list[torch.Tensor]], placement: Placement = old) -> None:
        communicator = create_eplb_communicator(group, "torch_gloo", [[torch.zeros(2, 2)]])
        rearrange_expert_weights_inplace(placement, placement, weights, communicator, group)

    shared = torch.zeros(2, 2)
    for weights, complaint in (
        ([], "weights for 0 layers, the placement has 2"),
        ([[torch.zeros(2, 1)], []], "empty expert weights: layer 1"),
        ([[torch.zeros(2, 1)]], "weights for 1 layers, the placement has 2"),
        ([[torch.zeros(3, 1)], [torch.zeros(3, 1)]], "weights have 3 slots, the placement has 2"),
        ([[shared], [shared]], "layer 0, tensor 0 and layer 1, tensor 0 use the same memory"),
    ):
        with pytest.raises(PlacementError, match=complaint):
            run(weights)
    with pytest.raises(PlacementError, match="placement is for 2 ranks, the group has 1"):
        run([[torch.zeros(2, 1)], [torch.zeros(2, 2)]], place_in_order(2, 4, Topology(2, 2)))


@processes(2)
def test_what_was_staged_is_let_go_of_at_once(rank: Rank) -> None:
    group = rank.make_group()
    topology = Topology(2, 4)
    rng = np.random.default_rng(3)
    shapes = Shapes(SHAPES.layers[:1] * 20)
    old, new = (random_placement(rng, 20, 8, topology) for _ in range(2))
    weights = shapes.weights(old, rank.rank)
    communicator = create_eplb_communicator(group, "torch_gloo", weights)
    gc.collect()
    gc.disable()
    stats = rearrange_expert_weights_inplace(old, new, weights, communicator, group)
    assert stats.num_chunks > 16
    # What only the collector would free is memory that nobody else gets meanwhile.
    assert not any(isinstance(each, (Pipeline, ExpertMoves)) for each in gc.get_objects())
    gc.enable()
    communicator.close()


class HoldingPipeline(Pipeline):
    """Starts chunks before their buffers are free, as it does on a GPU."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        wire = self._mover.communicator
        self._holds, self._num_ahead = wire.can_hold, wire.num_ahead


@processes(2)
def test_chunks_that_wait_for_room_arrive_whole(rank: Rank) -> None:
    group = rank.make_group()
    topology = Topology(2, 6)
    rng = np.random.default_rng(7)
    shapes = Shapes(SHAPES.layers[:1] * 12)
    standing = random_placement(rng, 12, 9, topology)
    weights = shapes.weights(standing, rank.rank)
    communicator = create_eplb_communicator(group, "nixl", weights)
    for num_buffers in (1, 2, 3) * 2:
        target = random_placement(rng, 12, 9, topology)
        budget = StagingBudget(None, num_buffers)
        with (
            mock.patch.object(executor, "Pipeline", HoldingPipeline),
            mock.patch.object(executor, "choose_budget", return_value=budget),
        ):
            stats = rearrange_expert_weights_inplace(
                standing, target, weights, communicator, group, verify="all"
            )
        shapes.assert_hold(weights, target, rank.rank, num_buffers)
        assert stats.num_chunks > 9
        standing = target
    communicator.close()
