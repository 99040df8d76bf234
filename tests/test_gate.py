"""Gain before cost: what a layer's moves save against what they take."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from equipoise.balancer.planning import plan_moves
from equipoise.config import EPLBConfig
from equipoise.placement import Placement, place_in_order
from equipoise.plan.gate import MoveCosts, keep_layers, weigh_moves
from equipoise.plan.transfer_plan import make_plan
from equipoise.policy.base import PlacementPolicy
from equipoise.topology import IntArray, Topology

TOPOLOGY = Topology(2, 2)
STANDING = place_in_order(2, 4, TOPOLOGY)
# Rank 0 holds experts 0 and 1: 100 of 110 tokens in layer 0, 52 of 100 in layer 1.
LOAD = np.array([[60, 40, 5, 5], [26, 26, 24, 24]])
TARGET = Placement(np.array([[0, 2, 1, 3], [0, 2, 1, 3]]), 4, TOPOLOGY)
BYTES = np.array([1000, 1000])


class Swap(PlacementPolicy):
    name = "swap"

    def place(
        self, load: IntArray, topology: Topology, *, standing: Placement | None = None
    ) -> Placement:
        return TARGET


def test_a_layer_is_worth_its_tokens_less_its_bytes() -> None:
    plan = make_plan(STANDING, TARGET)
    costs = MoveCosts(byte_s=1e-6, layer_s=0.001)
    verdict = weigh_moves(plan, LOAD, BYTES, costs, token_s=1e-4, num_steps=3.0)
    # After: ranks hold {0, 2} and {1, 3}: at most 65, and 50.
    assert verdict.saved_s.tolist() == pytest.approx([35 * 1e-4 * 3, 2 * 1e-4 * 3])
    # Each rank receives one expert of 1000 bytes per layer, and each layer is committed once.
    assert verdict.cost_s.tolist() == pytest.approx([0.002, 0.002])
    assert verdict.skipped.tolist() == [1]
    assert str(verdict) == "1 layer skipped: saves 0.6 ms, costs 2"
    kept = keep_layers(STANDING, TARGET, verdict.skipped)
    assert kept.slot_to_expert.tolist() == [[0, 2, 1, 3], [0, 1, 2, 3]]


def plan(costs: MoveCosts | None, **options: object) -> tuple[list[list[int]], list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("equipoise.balancer.planning")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    config = EPLBConfig(window_size=1, step_interval=3, **options)  # type: ignore[arg-type]
    try:
        made = plan_moves(Swap(), LOAD, STANDING, BYTES, config, costs, says=True)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return made.new.slot_to_expert.tolist(), said


def test_what_does_not_pay_is_skipped_and_said() -> None:
    costs = MoveCosts(byte_s=1e-6, layer_s=0.001)
    both, first = TARGET.slot_to_expert.tolist(), [[0, 2, 1, 3], [0, 1, 2, 3]]
    assert plan(costs, token_us=100.0) == (first, ["1 layer skipped: saves 0.6 ms, costs 2"])
    assert plan(costs) == (both, []), "without a token's cost nothing is weighed"
    assert plan(None, token_us=100.0) == (both, []), "nor before anything was measured"
    assert plan(costs, token_us=0.0) == (
        STANDING.slot_to_expert.tolist(),
        ["2 layers skipped: saves 0 ms, costs 4"],
    )


def test_nothing_is_planned_where_the_balance_is_good_enough() -> None:
    # Mean over largest load: 55 / 100 and 50 / 52.
    said = ["nothing planned: balancedness 0.756 is 0.750 or more"]
    assert plan(None, balancedness_threshold=0.75) == (STANDING.slot_to_expert.tolist(), said)
    assert plan(None, balancedness_threshold=0.76) == (TARGET.slot_to_expert.tolist(), [])


def test_a_layer_in_which_nothing_moves_is_not_skipped() -> None:
    unmoved = make_plan(STANDING, STANDING)
    verdict = weigh_moves(unmoved, LOAD, BYTES, MoveCosts(1.0, 1.0), token_s=1.0, num_steps=1.0)
    assert verdict.skipped.tolist() == []
