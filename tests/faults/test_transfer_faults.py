"""A rank dies or hangs in the middle: the others say who, within the deadline, and agree on what
was committed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from equipoise.comm import create_eplb_communicator
from equipoise.comm.byte_views import view_bytes
from equipoise.comm.exchange import deadline_in
from equipoise.comm.groups import Expected, RankGroup, create_rank_group
from equipoise.comm.queued import Queued
from equipoise.comm.torch_gloo import TorchDistGlooStagedEplbCommunicator
from equipoise.errors import TransferError
from equipoise.placement import Placement, place_in_order
from equipoise.topology import IntArray, Topology
from equipoise.transfer import rearrange_expert_weights_inplace
from tests.expert_weights import Shapes
from tests.ranks import SHORT_S, Rank, processes

SHAPES = Shapes(((((3, 5), torch.float32), ((7,), torch.int8)),) * 4)
OLD = place_in_order(4, 8, Topology(4, 2))
# Ranks 0 and 1 exchange experts, ranks 2 and 3 do: 0 and 1 hear of rank 2 by its status alone.
NEW = Placement(np.array([[0, 2, 1, 3, 4, 6, 5, 7]] * 4), 8, Topology(4, 2))
VICTIM = 2
SURVIVORS = (0, 1, 3)
LONG_S = 20.0
"""A deadline that nothing here waits for: what has died is noticed before."""


class Failing(TorchDistGlooStagedEplbCommunicator):
    """Rank 2 ends or hangs in its second exchange, before its headers or before its payload."""

    fault: str
    stage: str
    store: dist.Store

    def _end(self, flight: Queued) -> None:
        self._fail_at("header")
        super()._end(flight)

    def _carry(self, *parts: object) -> None:
        self._fail_at("payload")
        super()._carry(*parts)  # type: ignore[arg-type]

    def _fail_at(self, stage: str) -> None:
        if (self.rank, self._num_exchanges, self.stage) != (VICTIM, 2, stage):
            return
        self.store.set("victim", str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL if self.fault == "dies" else signal.SIGSTOP)


class DyingGroup(RankGroup):
    """Dies while it tells how its second chunk went: rank 0 still hears that all is fine."""

    num_gathered = 0

    def all_gather(
        self,
        tensor: torch.Tensor,
        *,
        busy_s: float = 0.0,
        meanwhile: Callable[[], None] | None = None,
        expected: Expected | None = None,
    ) -> list[torch.Tensor]:
        self.num_gathered += 1
        # The first is the agreement on what moves.
        if self.num_gathered < 3:
            return super().all_gather(tensor, busy_s=busy_s, meanwhile=meanwhile, expected=expected)
        assert expected is not None
        expected.exchange.send(view_bytes(tensor), 0)
        expected.exchange.wait(deadline_in(20))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")


def end_victim(store: dist.Store) -> None:
    """Once every survivor is over it; a process that is stopped would never end."""
    store.wait([f"over/{rank}" for rank in SURVIVORS], timedelta(seconds=LONG_S))
    os.kill(int(store.get("victim")), signal.SIGKILL)


def check_survivor(rank: Rank, weights: list[list[torch.Tensor]], committed: list[int]) -> None:
    """Slots are as the commits say, on every survivor alike."""
    table = OLD.slot_to_expert.copy()
    table[committed] = NEW.slot_to_expert[committed]
    SHAPES.assert_hold(weights, Placement(table, 8, OLD.topology), rank.rank)
    rank.store.set(f"committed/{rank.rank}", repr(committed))
    keys = [f"committed/{peer}" for peer in SURVIVORS]
    # Some hear of it by their deadline, which is behind others'.
    rank.store.wait(keys, timedelta(seconds=LONG_S))
    told = {rank.store.get(key) for key in keys}
    assert len(told) == 1


def rebuild(rank: Rank, weights: list[list[torch.Tensor]]) -> None:
    """The survivors move experts again, in the same processes, in the next generation."""
    number = {0: 0, 1: 1, 3: 2}[rank.rank]
    group = create_rank_group(
        rank.store,
        number,
        3,
        torch.device("cpu"),
        generation=1,
        timeout=timedelta(seconds=LONG_S),
        device_group="gloo",
    )
    topology = Topology(3, 2)
    before = place_in_order(4, 6, topology)
    after = Placement(before.slot_to_expert[:, ::-1], 6, topology)
    for layer, fresh in zip(weights, SHAPES.weights(before, number), strict=True):
        for tensor, values in zip(layer, fresh, strict=True):
            tensor.copy_(values)
    communicator = create_eplb_communicator(group, "torch_gloo", weights)
    rearrange_expert_weights_inplace(before, after, weights, communicator, group)
    SHAPES.assert_hold(weights, after, number)


@pytest.mark.parametrize("stage", ["header", "payload"])
@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_survivors_name_the_rank_and_agree_on_what_is_committed(
    tmp_path: object, fault: str, stage: str
) -> None:
    ends = processes(4, dies=(VICTIM,))
    ends(fail_in_the_second_chunk)(tmp_path=tmp_path, fault=fault, stage=stage)


@processes(4, dies=(VICTIM,))
def test_survivors_agree_when_only_some_heard_that_all_is_fine(rank: Rank) -> None:
    group = rank.make_group()
    if rank.rank == VICTIM:
        group.__class__ = DyingGroup
    weights = SHAPES.weights(OLD, rank.rank)
    communicator = create_eplb_communicator(group, "torch_gloo", weights)
    committed: list[int] = []
    with pytest.raises(TransferError) as caught:
        rearrange_expert_weights_inplace(
            OLD,
            NEW,
            weights,
            communicator,
            group,
            on_commit=lambda layers: committed.extend(layers.tolist()),
        )
    assert caught.value.rank == rank.rank
    # Whose proposal reaches the store first is open; that it stands for all is not.
    assert committed in ([0], [0, 1])
    # Who still expects this rank hears of it, although the error is kept.
    communicator.close()
    group.close()
    check_survivor(rank, weights, committed)


def fail_in_the_second_chunk(rank: Rank, fault: str, stage: str) -> None:
    timeout_s = SHORT_S if fault == "hangs" else LONG_S
    # So that nobody is late already when a deadline begins to count.
    rank.store.set(f"begins/{rank.rank}", "now")
    rank.store.wait([f"begins/{peer}" for peer in range(rank.size)], timedelta(seconds=LONG_S))
    group = rank.make_group(timeout_s=timeout_s)
    weights = SHAPES.weights(OLD, rank.rank)
    communicator = Failing(group, weights, timeout_s)
    communicator.fault, communicator.stage, communicator.store = fault, stage, rank.store
    committed: list[int] = []

    def note(layers: IntArray) -> None:
        committed.extend(layers.tolist())

    def run() -> None:
        rearrange_expert_weights_inplace(OLD, NEW, weights, communicator, group, on_commit=note)

    started = time.monotonic()
    with pytest.raises(TransferError, match=f"^rank {rank.rank}\\b") as caught:
        run()
    assert caught.value.rank == rank.rank
    # Where a rank hangs, who notices first closes its connections, and may be noticed before.
    gave_up = fault == "hangs" and "gave up first" in str(caught.value)
    assert caught.value.peer == VICTIM or gave_up, caught.value
    # A rank that only waits for the outcome allows for an exchange's two deadlines before its own;
    # who has died is noticed without any.
    longest_s = 3 * timeout_s + LONG_S if fault == "hangs" else timeout_s
    assert time.monotonic() - started < longest_s
    assert committed == [0]
    check_survivor(rank, weights, committed)
    communicator.close()
    group.close()
    rebuild(rank, weights)
    rank.store.set(f"over/{rank.rank}", "yes")
    if rank.rank == 0 and fault == "hangs":
        end_victim(rank.store)
