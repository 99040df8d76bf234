"""Rebalancing in the background: same plans, slots and maps as in the foreground, no collective."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.balancer.events import CpuGpuEvent
from equipoise.balancer.limits import Pace
from equipoise.comm.base import ExpertMoves
from equipoise.comm.groups import RankGroup
from equipoise.comm.registry import create_eplb_communicator
from equipoise.config import EPLBConfig
from equipoise.errors import ConfigError, TransferError
from equipoise.plan.slot_order import keep_slots
from equipoise.policy import get_policy
from equipoise.transfer.mover import ChunkMover
from tests.background import A_LAYER_AT_A_TIME, ServingInBackground
from tests.ranks import Rank, processes
from tests.test_balancer import CPU, NUM_EXPERTS, NUM_LAYERS, Serving, skew


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
        standing = serving.maps.placement
        assert serving.state.is_rebalancing
        serving.state.pause()
        (outcome,) = serving.step_until_done(skew(1))
        assert outcome.planned_step == planned_step
        assert outcome.step == serving.state.steps > planned_step
        window = 2 * num_ranks * skew(hot)
        oracle = get_policy("deepseek").place(window, outcome.placement.topology)
        assert outcome.placement == keep_slots(standing, oracle) == serving.maps.placement
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
    serving = ServingInBackground(
        rank.make_group(), window_size=4, step_interval=2, log_balancedness=True
    )
    serving.add()
    calls: list[tuple[str, str]] = []
    for group in (serving.group, serving.state.transfer_group):
        for name in ("all_gather", "all_reduce", "decide", "send", "recv"):
            watch(group, name, calls)
    if rank.rank == 1:
        serving.state.request("resume")
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


@processes(2)
def test_a_damaged_expert_is_named_and_not_committed(rank: Rank) -> None:
    serving = ServingInBackground(rank.make_group(), window_size=4, step_interval=4, verify="all")
    serving.add()
    add_moves = serving.communicator.add_moves

    def damage(moves: ExpertMoves) -> None:
        add_moves(moves)
        finish = serving.communicator.finish

        def finish_and_damage() -> None:
            finish()
            if len(moves.into):
                moves.into[0] ^= 1

        serving.communicator.finish = finish_and_damage  # type: ignore[method-assign]

    if rank.rank == 1:
        serving.communicator.add_moves = damage  # type: ignore[method-assign]
    with pytest.raises(TransferError, match="arrived damaged on rank 1 from rank 0"):
        serving.step_on()
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
@processes(2)
def test_who_is_stopped_before_an_exchange_keeps_nobody_waiting(rank: Rank, wire: str) -> None:
    """Rank 1 rests before it would stage; rank 0 has begun the exchange by then."""
    if rank.rank == 1:
        Pace.wait_s = 1000.0  # type: ignore[assignment,misc]
    serving = ServingInBackground(rank.make_group(timeout_s=20), wire, step_interval=1000)
    begun = threading.Event()
    start = serving.communicator.start

    def start_and_tell(*arguments: object) -> None:
        begun.set()
        start(*arguments)  # type: ignore[arg-type]

    serving.communicator.start = start_and_tell  # type: ignore[method-assign]
    serving.add()
    serving.step(skew(5))
    serving.state.rearrange()
    if rank.rank == 0:
        assert begun.wait(20.0)
    serving.group.barrier()
    began = time.monotonic()
    assert serving.state.close()
    assert time.monotonic() - began < 15.0, "the deadline is 20 s"
    serving.assert_slots_hold_what_maps_say()
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


@processes(2)
def test_a_rank_whose_worker_hangs_commits_what_was_decided_as_it_closes(rank: Rank) -> None:
    """Between the decision and its step, while the next chunk travels."""
    reached, released = threading.Event(), threading.Event()
    stage, calls = ChunkMover.stage, itertools.count()

    def stage_slowly(mover: ChunkMover, *arguments: Any) -> None:
        if next(calls) == 1:
            reached.set()
            if rank.rank == 0:
                released.wait(60.0)
        stage(mover, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkMover, "stage", stage_slowly)
        serving = ServingInBackground(
            rank.make_group(), step_interval=1000, staging_bytes=A_LAYER_AT_A_TIME
        )
        serving.add()
        serving.step(skew(5))
        serving.state.rearrange()
        assert reached.wait(20.0)
        assert serving.maps.placement == serving.placement
        has_ended = serving.state.close(wait_s=2.0)
        assert rank.rank != 0 or not has_ended
        serving.assert_slots_hold_what_maps_say()
        stands = serving.maps.placement.fingerprint()
        rank.store.set(f"stands {rank.rank}", stands)
        rank.store.wait([f"stands {1 - rank.rank}"], timedelta(seconds=20))
        other = rank.store.get(f"stands {1 - rank.rank}").decode()
        assert stands == other != serving.placement.fingerprint()
        released.set()
        serving.close()


class Staging:
    """Bytes that live as tensors of uint8, as memory profiling would count them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()
        self._empty = torch.empty
        patch.setattr(torch, "empty", self._count)

    def _count(self, *size: int, **options: object) -> torch.Tensor:
        tensor = self._empty(*size, **options)  # type: ignore[call-overload]
        if tensor.dtype == torch.uint8:
            self._add(tensor.numel())
            weakref.finalize(tensor.untyped_storage(), self._add, -tensor.numel())
        return tensor

    def _add(self, num_bytes: int) -> None:
        with self._lock:
            self.now += num_bytes
            self.most = max(self.most, self.now)


@pytest.mark.parametrize(
    ("options", "half"),
    [
        ({}, NUM_LAYERS * 5 * 32),
        ({"staging_bytes": 2 * 5 * 32}, 5 * 32),
        ({"max_bytes_per_step": 1}, 5 * 32),
    ],
    ids=["no bound", "bounded", "a layer a step"],
)
@processes(2)
def test_a_profile_pass_takes_both_halves(rank: Rank, options: dict[str, int], half: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        staging = Staging(patch)
        serving = ServingInBackground(rank.make_group(), **options)
        serving.add()
        serving.state.rearrange(is_profile=True)
        assert 2 * half <= staging.most < 3 * half + 1000, "the wire has buffers too"
        reserved, staging.most = staging.most, staging.now
        for hot in range(NUM_EXPERTS):
            serving.step(skew(hot))
            serving.state.rearrange()
            serving.step_until_done(skew(hot))
        assert staging.most <= reserved
        serving.close()
