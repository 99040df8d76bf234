"""The spine over real ranks: load in, experts moved, every slot and map in agreement."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from equipoise.balancer import EplbState
from equipoise.comm.groups import RankGroup
from equipoise.comm.registry import create_eplb_communicator
from equipoise.config import EPLBConfig
from equipoise.dispatch.maps import PlacementMaps
from equipoise.errors import ConfigError, MembershipError
from equipoise.load.recorder import LoadRecorder
from equipoise.placement import Placement, place_in_order
from equipoise.policy import get_policy
from equipoise.topology import Topology
from tests.ranks import Rank, processes

NUM_LAYERS, NUM_EXPERTS = 3, 8
CPU = torch.device("cpu")


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

    def add(self, name: str = "model") -> None:
        self.state.add_model(name, self.weights, self.maps, self.recorder, self.communicator)

    def send_tokens(self, load: np.ndarray) -> None:
        """Record, as this rank's own, load[layer, expert] tokens for each expert's first slot."""
        for layer in range(NUM_LAYERS):
            slots = self.maps.placement.expert_to_slots[layer, :, 0]
            self.recorder.record(layer, torch.tensor(np.repeat(slots, load[layer])))

    def assert_slots_hold_what_maps_say(self) -> None:
        for mine, wanted in zip(
            self.weights, fill_slots(self.maps.placement, self.group.rank), strict=True
        ):
            for tensor, expected in zip(mine, wanted, strict=True):
                assert torch.equal(tensor, expected)
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
    serving = Serving(rank.make_group(), EPLBConfig(window_size=2, step_interval=3))
    serving.add()
    for hot in (6, 4):
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
        assert outcome.placement == oracle
        if num_ranks > 1:
            assert (outcome.balancedness_after > outcome.balancedness_before).all()
            assert outcome.moves > 0
            expert_bytes = 6 * 4 + 4 * 2
            assert outcome.bytes == outcome.moves * expert_bytes
    assert serving.state.steps == 6
    serving.close()


@processes(2)
def test_uneven_ranks_plan_from_the_sum(rank: Rank) -> None:
    serving = Serving(rank.make_group(), EPLBConfig(window_size=1, step_interval=1))
    serving.add()
    if rank.rank == 1:
        serving.send_tokens(skew(3))
    (outcome,) = serving.state.step()
    assert outcome.placement.replica_counts[0, 3] > 1
    serving.assert_slots_hold_what_maps_say()
    serving.close()


@processes(2)
def test_no_load_makes_no_plan(rank: Rank) -> None:
    serving = Serving(rank.make_group(), EPLBConfig(window_size=1, step_interval=1))
    serving.add()
    assert serving.state.step() == ()
    assert serving.maps.placement == serving.placement
    serving.close()


@processes(2)
def test_rearrange_on_demand(rank: Rank) -> None:
    serving = Serving(rank.make_group(), EPLBConfig())
    serving.add()
    serving.send_tokens(skew(6))
    assert serving.state.step() == ()
    (outcome,) = serving.state.rearrange()
    assert outcome.placement.replica_counts[0, 6] > 1
    serving.assert_slots_hold_what_maps_say()
    serving.close()


@processes(2)
def test_different_configurations_are_refused_on_every_rank(rank: Rank) -> None:
    serving = Serving(rank.make_group(), EPLBConfig(step_interval=10 + rank.rank))
    with pytest.raises(
        MembershipError, match=r"rank 0 and rank 1 add model 'model' with different"
    ):
        serving.add()
    serving.close()


@processes(1)
def test_a_model_is_added_once(rank: Rank) -> None:
    serving = Serving(rank.make_group(), EPLBConfig())
    serving.add()
    with pytest.raises(ConfigError, match="a model named 'model' is already under balance"):
        serving.add()
    serving.close()


@processes(2)
def test_balancedness_is_logged_by_rank_0(rank: Rank) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("equipoise.balancer.state")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    config = EPLBConfig(log_balancedness=True, log_balancedness_interval=2)
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
