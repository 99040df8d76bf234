"""Tokens between GPUs over NIXL-EP."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import Tensor

from equipoise.comm.groups import RankGroup
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.maps import PlacementMaps
from equipoise.dispatch.nixl_ep import all_to_all
from equipoise.dispatch.nixl_ep.all_to_all import NixlEPAll2AllManager
from equipoise.dispatch.nixl_ep.dispatcher import Fp8, NixlEPDispatcher, NixlEPOptions
from equipoise.dispatch.nixl_ep.metadata import GenerationMetadata
from equipoise.dispatch.replicas import choose_slots
from equipoise.errors import MembershipError, TransferError
from equipoise.load.recorder import LoadRecorder
from equipoise.topology import Topology
from tests.contracts.test_dispatch import HIDDEN, check_cases, check_random_exchanges
from tests.placements import make_random_placement
from tests.ranks import Rank, processes
from tests.test_nixl_ep import compare_models

SLOTS = 4


@pytest.mark.multi_gpu
@processes(2)
def test_nixl_ep_brings_home_what_one_process_computes(rank: Rank) -> None:
    topology = Topology(2, 5)
    group = rank.make_group(device="cuda")
    manager = NixlEPAll2AllManager(2, group.device, timedelta(seconds=20))
    dispatcher = create_dispatcher(NixlEPOptions(manager, 4096, HIDDEN), group, topology)
    dtype = torch.bfloat16
    check_cases(dispatcher, topology, rank.rank, dtype, is_exact=False, device=group.device)
    check_random_exchanges(dispatcher, group, topology, dtype, most=4096, is_exact=False)
    group.barrier()
    manager.close()
    group.close()


@pytest.mark.multi_gpu
@processes(2)
def test_a_model_says_the_same_over_nixl_ep(rank: Rank) -> None:
    group = rank.make_group(device="cuda")
    manager = NixlEPAll2AllManager(2, group.device, timedelta(seconds=20))
    compare_models(group, manager)
    group.barrier()
    manager.close()
    group.close()


def exchange(dispatcher: NixlEPDispatcher, group: RankGroup, seed: int, fp8: Fp8 = "no") -> None:
    """Tokens to slots everywhere and home, of several shapes."""
    num_slots, width = group.size * SLOTS, dispatcher._hidden_size
    for number, num_tokens in enumerate((64, 0 if group.rank else 5, 128, 1)):
        random = torch.Generator("cuda").manual_seed(100 * seed + 10 * number + group.rank)
        on = {"generator": random, "device": group.device}
        hidden = torch.randn(num_tokens, width, **on).bfloat16()
        scores = torch.rand(num_tokens, num_slots, **on)
        slots = scores.topk(min(6, num_slots)).indices
        slots[torch.rand(slots.shape, **on) < 0.1] = -1
        weights = torch.rand(slots.shape, **on)
        dispatched = dispatcher.dispatch(hidden, slots)
        factor = (dispatched.slot_N + group.rank * SLOTS + 1).bfloat16() / 8
        home = dispatcher.combine(dispatched.hidden_ND * factor[:, None], weights, dispatched)
        dispatcher.check()
        outputs = (hidden[:, None] * ((slots + 1).bfloat16() / 8)[..., None]).float()
        expected = (outputs * (weights * (slots >= 0))[..., None]).sum(1)
        error = (home.float() - expected).norm() / expected.norm().clamp(min=1e-6)
        assert home.shape == hidden.shape
        assert error < (0.01 if fp8 == "no" else 0.05), (seed, num_tokens, error)


@pytest.mark.multi_gpu
@pytest.mark.timeout(170)
@pytest.mark.parametrize("width", [2048, 7000])
@processes(2, timeout_s=160)
def test_nixl_ep_ranks_come_and_go_in_one_buffer(rank: Rank, width: int) -> None:
    """Alone, beside a rank that is masked, together, alone again; memory does not grow."""
    group = rank.make_group(device="cuda")
    manager = NixlEPAll2AllManager(4, group.device, timedelta(seconds=20))
    free = 0
    for cycle in range(4):
        single = make_lone(rank, cycle)
        # Both ranks have their index from a generation of both.
        both = make_nixl_ep(manager, group, width)
        before = make_nixl_ep(manager, single, width)
        exchange(before, single, cycle)
        group.barrier()
        manager.stage(group, both.members)
        assert manager.connected == {1 - rank.rank}
        exchange(before, single, cycle + 10)
        exchange(both, group, cycle)
        exchange(make_nixl_ep(manager, single, width), single, cycle)
        both.close()
        assert not manager.connected
        group.barrier()
        torch.cuda.synchronize()
        free = free or torch.cuda.mem_get_info()[0]
        single.close()
        group = rank.make_group(generation=cycle + 1, device="cuda")
    # Other tests come and go on the same device; what leaked would never come back.
    deadline = time.monotonic() + 60
    while free - torch.cuda.mem_get_info()[0] > 16 << 20:
        assert time.monotonic() < deadline, (free, torch.cuda.mem_get_info())
        time.sleep(0.1)
    manager.close()
    group.barrier()
    group.close()


def make_lone(rank: Rank, number: int) -> RankGroup:
    """A generation of this rank alone."""
    import torch.distributed as dist

    from equipoise.comm.groups import create_rank_group

    return create_rank_group(
        dist.PrefixStore(f"lone{rank.rank}/{number}/", rank.store),
        0,
        1,
        torch.device("cuda", torch.cuda.current_device()),
        timeout=timedelta(seconds=20),
        device_group="gloo",
    )


def make_nixl_ep(
    manager: NixlEPAll2AllManager, group: RankGroup, width: int, fp8: Fp8 = "no"
) -> NixlEPDispatcher:
    options = NixlEPOptions(manager, 128, width, fp8)
    dispatcher = create_dispatcher(options, group, Topology(group.size, SLOTS))
    assert isinstance(dispatcher, NixlEPDispatcher)
    return dispatcher


@pytest.mark.multi_gpu
@pytest.mark.parametrize("fp8", ["float32", "ue8m0"])
@processes(2)
def test_nixl_ep_in_fp8(rank: Rank, fp8: Fp8) -> None:
    group = rank.make_group(device="cuda")
    manager = NixlEPAll2AllManager(2, group.device, timedelta(seconds=20))
    exchange(make_nixl_ep(manager, group, 4096, fp8), group, 0, fp8)
    group.barrier()
    manager.close()
    group.close()


@pytest.mark.multi_gpu
@processes(2)
def test_nixl_ep_in_a_captured_graph_and_two_micro_batches(rank: Rank) -> None:
    group = rank.make_group(device="cuda")
    manager = NixlEPAll2AllManager(2, group.device, timedelta(seconds=20))
    dispatcher = make_nixl_ep(manager, group, 2048)
    hidden = [torch.randn(32, 2048, device="cuda").bfloat16() for _ in range(2)]
    slots = torch.rand(32, 2 * SLOTS, device="cuda").topk(2).indices
    weights = torch.full((32, 2), 0.5, device="cuda")

    def run() -> list[Tensor]:
        first = dispatcher.send(hidden[0], slots)
        first.receive()
        second = dispatcher.send(hidden[1], slots)
        outputs = first.blocks.hidden_SCH.clone()
        second.receive()
        home = dispatcher.send_home(outputs, weights, first.blocks)
        outputs = second.blocks.hidden_SCH.clone()
        home.receive()
        later = dispatcher.send_home(outputs, weights, second.blocks)
        later.receive()
        return [home.combined_TD, later.combined_TD]

    for got, expected in zip(run(), hidden, strict=True):
        assert torch.equal(got, expected)
    torch.cuda.synchronize()
    group.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for step in range(3):
        for each in hidden:
            each.normal_()
        slots.copy_(torch.rand(32, 2 * SLOTS, device="cuda").topk(2).indices)
        graph.replay()
        for got, expected in zip(captured, hidden, strict=True):
            assert torch.equal(got, expected), step
    dispatcher.check()
    group.barrier()
    del graph
    manager.close()
    group.close()


@pytest.mark.multi_gpu
@processes(2)
def test_nixl_ep_in_a_captured_graph_follows_maps_and_recording(rank: Rank) -> None:
    """From experts to slots, to their ranks and home: captured once, with other maps since."""
    group = rank.make_group(device="cuda")
    manager = NixlEPAll2AllManager(2, group.device, timedelta(seconds=20))
    dispatcher = make_nixl_ep(manager, group, 2048)
    topology, random = Topology(2, SLOTS), np.random.default_rng(3)
    before, behind = (make_random_placement(random, 1, 6, topology) for _ in range(2))
    maps = PlacementMaps(before, group.device)
    recorder, oracle = (LoadRecorder(1, 2 * SLOTS, group.device) for _ in range(2))
    hidden = torch.randn(32, 2048, device="cuda").bfloat16()
    experts = torch.rand(32, 6, device="cuda").topk(2).indices
    weights = torch.full((32, 2), 0.5, device="cuda")
    position = torch.tensor(0, device="cuda")
    factors = 2.0 ** torch.arange(2 * SLOTS, device="cuda").bfloat16()
    own = factors[SLOTS * rank.rank :][:SLOTS]

    def run() -> Tensor:
        slots = recorder.choose_and_record(
            0, experts, maps.turns[0], maps.num_turns[0], position, None, dispatcher.slot_dtype
        )
        blocks = dispatcher.dispatch(hidden, slots)
        return dispatcher.combine(blocks.hidden_SCD * own[:, None, None], weights, blocks)

    run()
    torch.cuda.synchronize()
    recorder.clear()
    group.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        combined = run()
    for step in range(6):
        if step == 3:
            maps.commit(behind)
        recorder.enabled = oracle.enabled = step % 2 == 0
        position.fill_(5 * step + rank.rank)
        hidden.normal_()
        experts.copy_(torch.rand(32, 6, device="cuda").topk(2).indices)
        graph.replay()
        slots = choose_slots(maps, 0, experts, 5 * step + rank.rank)
        oracle.record(0, slots)
        expected = (hidden.float() * factors[slots].float().mean(1, keepdim=True)).bfloat16()
        assert torch.equal(combined, expected), step
        assert torch.equal(recorder.counts, oracle.counts), step
    assert recorder.counts.sum() == 3 * 64
    dispatcher.check()
    group.barrier()
    del graph
    manager.close()
    group.close()


@pytest.mark.multi_gpu
@processes(2, dies=(1,))
def test_nixl_ep_names_a_rank_that_stays_away(rank: Rank) -> None:
    group = rank.make_group(device="cuda")
    manager = NixlEPAll2AllManager(2, group.device, timedelta(seconds=2))
    dispatcher = make_nixl_ep(manager, group, 2048)
    exchange(dispatcher, group, 0)
    if rank.rank == 1:
        rank.store.wait(["raised"], timedelta(seconds=30))
        signal.raise_signal(signal.SIGKILL)
    hidden, slots = torch.ones(2, 2048, device="cuda").bfloat16(), torch.tensor([[0], [SLOTS]])
    dispatched = dispatcher.dispatch(hidden, slots.cuda())
    dispatcher.combine(dispatched.hidden_ND, torch.ones(2, 1, device="cuda"), dispatched)
    with pytest.raises(TransferError, match=r"rank 1 did not answer within 2\.0 s"):
        dispatcher.check()
    rank.store.set("raised", "yes")
    single = make_lone(rank, 0)
    exchange(make_nixl_ep(manager, single, 2048), single, 1)
    manager.close()


class Dies(GenerationMetadata):
    """Of a rank that dies once its metadata were read, where NIXL-EP itself waits for it."""

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        super().multi_get(keys)
        signal.raise_signal(signal.SIGKILL)
        return []


@pytest.mark.multi_gpu
@processes(2, dies=(0, 1))
def test_nixl_ep_waits_for_a_rank_that_dies_while_it_is_connected_within_a_deadline(
    rank: Rank,
) -> None:
    """It cannot be connected any more, which raises; or this process ends."""
    group = rank.make_group(device="cuda")
    manager = NixlEPAll2AllManager(2, group.device, timedelta(seconds=3))
    dispatcher = make_nixl_ep(manager, group, 2048)
    if rank.rank == 1:
        all_to_all.GenerationMetadata = Dies  # type: ignore[misc]
    with pytest.raises(MembershipError, match=r"index 0 .* cannot be connected to \[1\]"):
        dispatcher.enter()
    assert not manager.connected
    single = make_lone(rank, 0)
    exchange(make_nixl_ep(manager, single, 2048), single, 1)
    print("raised, and served alone", flush=True)
    signal.raise_signal(signal.SIGKILL)
