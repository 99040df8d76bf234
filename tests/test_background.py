"""Rebalancing in the background: same plans, slots and maps as in the foreground, no collective."""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time

import numpy as np
import pytest
import torch

from equipoise.balancer import EplbState
from equipoise.balancer.events import CpuGpuEvent
from equipoise.comm.base import ExpertMoves
from equipoise.comm.groups import RankGroup
from equipoise.comm.registry import create_eplb_communicator
from equipoise.config import EPLBConfig
from equipoise.dispatch.maps import PlacementMaps
from equipoise.errors import ConfigError, EquipoiseError, TransferError
from equipoise.load.recorder import LoadRecorder
from equipoise.placement import place_in_order
from equipoise.policy import get_policy
from equipoise.topology import Topology
from tests.ranks import Rank, processes
from tests.test_balancer import CPU, NUM_EXPERTS, NUM_LAYERS, Serving, fill_slots, skew


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

    def step(self, load: np.ndarray) -> tuple:
        """One step in lockstep, as a model's dispatch keeps it."""
        self.send_tokens(load)
        outcomes = self.state.step()
        self.assert_slots_hold_what_maps_say()
        self.group.barrier()
        return outcomes

    def step_until_done(self, load: np.ndarray, most: int = 2000) -> tuple:
        outcomes: tuple = ()
        for _ in range(most):
            outcomes += self.step(load)
            if not self.state.is_rebalancing:
                return outcomes
        raise AssertionError("the rebalance does not end")

    def close(self) -> None:
        self.state.close()
        super().close()


@pytest.mark.parametrize("wire", ["torch_gloo", "nixl"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@processes()
def test_a_plan_is_carried_out_beside_the_steps(rank: Rank, num_ranks: int, wire: str) -> None:
    serving = ServingInBackground(
        rank.make_group(), wire, window_size=2, step_interval=3, verify="all"
    )
    serving.add()
    for hot in (6, 4):
        for load in (skew(7), skew(hot), skew(hot)):
            assert serving.step(load) == ()
        planned_step = serving.state.steps
        assert serving.state.is_rebalancing
        serving.state.pause()
        (outcome,) = serving.step_until_done(skew(1))
        assert outcome.planned_step == planned_step
        assert outcome.step == serving.state.steps > planned_step
        window = 2 * num_ranks * skew(hot)
        oracle = get_policy("deepseek").place(window, outcome.placement.topology)
        assert outcome.placement == oracle == serving.maps.placement
        assert outcome.moves == outcome.moves_per_layer.sum()
        assert outcome.bytes == outcome.moves * (6 * 4 + 4 * 2)
        told = serving.group.all_gather(torch.tensor([outcome.step]))
        assert len({int(step) for step in told}) == 1
        while serving.state.steps % 3:
            serving.step(skew(1))
        serving.state.resume()
    serving.close()


@processes(2)
def test_nothing_to_move_ends_at_a_step_that_all_know(rank: Rank) -> None:
    serving = ServingInBackground(rank.make_group(), window_size=1, step_interval=1)
    serving.add()
    serving.step(np.zeros((NUM_LAYERS, NUM_EXPERTS), dtype=np.int64))
    assert serving.state.is_rebalancing
    serving.state.pause()
    assert serving.step_until_done(np.zeros((NUM_LAYERS, NUM_EXPERTS), dtype=np.int64)) == ()
    assert serving.maps.placement == serving.placement
    serving.close()


@processes(2)
def test_rearrange_begins_one_at_once_unless_one_is_under_way(rank: Rank) -> None:
    serving = ServingInBackground(rank.make_group(), window_size=4, step_interval=1000)
    serving.add()
    serving.step(skew(5))
    assert serving.state.rearrange() == ()
    assert serving.state.is_rebalancing
    assert serving.state.rearrange() == ()
    (outcome,) = serving.step_until_done(skew(5))
    assert outcome.planned_step == 1
    assert serving.maps.placement.replica_counts[0, 5] > 1
    assert serving.state.stats().models["model"].rebalances == 1
    serving.close()


@processes(2)
def test_two_models_move_in_one_rebalance(rank: Rank) -> None:
    serving = ServingInBackground(rank.make_group(), window_size=4, step_interval=1000)
    serving.add()
    draft = Serving(rank.make_group(generation=1), EPLBConfig(use_async=False))
    communicator = create_eplb_communicator(
        serving.state.transfer_group, "torch_gloo", draft.weights
    )
    serving.state.add_model("draft", draft.weights, draft.maps, draft.recorder, communicator)
    draft.send_tokens(skew(2))
    serving.step(skew(5))
    serving.state.rearrange()
    with pytest.raises(ConfigError, match="model 'late' comes after the first step"):
        serving.add("late")
    outcomes = serving.step_until_done(skew(5))
    assert [outcome.model for outcome in outcomes] == ["model", "draft"]
    draft.assert_slots_hold_what_maps_say()
    assert serving.maps.placement.replica_counts[0, 5] > 1
    assert draft.maps.placement.replica_counts[0, 2] > 1
    serving.close()
    communicator.close()
    draft.close()


def test_an_event_orders_two_threads() -> None:
    """Blocks until the record, in every round; what was written before is seen after."""
    ready, freed = CpuGpuEvent(CPU), CpuGpuEvent(CPU)
    box: list[int] = []
    seen: list[int] = []

    def consume() -> None:
        for _ in range(500):
            assert ready.wait(20.0)
            seen.append(box[0])
            freed.record()

    thread = threading.Thread(target=consume)
    thread.start()
    for number in range(500):
        box[:] = [number]
        ready.record()
        assert freed.wait(20.0)
    thread.join(20.0)
    assert seen == list(range(500))


def test_an_event_is_not_recorded_twice() -> None:
    event = CpuGpuEvent(CPU)
    event.record()
    with pytest.raises(RuntimeError, match="recorded again before anybody waited"):
        event.record()
    assert event.wait(0.0)
    event.record()


def test_a_wait_has_a_deadline_and_can_be_cancelled() -> None:
    event = CpuGpuEvent(CPU)
    with pytest.raises(TimeoutError, match=r"nothing was recorded within 0.1 s"):
        event.wait(0.1)
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(event.wait(20.0)))
    thread.start()
    event.cancel()
    thread.join(20.0)
    assert answers == [False]
    event.record()
    assert event.wait(0.0), "what was recorded before the wait counts"


@processes(2)
def test_the_forward_thread_exchanges_nothing(rank: Rank) -> None:
    serving = ServingInBackground(rank.make_group(), window_size=4, step_interval=2)
    serving.add()
    calls: list[tuple[str, str]] = []
    for group in (serving.group, serving.state.transfer_group):
        for name in ("all_gather", "all_reduce", "decide", "send", "recv"):
            watch(group, name, calls)
    num_outcomes = 0
    while num_outcomes < 3:
        serving.send_tokens(skew(serving.state.steps % NUM_EXPERTS))
        num_outcomes += len(serving.state.step())
    assert {thread for _, thread in calls} == {"equipoise-worker"}
    assert {name for name, _ in calls} >= {"all_gather", "decide"}
    serving.close()


def watch(group: RankGroup, name: str, calls: list[tuple[str, str]]) -> None:
    method = getattr(group, name)

    def call(*arguments: object, **options: object) -> object:
        calls.append((name, threading.current_thread().name))
        return method(*arguments, **options)

    setattr(group, name, call)


class Breaking:
    """Breaks one rank's worker at a chunk, in the way asked for."""

    def __init__(self, serving: ServingInBackground, at: int, how: str) -> None:
        self.execute = serving.communicator.execute
        self.released = threading.Event()
        self.left = at
        self.how = how
        serving.communicator.execute = self  # type: ignore[method-assign, assignment]

    def __call__(self) -> None:
        self.left -= 1
        if self.left == -1:
            match self.how:
                case "raise":
                    raise OSError("the wire is cut")
                case "hang":
                    self.released.wait(40.0)
                case "die":
                    os._exit(1)
        self.execute()


def step_until_it_fails(serving: ServingInBackground, deadline_s: float = 40.0) -> Exception:
    """Steps without lockstep, so that nothing but the balancer can notice."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        serving.send_tokens(skew(serving.state.steps % NUM_EXPERTS))
        try:
            serving.state.step()
        except EquipoiseError as error:
            return error
        serving.assert_slots_hold_what_maps_say()
    raise AssertionError("nobody noticed")


@pytest.mark.parametrize("at", [0, 1, 2])
@processes(3)
def test_a_failure_in_a_worker_is_raised_on_every_rank(rank: Rank, at: int) -> None:
    serving = ServingInBackground(
        rank.make_group(timeout_s=10), window_size=4, step_interval=4, staging_bytes=200
    )
    serving.add()
    if rank.rank == 1:
        Breaking(serving, at, "raise")
    for hot in range(4):
        serving.send_tokens(skew(hot))
        serving.state.step()
    error = step_until_it_fails(serving)
    assert isinstance(error, TransferError)
    serving.assert_slots_hold_what_maps_say()
    if rank.rank == 1:
        assert str(error) == "the wire is cut"
    assert serving.state.stats().failure == str(error)
    (rank.path / f"end-{rank.rank}").write_text(serving.maps.placement.fingerprint())
    serving.group.barrier()
    ends = {(rank.path / f"end-{peer}").read_text() for peer in range(3)}
    assert len(ends) == 1
    serving.close()


@processes(3)
def test_with_disable_serving_goes_on_from_what_stands(rank: Rank) -> None:
    serving = ServingInBackground(
        rank.make_group(timeout_s=10),
        window_size=4,
        step_interval=4,
        staging_bytes=200,
        on_failure="disable",
    )
    serving.add()
    if rank.rank == 1:
        Breaking(serving, 4, "raise")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("equipoise").addHandler(handler)
    num_outcomes = 0
    all_know = False
    while not all_know:
        num_outcomes += len(serving.step(skew(serving.state.steps % NUM_EXPERTS)))
        knows = torch.tensor([serving.state.stats().failure is not None])
        all_know = all(bool(theirs) for theirs in serving.group.all_gather(knows))
    for _ in range(20):
        assert serving.step(skew(3)) == ()
    assert num_outcomes >= 1, "three chunks are the first rebalance's; the fifth breaks a later one"
    counts = serving.group.all_gather(torch.tensor([num_outcomes]))
    assert all(int(theirs) == num_outcomes for theirs in counts)
    failure = serving.state.stats().failure
    assert failure == ("the wire is cut" if rank.rank == 1 else failure)
    assert len([line for line in said if "balancing is off from here on" in line]) == 1
    fingerprint = bytes.fromhex(serving.maps.placement.fingerprint())
    told = serving.group.all_gather(torch.tensor(list(fingerprint)))
    assert all(torch.equal(told[0], other) for other in told)
    assert serving.state.rearrange() == ()
    assert not serving.state.is_rebalancing
    serving.close()


@processes(3)
def test_a_worker_that_hangs_is_noticed_within_the_deadline(rank: Rank) -> None:
    serving = ServingInBackground(
        rank.make_group(timeout_s=2), window_size=4, step_interval=4, staging_bytes=200
    )
    serving.add()
    if rank.rank == 1:
        Breaking(serving, 1, "hang")
    for hot in range(4):
        serving.send_tokens(skew(hot))
        serving.state.step()
    began = time.monotonic()
    error = step_until_it_fails(serving)
    assert isinstance(error, EquipoiseError)
    assert time.monotonic() - began < 20
    serving.assert_slots_hold_what_maps_say()
    serving.state.close()


@processes(3, dies=(1,))
def test_a_dead_rank_is_noticed_by_the_workers(rank: Rank) -> None:
    serving = ServingInBackground(
        rank.make_group(timeout_s=10), window_size=4, step_interval=4, staging_bytes=200
    )
    serving.add()
    if rank.rank == 1:
        Breaking(serving, 1, "die")
    for hot in range(4):
        serving.send_tokens(skew(hot))
        serving.state.step()
    error = step_until_it_fails(serving)
    assert isinstance(error, TransferError)
    assert "rank 1" in str(error)
    serving.assert_slots_hold_what_maps_say()
    serving.state.close()


@processes(2)
def test_a_damaged_expert_is_named_and_not_committed(rank: Rank) -> None:
    serving = ServingInBackground(
        rank.make_group(timeout_s=10), window_size=4, step_interval=4, verify="all"
    )
    serving.add()
    add_moves = serving.communicator.add_moves

    def damage(moves: ExpertMoves) -> None:
        add_moves(moves)
        execute = serving.communicator.execute

        def execute_and_damage() -> None:
            execute()
            if len(moves.into):
                moves.into[0] ^= 1

        serving.communicator.execute = execute_and_damage  # type: ignore[method-assign]

    if rank.rank == 1:
        serving.communicator.add_moves = damage  # type: ignore[method-assign]
    for hot in range(4):
        serving.send_tokens(skew(hot))
        serving.state.step()
    error = step_until_it_fails(serving)
    assert "arrived damaged on rank 1 from rank 0" in str(error)
    serving.close()


@processes(3)
def test_a_rebalance_under_way_is_given_up_by_close(rank: Rank) -> None:
    serving = ServingInBackground(rank.make_group(), window_size=4, step_interval=1000)
    serving.add()
    serving.step(skew(5))
    serving.state.rearrange()
    serving.state.close()
    serving.state.close()
    serving.assert_slots_hold_what_maps_say()
    alive = [thread.name for thread in threading.enumerate()]
    assert "equipoise-worker" not in alive
    serving.close()


@pytest.mark.parametrize("wire", ["torch_gloo", "nixl"])
@processes(4)
def test_many_rebalances_at_any_pace_leave_every_slot_right(rank: Rank, wire: str) -> None:
    pace = random.Random(rank.rank)
    sys.setswitchinterval(1e-6)
    serving = ServingInBackground(rank.make_group(), wire, window_size=3, step_interval=1)
    serving.add()
    stage = serving.communicator.execute

    def execute_at_its_pace() -> None:
        time.sleep(pace.choice((0.0, 0.0, 0.001, 0.004)))
        stage()

    serving.communicator.execute = execute_at_its_pace  # type: ignore[method-assign]
    done = 0
    while done < 60:
        done += len(serving.step(skew(pace.randrange(NUM_EXPERTS))))
        time.sleep(pace.choice((0.0, 0.0, 0.001)))
        told = serving.group.all_gather(torch.tensor([done]))
        assert len({int(number) for number in told}) == 1
    serving.close()


@processes(2)
def test_what_cannot_pay_is_not_moved_again(rank: Rank) -> None:
    """Once costs are measured: a token costs nothing, so no move saves anything."""
    serving = ServingInBackground(
        rank.make_group(), window_size=1, step_interval=1000, token_us=0.0
    )
    serving.add()
    serving.step(skew(5))
    serving.state.rearrange()
    (first,) = serving.step_until_done(skew(5))
    assert first.moves > 0
    serving.step(skew(2))
    serving.state.rearrange()
    (second,) = serving.step_until_done(skew(2))
    assert (second.moves, second.placement) == (0, first.placement)
    serving.close()
