"""The spine over real ranks: load in, experts moved, every slot and map in agreement."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from torch import Tensor

from equipoise.balancer import EplbState, EplbStats, ModelStats, RebalanceOutcome
from equipoise.balancer.model_state import OnCommit
from equipoise.comm.groups import RankGroup
from equipoise.comm.registry import create_eplb_communicator
from equipoise.comm.torch_gloo import TorchDistGlooStagedEplbCommunicator
from equipoise.config import EPLBConfig
from equipoise.dispatch.maps import PlacementMaps
from equipoise.errors import ConfigError, DependencyError, PlacementError, TransferError
from equipoise.load.recorder import LoadRecorder
from equipoise.placement import Placement, place_in_order
from equipoise.plan.slot_order import keep_slots
from equipoise.policy import get_policy
from equipoise.topology import IntArray, Topology
from tests.ranks import Rank, processes

NUM_LAYERS, NUM_EXPERTS = 3, 8
CPU = torch.device("cpu")


def in_foreground(**options: object) -> EPLBConfig:
    return EPLBConfig(use_async=False, **options)  # type: ignore[arg-type]


def make_expert(layer: int, expert: int) -> list[Tensor]:
    """Tensors that only this expert of this layer has."""
    base = 1000 * layer + 10 * expert
    return [
        torch.arange(6, dtype=torch.float32).reshape(2, 3) + base,
        torch.full((4,), base, dtype=torch.bfloat16),
    ]


def fill_slots(placement: Placement, rank: int) -> list[list[Tensor]]:
    slots = placement.topology.slots_per_rank
    local = placement.slot_to_expert[:, rank * slots : (rank + 1) * slots]
    return [
        [torch.stack(parts) for parts in zip(*(make_expert(layer, e) for e in row), strict=True)]
        for layer, row in enumerate(local)
    ]


class Serving:
    """One rank with weights, maps, recorder and balancer."""

    def __init__(self, group: RankGroup, config: EPLBConfig) -> None:
        topology = Topology(group.size, (NUM_EXPERTS + group.size) // group.size)
        self.placement = place_in_order(NUM_LAYERS, NUM_EXPERTS, topology)
        self.weights = fill_slots(self.placement, group.rank)
        self.maps = PlacementMaps(self.placement, CPU)
        self.recorder = LoadRecorder(NUM_LAYERS, topology.num_slots, CPU)
        self.communicator = create_eplb_communicator(group, "torch_gloo", self.weights)
        self.state = EplbState(config, group, get_policy("deepseek"))
        self.group = group

    def add(self, name: str = "model", on_commit: OnCommit | None = None) -> None:
        self.state.add_model(
            name,
            self.weights,
            self.maps,
            self.recorder,
            self.communicator,
            on_commit=on_commit,
        )

    def send_tokens(self, load: np.ndarray) -> None:
        """Record, as this rank's own, load[layer, expert] tokens for each expert's first slot."""
        for layer in range(NUM_LAYERS):
            slots = self.maps.placement.expert_to_slots[layer, :, 0]
            self.recorder.record(layer, torch.tensor(np.repeat(slots, load[layer])))

    def assert_slots_hold_what_maps_say_of(self, layer: int) -> None:
        wanted = fill_slots(self.maps.placement, self.group.rank)[layer]
        for tensor, expected in zip(self.weights[layer], wanted, strict=True):
            assert torch.equal(tensor, expected)

    def assert_slots_hold_what_maps_say(self) -> None:
        for layer in range(NUM_LAYERS):
            self.assert_slots_hold_what_maps_say_of(layer)
        assert np.array_equal(self.maps.slot_to_expert, self.maps.placement.slot_to_expert)
        assert np.array_equal(self.maps.expert_to_slots, self.maps.placement.expert_to_slots)
        assert np.array_equal(self.maps.replica_counts, self.maps.placement.replica_counts)

    def close(self) -> None:
        self.communicator.close()
        self.group.close()


def skew(hot: int) -> np.ndarray:
    load = np.full((NUM_LAYERS, NUM_EXPERTS), 2)
    load[:, hot] = 40
    return load


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@processes()
def test_load_is_balanced_at_the_interval(rank: Rank, num_ranks: int) -> None:
    serving = Serving(rank.make_group(), in_foreground(window_size=2, step_interval=3))
    serving.add()
    for hot in (6, 4):
        standing = serving.maps.placement
        # The window holds two steps, so the first of three must not count.
        for step, load in enumerate((skew(7), skew(hot), skew(hot)), start=1):
            serving.send_tokens(load)
            outcomes = serving.state.step()
            assert len(outcomes) == (step == 3)
            serving.assert_slots_hold_what_maps_say()
        (outcome,) = outcomes
        assert outcome.placement == serving.maps.placement
        assert outcome.moves == outcome.moves_per_layer.sum()
        window = 2 * num_ranks * skew(hot)
        oracle = get_policy("deepseek").place(window, outcome.placement.topology)
        assert outcome.placement == keep_slots(standing, oracle)
        if num_ranks > 1:
            assert (outcome.balancedness_after > outcome.balancedness_before).all()
            assert outcome.moves > 0
            expert_bytes = 6 * 4 + 4 * 2
            assert outcome.bytes == outcome.moves * expert_bytes
    assert serving.state.steps == 6
    serving.close()


@processes(2)
def test_uneven_ranks_plan_from_the_sum(rank: Rank) -> None:
    serving = Serving(rank.make_group(), in_foreground(window_size=1, step_interval=1))
    serving.add()
    if rank.rank == 1:
        serving.send_tokens(skew(3))
    (outcome,) = serving.state.step()
    assert outcome.placement.replica_counts[0, 3] > 1
    serving.assert_slots_hold_what_maps_say()
    serving.close()


@processes(2)
def test_no_load_makes_no_plan(rank: Rank) -> None:
    serving = Serving(rank.make_group(), in_foreground(window_size=1, step_interval=1))
    serving.add()
    assert serving.state.step() == ()
    assert serving.maps.placement == serving.placement
    serving.close()


@processes(2)
def test_rearrange_on_demand(rank: Rank) -> None:
    serving = Serving(rank.make_group(), in_foreground())
    serving.add()
    serving.send_tokens(skew(6))
    assert serving.state.step() == ()
    (outcome,) = serving.state.rearrange()
    assert outcome.placement.replica_counts[0, 6] > 1
    serving.assert_slots_hold_what_maps_say()
    serving.close()


def change_configuration(serving: Serving) -> None:
    serving.state.config = in_foreground(step_interval=11)


def change_policy(serving: Serving) -> None:
    serving.state.policy = get_policy("flow")


def change_placement(serving: Serving) -> None:
    table = serving.placement.slot_to_expert[:, ::-1]
    serving.maps.commit(Placement(table, NUM_EXPERTS, serving.placement.topology))


def change_weights(serving: Serving) -> None:
    serving.weights[2][1] = serving.weights[2][1].float()


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("configuration", change_configuration),
        ("policy", change_policy),
        ("placement", change_placement),
        ("weights", change_weights),
    ],
)
@processes(3)
def test_ranks_that_differ_are_named_on_every_rank(
    rank: Rank, what: str, change: Callable[[Serving], None]
) -> None:
    serving = Serving(rank.make_group(), in_foreground())
    if rank.rank == 1:
        change(serving)
    told = rf"^rank {rank.rank}: nothing was moved, rank 1 and rank 0 come with different {what}$"
    with pytest.raises(TransferError, match=told) as caught:
        serving.add()
    assert caught.value.peer == (0 if rank.rank == 1 else 1)
    assert serving.state.stats().models == {}
    serving.close()


@processes(1)
def test_a_model_is_added_once(rank: Rank) -> None:
    serving = Serving(rank.make_group(), in_foreground())
    serving.add()
    with pytest.raises(ConfigError, match="a model named 'model' is already under balance"):
        serving.add()
    serving.close()


@processes(2)
def test_weights_recorder_and_maps_must_fit(rank: Rank) -> None:
    serving = Serving(rank.make_group(), in_foreground())
    whole = serving.weights
    shared = [whole[0], [whole[0][0], whole[1][1]], whole[2]]
    strided = [whole[0], whole[1], [whole[2][0].transpose(1, 2), whole[2][1]]]
    slotless = [whole[0], whole[1], [whole[2][0], torch.zeros(3, 4)]]
    narrow = LoadRecorder(NUM_LAYERS, NUM_EXPERTS, CPU)
    elsewhere = LoadRecorder(NUM_LAYERS, serving.placement.num_slots, torch.device("meta"))
    for weights, recorder, complaint in (
        (shared, serving.recorder, "layer 0, tensor 0 and layer 1, tensor 0 use the same memory"),
        (strided, serving.recorder, "layer 2, tensor 0 is not contiguous"),
        (slotless, serving.recorder, "layer 2, tensor 1 has 3 slots, but layer 0 has 5"),
        (whole[:2], serving.recorder, "weights for 2 layers, the placement has 3"),
        (whole, narrow, r"recorder counts \[layers, slots\] \[3, 8\], the placement has \[3, 10\]"),
        (whole, elsewhere, "the recorder is on meta, the maps are on cpu"),
    ):
        mine = rank.rank == 1
        with pytest.raises(
            PlacementError if mine else TransferError,
            match=complaint if mine else "rank 1 refused to begin: see the error there",
        ):
            serving.state.add_model(
                "model",
                weights if mine else whole,
                serving.maps,
                recorder if mine else serving.recorder,
                serving.communicator,
            )
    serving.add()
    serving.close()


@processes(2)
def test_weights_that_moved_in_memory_are_refused(rank: Rank) -> None:
    serving = Serving(rank.make_group(), in_foreground())
    serving.add()
    serving.send_tokens(skew(6))
    serving.state.step()
    if rank.rank == 0:
        serving.weights[1][1].set_(serving.weights[1][1].clone())
    complaint = "'model': layer 1, tensor 1 has moved in memory" if rank.rank == 0 else "refused"
    with pytest.raises(PlacementError if rank.rank == 0 else TransferError, match=complaint):
        serving.state.rearrange()
    assert serving.maps.placement == serving.placement
    serving.assert_slots_hold_what_maps_say()
    serving.close()


@processes(2)
def test_ranks_out_of_step_are_named(rank: Rank) -> None:
    serving = Serving(rank.make_group(), in_foreground(step_interval=2))
    serving.add()
    serving.send_tokens(skew(6))
    if rank.rank == 1:
        serving.state.step()
    with pytest.raises(TransferError, match="rank 1 and rank 0 come with different number of step"):
        serving.state.rearrange()
    serving.close()


@processes(2)
def test_the_engine_hears_which_slots_hold_another_expert(rank: Rank) -> None:
    serving = Serving(rank.make_group(), in_foreground(window_size=1, step_interval=1))
    derived = [tensors[0].sum(dim=(1, 2)) for tensors in serving.weights]
    told: list[tuple[int, list[int]]] = []

    def rebuild(layer: int, slots: IntArray) -> None:
        # Slots and maps have switched already.
        serving.assert_slots_hold_what_maps_say_of(layer)
        told.append((layer, slots.tolist()))
        derived[layer][slots] = serving.weights[layer][0][slots].sum(dim=(1, 2))

    serving.state.add_model(
        "model",
        serving.weights,
        serving.maps,
        serving.recorder,
        serving.communicator,
        on_commit=rebuild,
    )
    local = slice(5 * rank.rank, 5 * rank.rank + 5)
    for hot in (6, 4):
        before = serving.placement.slot_to_expert[:, local]
        serving.send_tokens(skew(hot))
        (outcome,) = serving.state.step()
        serving.placement = outcome.placement
        changed = outcome.placement.slot_to_expert[:, local] != before
        assert told == [(i, np.flatnonzero(row).tolist()) for i, row in enumerate(changed)]
        told.clear()
    for layer, sums in enumerate(derived):
        assert torch.equal(sums, serving.weights[layer][0].sum(dim=(1, 2)))
    serving.close()


@processes(1)
def test_a_slot_that_becomes_empty_is_no_news_to_the_engine(rank: Rank) -> None:
    serving = Serving(rank.make_group(), in_foreground())
    told: list[tuple[int, list[int]]] = []
    model = serving.state.add_model(
        "model",
        serving.weights,
        serving.maps,
        serving.recorder,
        serving.communicator,
        on_commit=lambda layer, slots: told.append((layer, slots.tolist())),
    )
    table = serving.placement.slot_to_expert.copy()
    table[0, 8] = -1
    table[1, [1, 3, 8]] = 3, 1, -1
    emptied = Placement(table, NUM_EXPERTS, serving.placement.topology)
    model.commit(emptied, np.array([0, 1]))
    assert told == [(1, [1, 3])]
    assert model.placement == emptied
    serving.close()


@processes(2)
def test_a_profile_pass_takes_the_wires_buffers_and_changes_nothing(rank: Rank) -> None:
    serving = Serving(rank.make_group(), in_foreground(window_size=1))
    assert isinstance(serving.communicator, TorchDistGlooStagedEplbCommunicator)
    serving.add()
    serving.send_tokens(skew(6))
    serving.state.step()
    addresses = [t.data_ptr() for layer in serving.weights for t in layer]
    assert serving.communicator._send_pool.numel() == 0
    assert serving.state.rearrange(is_profile=True) == ()
    largest_layer = 5 * (6 * 4 + 4 * 2)
    assert serving.communicator._send_pool.numel() == largest_layer
    reserved = serving.communicator._send_pool.data_ptr()
    assert serving.maps.placement == serving.placement
    serving.assert_slots_hold_what_maps_say()
    assert [t.data_ptr() for layer in serving.weights for t in layer] == addresses
    (outcome,) = serving.state.rearrange()
    assert outcome.moves > 0
    assert serving.communicator._send_pool.data_ptr() == reserved
    serving.close()


@processes(2)
def test_listeners_and_figures_tell_of_every_rebalance(rank: Rank) -> None:
    serving = Serving(rank.make_group(), in_foreground(window_size=1, step_interval=2))
    serving.add()
    heard: list[RebalanceOutcome] = []
    serving.state.add_listener(heard.append)
    assert serving.state.stats() == EplbStats(0, {"model": ModelStats()})
    returned: list[RebalanceOutcome] = []
    for hot in (6, 6, 4, 4, 4):
        serving.send_tokens(skew(hot))
        returned += serving.state.step()
    assert [outcome.step for outcome in heard] == [2, 4]
    assert heard == returned
    stats = serving.state.stats()
    assert stats.steps == 5
    figures = stats.models["model"]
    assert figures.rebalances == 2
    assert figures.moves == sum(outcome.moves for outcome in heard) > 0
    assert figures.bytes == sum(outcome.bytes for outcome in heard) == figures.moves * 32
    assert figures.plan_s == sum(outcome.plan_s for outcome in heard) > 0
    assert figures.transfer_s == sum(outcome.transfer_s for outcome in heard) > 0
    assert figures.balancedness_before == heard[1].balancedness_before.mean()
    assert figures.balancedness_after == heard[1].balancedness_after.mean()
    serving.close()


@processes(1)
def test_figures_appear_on_the_callers_registry(rank: Rank) -> None:
    serving = Serving(rank.make_group(), in_foreground(window_size=1))
    serving.add("a model")
    registry = CollectorRegistry()
    collector = serving.state.register_metrics(registry)
    assert 'equipoise_rebalances_total{model="a model"} 0.0' in generate_latest(registry).decode()
    serving.send_tokens(skew(6))
    serving.state.step()
    serving.state.rearrange()
    figures = serving.state.stats().models["a model"]
    lines = generate_latest(registry).decode().splitlines()
    for name, value in (
        ("equipoise_steps_total", 1.0),
        ("equipoise_balancing", 1.0),
        ('equipoise_rebalances_total{model="a model"}', 1.0),
        ('equipoise_moves_total{model="a model"}', 0.0),
        ('equipoise_transfer_bytes_total{model="a model"}', 0.0),
        ('equipoise_plan_seconds_total{model="a model"}', figures.plan_s),
        ('equipoise_transfer_seconds_total{model="a model"}', figures.transfer_s),
        ('equipoise_balancedness{model="a model",placement="before"}', 1.0),
        ('equipoise_balancedness{model="a model",placement="after"}', 1.0),
    ):
        assert f"{name} {value!r}" in lines
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        serving.state.register_metrics(registry)
    registry.unregister(collector)
    assert generate_latest(registry) == b""
    serving.close()


@processes(1)
def test_metrics_without_the_client_say_what_to_install(rank: Rank) -> None:
    state = EplbState(in_foreground(), rank.make_group(), get_policy("deepseek"))
    sys.modules["prometheus_client"] = None  # type: ignore[assignment]
    sys.modules.pop("equipoise.balancer.metrics", None)
    with pytest.raises(DependencyError, match=r"pip install 'equipoise\[metrics\]'"):
        state.register_metrics(None)  # type: ignore[arg-type]


@processes(2)
def test_balancedness_is_logged_by_rank_0(rank: Rank) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("equipoise.balancer.accounting")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    config = in_foreground(log_balancedness=True, log_balancedness_interval=2)
    serving = Serving(rank.make_group(), config)
    serving.add()
    load = np.zeros((NUM_LAYERS, NUM_EXPERTS), dtype=np.int64)
    load[:, 2] = 3  # on rank 0 alone
    load[1:, 7] = 1  # on rank 1 alone
    for _ in range(4):
        serving.send_tokens(load)
        serving.state.step()
    mean = (3 / 2 / 3 + 2 * (4 / 2 / 3)) / 3
    expected = [f"step {n}, model: balancedness {mean:.3f} (worst layer 0.500)" for n in (2, 4)]
    assert lines == (expected if rank.rank == 0 else [])
    serving.close()
