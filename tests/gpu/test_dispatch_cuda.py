"""Tokens between GPUs, and the kernel that chooses and counts."""

from __future__ import annotations

import signal
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import Tensor

from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.maps import PlacementMaps
from equipoise.dispatch.packing import TorchPacker, lay_out_row
from equipoise.dispatch.reference import ReferenceDispatcher
from equipoise.dispatch.replicas import choose_slots
from equipoise.dispatch.routes import sum_by_weight
from equipoise.dispatch.turns import NearestReplicas, ReplicaChoice, SharedReplicas, SpreadReplicas
from equipoise.errors import TransferError
from equipoise.load.recorder import LoadRecorder
from equipoise.models.grouped import compute_blocks, compute_rows, compute_sorted
from equipoise.topology import Topology
from tests.contracts.test_dispatch import (
    CASES,
    check_random_exchanges,
    check_two_micro_batches,
    compute,
    make_inputs,
)
from tests.placements import make_random_placement
from tests.ranks import Rank, processes
from tests.test_grouped import FAMILIES, NUM_SLOTS, WIDTH, expect, make_experts

CHOICES = (SpreadReplicas(), NearestReplicas(3), SharedReplicas(tuple(range(8))))
SLOTS = 4


def make_maps(seed: int, choice: ReplicaChoice) -> PlacementMaps:
    random = np.random.default_rng(seed)
    placement = make_random_placement(random, 2, 32, Topology(8, 5, 2), empty_share=0.1)
    return PlacementMaps(placement, torch.device("cuda"), choice)


@pytest.mark.gpu
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: type(choice).__name__)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_kernel_does_what_pytorch_does(choice: ReplicaChoice, dtype: torch.dtype) -> None:
    maps = make_maps(0, choice)
    plain, kernel = (LoadRecorder(2, 40, torch.device("cuda")) for _ in range(2))
    random = torch.Generator("cuda").manual_seed(0)
    for num_tokens in (0, 1, 7, 300, 4096):
        for top_k in (1, 2, 8):
            experts = torch.randint(
                32, (num_tokens, top_k), generator=random, device="cuda", dtype=dtype
            )
            valid = torch.rand(num_tokens, generator=random, device="cuda") < 0.7
            for position in (0, 5, 2**40, torch.tensor(11, device="cuda")):
                for mask in (None, valid):
                    slots = choose_slots(maps, 1, experts.long(), position, mask)
                    plain.record(1, slots)
                    turns = (maps.turns[1], maps.num_turns[1])
                    got = kernel.choose_and_record(1, experts, *turns, position, mask)
                    assert torch.equal(got, slots)
    assert torch.equal(plain.counts, kernel.counts)
    assert kernel.counts.sum() > 100_000


@pytest.mark.gpu
def test_a_captured_graph_follows_maps_recording_and_position() -> None:
    maps, other = make_maps(1, SpreadReplicas()), make_maps(2, SpreadReplicas())
    recorder, oracle = (LoadRecorder(2, 40, torch.device("cuda")) for _ in range(2))
    experts = torch.randint(32, (500, 4), device="cuda")
    position = torch.tensor(0, device="cuda")
    valid = torch.rand(500, device="cuda") < 0.9

    def run() -> Tensor:
        turns = (maps.turns[0], maps.num_turns[0])
        return recorder.choose_and_record(0, experts, *turns, position, valid)

    run()
    recorder.clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots = run()
    for step in range(6):
        if step == 3:
            maps.commit(other.placement)
        recorder.enabled = oracle.enabled = step % 2 == 0
        position.fill_(7 * step)
        experts.copy_(torch.randint(32, (500, 4), device="cuda"))
        graph.replay()
        expected = choose_slots(maps, 0, experts, 7 * step, valid)
        oracle.record(0, expected)
        assert torch.equal(slots, expected)
        assert torch.equal(recorder.counts, oracle.counts)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wire", ["nccl", "gloo"])
@processes(2)
def test_torch_brings_home_what_one_process_computes(
    rank: Rank, wire: str, dtype: torch.dtype
) -> None:
    topology = Topology(2, 5)
    group = rank.make_group(device="cuda", device_group="nccl" if wire == "nccl" else "gloo")
    dispatcher = create_dispatcher("torch", group, topology)
    oracle = ReferenceDispatcher(Topology(1, topology.num_slots))
    for case in CASES:
        hidden, slots, weights = make_inputs(case, topology, rank.rank, dtype)
        inputs = [each.to(group.device) for each in (hidden, slots, weights.to(dtype))]
        combined = []
        for first_slot, one in ((5 * rank.rank, dispatcher), (0, oracle)):
            dispatched = one.dispatch(inputs[0], inputs[1])
            combined.append(one.combine(compute(dispatched, first_slot), inputs[2], dispatched))
        assert torch.equal(*combined), case
    check_random_exchanges(dispatcher, group, topology, dtype, most=4096)
    check_two_micro_batches(dispatcher, group, topology)
    group.barrier()
    group.close()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("where", ["dispatch", "combine"])
@processes(2, dies=(1,))
def test_over_nccl_a_rank_that_stays_away_raises_within_the_deadline(
    rank: Rank, where: str
) -> None:
    group = rank.make_group(device="cuda", device_group="nccl", timeout_s=3.0)
    dispatcher = create_dispatcher("torch", group, Topology(2, 2))
    hidden, slots = torch.ones(4, 64, device="cuda"), torch.arange(4, device="cuda")[:, None]
    weights = torch.ones(4, 1, device="cuda")
    dispatched = dispatcher.dispatch(hidden, slots)
    dispatcher.combine(dispatched.hidden_ND, weights, dispatched)
    dispatcher.check()
    if rank.rank == 0:
        if where == "combine":
            dispatched = dispatcher.dispatch(hidden, slots)
            dispatcher.combine(dispatched.hidden_ND, weights, dispatched)
        with pytest.raises(TransferError, match=r"did not take part within 3\.0 s"):
            dispatcher.check() if where == "combine" else dispatcher.dispatch(hidden, slots)
        rank.store.set("raised", "yes")
        group.close()
        return
    if where == "combine":
        dispatcher.dispatch(hidden, slots)
    rank.store.wait(["raised"], timedelta(seconds=40))
    signal.raise_signal(signal.SIGKILL)


@pytest.mark.multi_gpu
@processes(2, dies=(1,))
def test_over_nccl_a_wait_for_the_device_ends_where_a_rank_is_known_to_be_dead(rank: Rank) -> None:
    group = rank.make_group(device="cuda", device_group="nccl", timeout_s=40.0)
    dispatcher = create_dispatcher("torch", group, Topology(2, 2))
    hidden, slots = torch.ones(4, 64, device="cuda"), torch.arange(4, device="cuda")[:, None]
    weights = torch.ones(4, 1, device="cuda")
    dispatched = dispatcher.dispatch(hidden, slots)
    dispatcher.combine(dispatched.hidden_ND, weights, dispatched)
    dispatcher.check()
    dispatched = dispatcher.dispatch(hidden, slots)
    if rank.rank == 1:
        dispatcher.check()
        signal.raise_signal(signal.SIGKILL)
    dispatcher.combine(dispatched.hidden_ND, weights, dispatched)
    started = time.monotonic()
    group.end()
    # Without a look, as whatever torch itself waits for.
    torch.cuda.current_stream().synchronize()
    assert time.monotonic() - started < 15
    # What came of it is nobody's, though the device is through.
    with pytest.raises(TransferError, match="a rank is known to be dead"):
        dispatcher.check()
    group.close()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_kernels_pack_as_pytorch_does(num_ranks: int, dtype: torch.dtype) -> None:
    from equipoise.dispatch.packing_kernel import KernelPacker

    topology = Topology(num_ranks, 5)
    plain, kernels = TorchPacker(topology), KernelPacker(topology)
    random = torch.Generator().manual_seed(0)
    for num_tokens, top_k, width in ((0, 2, 8), (1, 1, 24), (300, 8, 2100), (4096, 3, 64)):
        slots = torch.randint(-1, topology.num_slots, (num_tokens, top_k), generator=random)
        hidden = torch.randn(num_tokens, width, generator=random).to(dtype)
        layout = lay_out_row(hidden, top_k)
        ends = slice(layout.first_word, layout.first_word + 1 + top_k)
        results = []
        for packer, device in ((plain, "cpu"), (kernels, "cuda")):
            routed = packer.route(slots.to(device))
            num_rows, num_outputs = routed.count_R2.sum(0).tolist()
            rows, sources = packer.pack(routed, hidden.to(device), slots.to(device))
            rows = rows[:num_rows]
            came = packer.unpack(rows, layout, top_k, routed.count_R2, num_outputs)
            parts = (rows[:, : layout.hidden_bytes], rows.view(torch.int32)[:, ends])
            results.append((routed.count_R2, sources, *came, *parts))
        for expected, got in zip(*results, strict=True):
            assert torch.equal(expected, got.cpu()), (num_tokens, top_k)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_are_weighed_and_summed_as_pytorch_does(
    dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    for num_tokens, top_k, width in ((0, 2, 8), (1, 1, 24), (300, 8, 2100), (4096, 3, 64)):
        outputs = torch.randn(num_tokens * top_k + 1, width, device="cuda").to(dtype)
        sources = torch.randint(len(outputs), (num_tokens * top_k,), device="cuda")
        weights = torch.rand(num_tokens, top_k, device="cuda").to(weight_dtype)
        product = outputs[sources] * weights.reshape(-1, 1)
        expected = product.view(num_tokens, top_k, width).sum(1).to(dtype)
        assert torch.equal(sum_by_weight(outputs, sources, weights), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_grouped_experts_give_the_familys_own_outputs(family: str, dtype: torch.dtype) -> None:
    experts = make_experts(family, dtype).cuda()
    random = torch.Generator("cuda").manual_seed(1)
    for counts in ([3, 0, 7, 1, 2], [0, 0, 0, 0, 4], [8, 8, 8, 8, 8]):
        count = torch.tensor(counts, device="cuda")
        slots = torch.arange(NUM_SLOTS, device="cuda").repeat_interleave(count)
        hidden = torch.randn(len(slots), WIDTH, generator=random, device="cuda").to(dtype)
        expected = expect(experts, hidden, slots)
        got = compute_sorted(experts, hidden, slots, count.cumsum(0).int())
        torch.testing.assert_close(got, expected)
        blocks = torch.full((NUM_SLOTS, 8, WIDTH), float("nan"), device="cuda").to(dtype)
        is_row = torch.arange(8, device="cuda") < count[:, None]
        blocks[is_row] = hidden
        for max_rows in (len(slots), len(slots) + 5, 1000):
            got = compute_blocks(experts, blocks, count.int(), max_rows)
            torch.testing.assert_close(got[is_row], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_as_they_came_give_the_familys_own_outputs_to_the_bit(
    family: str, dtype: torch.dtype
) -> None:
    experts = make_experts(family, dtype).cuda()
    random = torch.Generator("cuda").manual_seed(2)
    for num_rows, num_outputs in ((9, 40), (2000, 5000), (1, 1)):
        # Rows as they travel: words stand behind each.
        came = torch.randn(num_rows, WIDTH + 16, generator=random, device="cuda").to(dtype)
        came = came[:, :WIDTH]
        row = torch.randint(num_rows, (num_outputs,), generator=random, device="cuda")
        slots = torch.randint(NUM_SLOTS, (num_outputs,), generator=random, device="cuda")
        got = compute_rows(experts, came, row, slots)
        assert torch.equal(got, expect(experts, came[row], slots))
