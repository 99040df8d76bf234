"""A rank whose experts move beside its steps, for tests."""

from __future__ import annotations

import time

import numpy as np

from equipoise.balancer import EplbState, RebalanceOutcome
from equipoise.comm.groups import RankGroup
from equipoise.comm.registry import create_eplb_communicator
from equipoise.config import EPLBConfig
from equipoise.dispatch.maps import PlacementMaps
from equipoise.load.recorder import LoadRecorder
from equipoise.placement import place_in_order
from equipoise.policy import get_policy
from equipoise.topology import Topology
from tests.test_balancer import CPU, NUM_EXPERTS, NUM_LAYERS, Serving, fill_slots, skew

Outcomes = tuple[RebalanceOutcome, ...]

A_LAYER_AT_A_TIME = 200
"""`staging_bytes` with which every layer is a chunk."""

LONGEST_S = 40.0
"""Until what a worker does shows in the steps beside it, however many a busy machine makes."""


class ServingInBackground(Serving):
    """One rank whose experts move beside its steps."""

    def __init__(self, group: RankGroup, wire: str = "torch_gloo", **options: object) -> None:
        topology = Topology(group.size, (NUM_EXPERTS + group.size) // group.size)
        self.placement = place_in_order(NUM_LAYERS, NUM_EXPERTS, topology)
        self.weights = fill_slots(self.placement, group.rank)
        self.maps = PlacementMaps(self.placement, CPU)
        self.recorder = LoadRecorder(NUM_LAYERS, topology.num_slots, CPU)
        config = EPLBConfig(use_async=True, **options)  # type: ignore[arg-type]
        self.state = EplbState(config, group, get_policy("deepseek"))
        self.communicator = create_eplb_communicator(self.state.transfer_group, wire, self.weights)
        self.group = group

    def step_alone(self, load: np.ndarray) -> Outcomes:
        """One step that waits for no other rank."""
        self.send_tokens(load)
        outcomes = self.state.step()
        self.assert_slots_hold_what_maps_say()
        return outcomes

    def step_on(self) -> None:
        """Steps without lockstep, other experts being busy in each, until the balancer fails."""
        deadline = time.monotonic() + LONGEST_S
        while time.monotonic() < deadline:
            self.step_alone(skew(self.state.steps % NUM_EXPERTS))

    def step(self, load: np.ndarray) -> Outcomes:
        """One step in lockstep, as a model's dispatch keeps it."""
        outcomes = self.step_alone(load)
        self.group.barrier()
        return outcomes

    def step_until_done(self, load: np.ndarray) -> Outcomes:
        """Steps in lockstep until no rebalance is under way; what they brought."""
        outcomes: Outcomes = ()
        deadline = time.monotonic() + LONGEST_S
        while time.monotonic() < deadline:
            outcomes += self.step(load)
            if not self.state.is_rebalancing:
                return outcomes
        raise AssertionError("the rebalance does not end")

    def close(self) -> None:
        self.state.close()
        super().close()
