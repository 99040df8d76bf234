"""One generation's groups: results, deadlines, and who is named when a rank is missing."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from equipoise.comm.groups import create_rank_group
from equipoise.comm.process_groups import abort_later
from equipoise.errors import MembershipError
from tests.ranks import SHORT_S, Rank, processes


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@processes()
def test_collectives_give_every_rank_the_same(rank: Rank, num_ranks: int) -> None:
    group = rank.make_group()
    values = [torch.tensor([r, -r, 10 * r + 1]) for r in range(num_ranks)]
    assert torch.equal(torch.stack(group.all_gather(values[rank.rank])), torch.stack(values))
    for op, expected in (
        ("sum", torch.stack(values).sum(0)),
        ("max", torch.stack(values).amax(0)),
        ("min", torch.stack(values).amin(0)),
    ):
        mine = values[rank.rank].clone()
        group.all_reduce(mine, op)  # type: ignore[arg-type]
        assert torch.equal(mine, expected), op
    for dtype in (torch.bool, torch.float8_e4m3fn, torch.bfloat16):
        sent = torch.full((2, 3), rank.rank).to(dtype)
        for peer, got in enumerate(group.all_gather(sent)):
            assert got.dtype == dtype
            assert torch.equal(got.to(torch.float32), torch.full((2, 3), peer).to(dtype).float())
    group.barrier()
    group.close()


@processes(3)
def test_who_expects_a_gathering_early_hears_the_same(rank: Rank) -> None:
    group = rank.make_group()
    for number in range(6):
        # Each round another one does not, and what ranks send each other goes its own way.
        early = group.expect(torch.zeros(2)) if number % 3 != rank.rank else None
        after, before = (rank.rank + 1) % 3, (rank.rank + 2) % 3
        said = torch.zeros(1)
        if rank.rank:
            group.recv(said, before)
            group.send(said + 1, after)
        else:
            group.send(said, after)
            group.recv(said, before)
            assert float(said) == 2
        mine = torch.tensor([float(number), float(rank.rank)])
        gathered = group.all_gather(mine, expected=early)
        assert torch.stack(gathered).tolist() == [[number, peer] for peer in range(3)]
    group.close()


@processes(2)
def test_send_meets_recv(rank: Rank) -> None:
    group = rank.make_group()
    if rank.rank == 0:
        group.send(torch.arange(5), 1)
    else:
        got = torch.zeros(5, dtype=torch.int64)
        group.recv(got, 0)
        assert got.tolist() == [0, 1, 2, 3, 4]


@processes(3)
def test_the_default_group_is_left_alone_and_generations_stand_beside_each_other(
    rank: Rank,
) -> None:
    first = rank.make_group()
    second = rank.make_group(generation=1)
    assert not dist.is_initialized()
    total = torch.tensor([1])
    first.all_reduce(total)
    first.close()
    first.close()
    second.all_reduce(total)
    assert total.item() == 9
    with pytest.raises(MembershipError, match="generation 0 was closed"):
        first.barrier()


@processes(4, dies=(2,))
def test_a_dead_peer_is_named_at_once_by_everybody(rank: Rank) -> None:
    group = rank.make_group(timeout_s=20)
    group.barrier()
    if rank.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(MembershipError, match=rf"rank {rank.rank} .*rank 2 closed") as caught:
        group.barrier()
    assert (caught.value.rank, caught.value.peer) == (rank.rank, 2)
    assert time.monotonic() - started < 15, "the deadline is 20 s"
    # The survivors form the next generation in the same processes.
    group.close()
    number = {0: 0, 1: 1, 3: 2}[rank.rank]
    again = create_rank_group(
        rank.store,
        number,
        3,
        torch.device("cpu"),
        generation=1,
        timeout=timedelta(seconds=20),
        device_group="gloo",
    )
    total = torch.tensor([1])
    again.all_reduce(total)
    assert total.item() == 3


@processes(3)
def test_a_hung_peer_is_named_when_the_deadline_has_passed(rank: Rank) -> None:
    group = rank.make_group()
    group.barrier()
    group.timeout = timedelta(seconds=SHORT_S)
    if rank.rank == 1:
        rank.store.wait(["over/0", "over/2"], timedelta(seconds=20))
        return
    started = time.monotonic()
    told = f"rank 1 did not answer within {SHORT_S:.1f} s"
    with pytest.raises(MembershipError, match=told) as caught:
        group.all_gather(torch.zeros(3))
    assert 0.9 * SHORT_S < time.monotonic() - started < 3 * SHORT_S
    assert caught.value.peer == 1
    rank.store.set(f"over/{rank.rank}", "yes")


@processes(2)
def test_a_rank_that_does_not_come_is_named(rank: Rank) -> None:
    rank.make_group().barrier()
    with pytest.raises(MembershipError, match=f"rank 2 did not come within {SHORT_S:.1f} s"):
        rank.make_group(generation=1, timeout_s=SHORT_S, size=3)


@processes(3)
def test_the_first_proposal_stands_for_everybody(rank: Rank) -> None:
    group = rank.make_group()
    for _ in range(3):
        answer = group.decide(f"from {rank.rank}")
        answers = group.all_gather(torch.tensor([int(answer.removeprefix("from "))]))
        assert len({int(a) for a in answers}) == 1


@processes(2)
def test_the_store_forgets_what_was_decided_long_ago(rank: Rank) -> None:
    group = rank.make_group()
    for number in range(300):
        assert group.decide("commit", None if number % 2 else f"number {number}") == "commit"
        if number % 50 == 49:
            group.barrier()  # no rank may ask so late that the other has forgotten the question
    # What was asked before has been forgotten when the next question is answered.
    assert group.decide("yes", "is that all?") == "yes"
    group.barrier()
    there = [group.store.check([f"decision/{number}"]) for number in range(150)]
    assert there.count(True) == 128
    assert all(there[-128:])
    assert not group.store.check(["question/number 0"])
    assert group.store.check(["question/number 298"])
    group.barrier()
    group.close()


@processes(2)
def test_a_store_that_does_not_answer_is_given_up(rank: Rank) -> None:
    group = rank.make_group()
    group.timeout = timedelta(seconds=1)

    class Stopped(dist.Store):
        def compare_set(self, *_: object) -> bytes:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            signal.sigwait([signal.SIGUSR1])
            raise AssertionError("nobody signals")

    group.store = Stopped()
    with pytest.raises(MembershipError, match=r"store of generation 0 did not answer within 1\.0"):
        group.decide("commit")


def test_impossible_groups_are_refused() -> None:
    store = dist.HashStore()
    cpu = torch.device("cpu")
    timeout = timedelta(seconds=1)
    with pytest.raises(ValueError, match="rank 2 is not one of 2: ranks are 0 to 1"):
        create_rank_group(store, 2, 2, cpu, timeout=timeout, device_group="gloo")
    with pytest.raises(ValueError, match="NCCL group needs a CUDA device, not cpu"):
        create_rank_group(store, 0, 1, cpu, timeout=timeout, device_group="nccl")


class PlayedGroup:
    """Stands for a group over NCCL, which a CPU has not; tests/gpu has the real one."""

    def __init__(self) -> None:
        self.is_aborted = threading.Event()

    def abort(self) -> None:
        self.is_aborted.set()


def test_a_group_that_nobody_closes_soon_is_aborted_and_one_that_is_closed_is_not() -> None:
    stuck, closed, is_closed = PlayedGroup(), PlayedGroup(), threading.Event()
    is_closed.set()
    abort_later(closed, is_closed)  # type: ignore[arg-type]
    abort_later(stuck, threading.Event())  # type: ignore[arg-type]
    assert stuck.is_aborted.wait(20)
    assert not closed.is_aborted.is_set()
