"""Rebalances beside a forward pass on GPUs, one behind the other, with every slot compared."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

from equipoise.balancer import EplbState
from equipoise.balancer.events import CpuGpuEvent
from equipoise.comm import create_eplb_communicator
from equipoise.comm.groups import RankGroup
from equipoise.comm.process_groups import has_nccl
from equipoise.config import EPLBConfig
from equipoise.dispatch.maps import PlacementMaps
from equipoise.load.recorder import LoadRecorder
from equipoise.load.window import LoadWindow
from equipoise.placement import Placement, place_in_order
from equipoise.policy import get_policy
from equipoise.topology import Topology
from tests.ranks import Rank, processes
from tests.rebalances import NUM_EXPERTS, ROOM, SHAPES, Library, count_held

NUM_REBALANCES = int(os.environ.get("REBALANCES", "40"))
MOST_STEPS_EACH = 200
NUM_ROUNDS = 300


def assert_maps_say(maps: PlacementMaps, step: int) -> None:
    """Every map on the device is that of the placement that stands."""
    wanted = PlacementMaps(maps.placement, maps.slot_to_expert.device)
    for name in ("slot_to_expert", "expert_to_slots", "replica_counts", "turns", "num_turns"):
        assert torch.equal(getattr(maps, name), getattr(wanted, name)), (name, step)


def serve_and_rebalance(group: RankGroup, wire: str, num_rebalances: int) -> None:
    """Steps of some products each, and after each a look at every slot and every map."""
    topology = Topology(group.size, 24 // group.size)
    library = Library(group.device)
    placement = place_in_order(len(SHAPES), NUM_EXPERTS, topology)
    weights = library.fill(placement, group.rank)
    maps = PlacementMaps(placement, group.device)
    recorder = LoadRecorder(len(SHAPES), topology.num_slots, group.device)
    config = EPLBConfig(use_async=True, window_size=2, step_interval=1, staging_bytes=5_000_000)
    state = EplbState(config, group, get_policy("deepseek"))
    communicator = create_eplb_communicator(state.transfer_group, wire, weights)
    state.add_model("model", weights, maps, recorder, communicator)
    activations = torch.randn(1024, 1024, device=group.device)
    warm: dict[str, int] | None = None
    done = 0
    for step in range(num_rebalances * MOST_STEPS_EACH):
        for layer in range(len(SHAPES)):
            activations = torch.tanh(activations @ activations.T)
            if has_nccl(group.device_group):
                # Tokens travel beside the weights.
                swapped = torch.empty_like(activations)
                group.device_group.alltoall_base(swapped, activations, [], []).wait()
                activations = swapped
            hot = (step // 3 + layer) % NUM_EXPERTS
            slot = int(maps.placement.expert_to_slots[layer, hot, 0])
            recorder.record(layer, torch.full((64,), slot, device=group.device))
        done += len(state.step())
        # In stream order behind the commit, as a forward pass would read them.
        library.assert_hold(weights, maps.placement, group.rank, step)
        assert_maps_say(maps, step)
        group.barrier()
        if warm is None and done >= num_rebalances // 2:
            warm = count_held(group.device, communicator)
        if done >= num_rebalances:
            break
    assert done >= num_rebalances, f"{done} rebalances in {step + 1} steps"
    if group.rank == 0:
        print(f"{communicator.name}: {done} rebalances in {step + 1} steps", flush=True)
    assert warm is not None
    for name, now in count_held(group.device, communicator).items():
        # The halves of a rebalance that is under way come and go.
        room = config.staging_bytes if name.startswith("memory") else ROOM.get(name, 1)
        assert now <= warm[name] + (room or 0), (name, warm[name], now)
    assert state.close()
    communicator.close()


@pytest.mark.gpu
@pytest.mark.parametrize("on_host", [True, False], ids=["host waits", "stream waits"])
def test_an_event_orders_the_streams_of_two_threads(on_host: bool) -> None:
    """Two buffers by turns, each filled by slow work on one stream and read on another."""
    device = torch.device("cuda", 0)
    halves = torch.zeros(2, 1 << 20, device=device)
    filled, freed = ([CpuGpuEvent(device) for _ in range(2)] for _ in range(2))
    seen: list[torch.Tensor] = []

    def consume() -> None:
        torch.cuda.set_device(device)
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            for number in range(NUM_ROUNDS):
                assert filled[number % 2].wait(30.0, None if on_host else stream)
                seen.append(halves[number % 2].aminmax().max + halves[number % 2].aminmax().min)
                freed[number % 2].record()

    thread = threading.Thread(target=consume)
    thread.start()
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for number in range(NUM_ROUNDS):
            if number >= 2:
                assert freed[number % 2].wait(30.0, None if on_host else stream)
            torch.cuda._sleep(100_000)
            halves[number % 2].fill_(number)
            filled[number % 2].record()
    thread.join(60.0)
    torch.cuda.synchronize(device)
    assert [int(each) for each in seen] == [2 * number for number in range(NUM_ROUNDS)]


@pytest.mark.gpu
def test_a_host_wait_for_the_device_has_a_deadline() -> None:
    device = torch.device("cuda", 0)
    event = CpuGpuEvent(device)
    torch.cuda._sleep(4_000_000_000)
    event.record()
    with pytest.raises(TimeoutError, match=r"the device was not through within 0.1 s"):
        event.wait(0.1)
    torch.cuda.synchronize(device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_experts", "num_slots", "window_size"), [(5, 5, 1), (128, 130, 3), (200, 288, 2)]
)
def test_a_window_takes_a_step_in_one_launch_as_on_the_cpu(
    num_experts: int, num_slots: int, window_size: int
) -> None:
    topology, num_layers = Topology(1, num_slots), 7
    random = np.random.default_rng(num_slots)
    devices = (torch.device("cpu"), torch.device("cuda", 0))
    placement = place_in_order(num_layers, num_experts, topology)
    windows = [LoadWindow(num_layers, num_experts, window_size, device) for device in devices]
    recorders = [LoadRecorder(num_layers, num_slots, device) for device in devices]
    maps = [PlacementMaps(placement, device) for device in devices]
    for step in range(3 * window_size + 1):
        if step % 2:
            # Slots of experts that have others, some of them empty from here on.
            table = np.full((num_layers, num_slots), -1)
            table[:, :num_experts] = np.arange(num_experts)
            num_more = (num_slots - num_experts) // 2
            table[:, num_experts:][:, :num_more] = random.integers(num_experts, size=num_more)
            table = random.permuted(table, axis=1)
            for each in maps:
                each.commit(Placement(table, num_experts, topology))
        held = maps[0].placement.slot_to_expert >= 0
        counts = torch.tensor(random.integers(1000, size=held.shape) * held)
        for window, recorder, each in zip(windows, recorders, maps, strict=True):
            recorder.counts.copy_(counts)
            window.take(recorder.counts, each.slot_to_expert, each.expert_to_slots)
            assert not recorder.counts.any()
        assert torch.equal(windows[0].newest(), windows[1].newest().cpu())
        assert torch.equal(windows[0].sum(), windows[1].sum().cpu())


@pytest.mark.multi_gpu
@pytest.mark.timeout(400)
@pytest.mark.parametrize("wire", ["nixl", "torch_gloo", "pynccl"])
@processes(2, timeout_s=380)
def test_every_slot_is_right_beside_a_forward_pass(rank: Rank, wire: str) -> None:
    serve_and_rebalance(rank.make_group(device="cuda", device_group="gloo"), wire, NUM_REBALANCES)


@pytest.mark.multi_gpu
@pytest.mark.timeout(400)
@processes(2, timeout_s=380)
def test_tokens_over_nccl_and_weights_over_nixl(rank: Rank) -> None:
    group = rank.make_group(device="cuda", device_group="nccl")
    serve_and_rebalance(group, "nixl", NUM_REBALANCES)
