"""How much a step commits, and how fast experts travel."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from equipoise.balancer.limits import ChunkSize, Pace, StepTally, cut_plan
from equipoise.balancer.protocol import ABORT, say_commit
from equipoise.config import EPLBConfig
from equipoise.placement import place_in_order
from equipoise.plan.transfer_plan import TransferPlan, make_plan
from equipoise.policy import get_policy
from equipoise.topology import Topology
from tests.background import ServingInBackground
from tests.ranks import Rank, processes
from tests.test_balancer import CPU, NUM_LAYERS, skew

LAYERS, EXPERT_BYTES = 12, 100
# For a layer, and perhaps another that has little to move.
LARGE_ENOUGH = 2 * 5 * 32


def make_wide_plan() -> TransferPlan:
    standing = place_in_order(LAYERS, 8, Topology(4, 3))
    load = np.random.default_rng(0).integers(1, 100, (LAYERS, 8))
    target = get_policy("deepseek").place(load, standing.topology, standing=standing)
    return make_plan(standing, target)


def cut(config: EPLBConfig, rank: int = 0) -> list[ChunkSize]:
    plan = make_wide_plan()
    shares, sizes = cut_plan(plan, rank, np.full(LAYERS, EXPERT_BYTES), config, CPU)
    layers = np.concatenate(shares.chunks)
    assert layers.tolist() == list(range(LAYERS)), "each layer that differs, once"
    for share, size in zip(shares, sizes, strict=True):
        assert size.num_layers == len(share.layers)
        assert share.num_bytes <= size.num_bytes
    return sizes


def test_without_limits_small_layers_go_together() -> None:
    (size,) = cut(EPLBConfig())
    assert size.num_layers == LAYERS


def test_chunks_keep_to_the_layers_and_bytes_of_a_step() -> None:
    assert [size.num_layers for size in cut(EPLBConfig(max_layers_per_step=5))] == [5, 5, 2]
    sizes = cut(EPLBConfig(max_bytes_per_step=700))
    assert len(sizes) > 1
    assert max(size.num_bytes for size in sizes) <= 700
    assert cut(EPLBConfig(max_bytes_per_step=700), rank=3) == sizes
    alone = cut(EPLBConfig(max_bytes_per_step=1))
    assert [size.num_layers for size in alone] == [1] * LAYERS


def test_a_rate_makes_short_bursts() -> None:
    sizes = cut(EPLBConfig(max_bytes_per_s=7000))
    assert max(size.num_bytes for size in sizes) <= 700


def test_a_step_takes_chunks_while_it_has_room() -> None:
    config = EPLBConfig(max_bytes_per_step=100, max_layers_per_step=4)
    tally = StepTally()
    assert tally.find_earliest(ChunkSize(1000, 1), config) == 0
    tally = tally.add(ChunkSize(60, 2), say_commit(7))
    assert tally.find_earliest(ChunkSize(40, 2), config) == 7
    assert tally.find_earliest(ChunkSize(41, 1), config) == 8
    assert tally.find_earliest(ChunkSize(1, 3), config) == 8
    assert tally.add(ChunkSize(40, 2), ABORT) == tally
    tally = tally.add(ChunkSize(40, 2), say_commit(7))
    assert tally == StepTally(7, 100, 4)
    assert tally.add(ChunkSize(5, 1), say_commit(9)) == StepTally(9, 5, 1)


def test_a_pace_waits_as_long_as_the_bytes_would_take() -> None:
    free = Pace(None)
    free.note(1 << 40)
    assert (free.wait_s, free.span_s) == (0.0, 0.0)
    pace = Pace(1000)
    assert pace.wait_s == 0.0
    began = time.monotonic()
    pace.note(50_000)
    assert pace.span_s == 50.0
    left = pace.wait_s
    assert began + 50.0 - time.monotonic() <= left <= 50.0


@pytest.mark.parametrize(
    ("limits", "most"),
    [({}, NUM_LAYERS), ({"max_layers_per_step": 1}, 1), ({"max_bytes_per_step": 1}, 1)],
    ids=["no limit", "layers", "bytes"],
)
@processes(2)
def test_a_step_commits_no_more_than_it_may(rank: Rank, limits: dict[str, int], most: int) -> None:
    serving = ServingInBackground(
        rank.make_group(), window_size=1, step_interval=2, staging_bytes=LARGE_ENOUGH, **limits
    )
    committed: Counter[int] = Counter()
    serving.add(on_commit=lambda _layer, _slots: committed.update([serving.state.steps]))
    num_ended = 0
    while num_ended < 4:
        # Of steps in which the workers get several chunks ready, some would take them all.
        time.sleep(0.1)
        num_ended += len(serving.step_alone(skew(serving.state.steps % 7)))
    assert max(committed.values()) <= most
    serving.close()


@processes(2)
def test_experts_travel_no_faster_than_they_may(rank: Rank) -> None:
    rate = 400
    serving = ServingInBackground(
        rank.make_group(),
        window_size=1,
        step_interval=1000,
        max_layers_per_step=1,
        max_bytes_per_s=rate,
    )
    serving.add()
    serving.step(skew(5))
    began = time.monotonic()
    serving.state.rearrange()
    (outcome,) = serving.step_until_done(skew(5))
    took = time.monotonic() - began
    # Each rank is one end of every move; the last chunk's time may be still to come.
    first = outcome.moves_per_layer[:-1].sum() / outcome.moves * outcome.bytes
    assert first > 0
    assert first / rate <= took
    assert outcome.transfer_s < took
    serving.close()


@processes(2)
def test_a_slow_pace_does_not_keep_anybody_from_closing(rank: Rank) -> None:
    serving = ServingInBackground(rank.make_group(), max_layers_per_step=1, max_bytes_per_s=1)
    serving.add()
    serving.step(skew(5))
    serving.state.rearrange()
    # Once the first layer is committed, the worker rests before the second.
    while serving.maps.placement == serving.placement:
        serving.step(skew(5))
    began = time.monotonic()
    assert serving.state.close()
    assert time.monotonic() - began < 15.0, "the deadline is 20 s"
    serving.close()
