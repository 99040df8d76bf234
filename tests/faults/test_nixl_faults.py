"""The wire nixl when ranks stop, die or say what is not so."""

from __future__ import annotations

import gc
import os
import signal
import time
import weakref
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from equipoise.comm.nixl import NixlEplbCommunicator
from equipoise.comm.nixl.agent import Read
from equipoise.comm.spans import Regions, Spans
from equipoise.errors import TransferError
from tests.ranks import SHORT_S, Rank, processes

MEGABYTE = 1 << 20
LONG_S = 20.0
"""A deadline that nothing here waits for: what has died, or says what is not so, is noticed before,
within what a busy machine takes."""


def make(rank: Rank, timeout_s: float) -> NixlEplbCommunicator:
    """A communicator that has exchanged something already, so that all connections stand.

    All ranks return together, so that none is late when the deadline of one begins to count.
    """
    group = rank.make_group(timeout_s=LONG_S)
    communicator = NixlEplbCommunicator(group, (), timeout_s)
    communicator.execute()
    rank.store.set(f"pid/{rank.rank}", str(os.getpid()))
    group.barrier()
    return communicator


def use_only_tcp() -> None:
    """READs then need the peer's progress; by copies between processes they are over at once."""
    os.environ["UCX_TLS"] = "tcp"


def signal_after_offer(communicator: NixlEplbCommunicator, number: signal.Signals) -> None:
    """Have this process get a signal as soon as it has offered something."""
    notify = communicator._agent.notify

    def notify_and_stop(name: str, message: bytes) -> None:
        notify(name, message)
        os.kill(os.getpid(), number)

    communicator._agent.notify = notify_and_stop  # type: ignore[method-assign]


def tell_after_offer(communicator: NixlEplbCommunicator, rank: Rank) -> None:
    """Have the others know when this rank has offered something."""
    notify = communicator._agent.notify

    def notify_and_tell(name: str, message: bytes) -> None:
        notify(name, message)
        rank.store.set("offered", "yes")

    communicator._agent.notify = notify_and_tell  # type: ignore[method-assign]


def stop_before_read(communicator: NixlEplbCommunicator, rank: Rank, other: int) -> None:
    """Stop another rank once its offer has come, and before a READ of it begins."""
    post = communicator._agent.post

    def stop_and_post(read: Read) -> None:
        pid = int(rank.store.get(f"pid/{other}"))
        os.kill(pid, signal.SIGSTOP)
        # Each of its threads stops in its own time, and one could still serve the READ.
        while any(read_state(stat) != "T" for stat in Path(f"/proc/{pid}/task").glob("*/stat")):
            time.sleep(0.001)
        post(read)

    communicator._agent.post = stop_and_post  # type: ignore[method-assign]


def read_state(stat: Path) -> str:
    """Of a thread; T once it is stopped, or has ended meanwhile."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "T"


def kill(rank: Rank, other: int) -> None:
    os.kill(int(rank.store.get(f"pid/{other}")), signal.SIGKILL)


@processes(3, dies=(1,))
def test_a_stopped_rank_is_named_by_all_and_the_others_get_theirs(rank: Rank) -> None:
    communicator = make(rank, timeout_s=SHORT_S)
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    other = 2 - rank.rank
    into = torch.zeros(3 * MEGABYTE, dtype=torch.uint8)
    communicator.add_send(torch.full_like(into, 10 + rank.rank), other)
    communicator.add_recv(into, other)
    communicator.add_send(into.clone(), 1)
    communicator.add_recv(torch.zeros(5), 1)
    started = time.monotonic()
    said = rf"rank 1 did not answer within {SHORT_S:.1f} s"
    with pytest.raises(TransferError, match=said) as caught:
        communicator.execute()
    assert time.monotonic() - started < SHORT_S + LONG_S
    assert (caught.value.rank, caught.value.peer) == (rank.rank, 1)
    assert bool((into == 10 + other).all())
    started = time.monotonic()
    communicator.close()
    # Without another wait for who is stopped.
    assert time.monotonic() - started < SHORT_S
    assert communicator.num_open_handles == 0
    rank.store.set(f"through/{rank.rank}", "yes")
    rank.store.wait([f"through/{other}"])
    if rank.rank == 0:
        kill(rank, 1)


@processes(2, dies=(1,))
def test_memory_of_a_read_that_never_ended_is_not_used_again(rank: Rank) -> None:
    use_only_tcp()
    communicator = make(rank, timeout_s=LONG_S if rank.rank else SHORT_S)
    size = 4 * MEGABYTE  # One piece of the pool, so one offer and one READ.
    if rank.rank == 1:
        communicator.add_send(torch.ones(size, dtype=torch.uint8), 0)
        tell_after_offer(communicator, rank)
        communicator.execute()
    stop_before_read(communicator, rank, 1)
    rank.store.wait(["offered"])
    into = torch.zeros(size, dtype=torch.uint8)
    address = into.data_ptr()
    communicator.add_recv(into, 1)
    with pytest.raises(TransferError, match="rank 1 did not answer within"):
        communicator.execute()
    communicator.close()
    # The agent, its peer, the registrations of pool and landing, the READ.
    assert communicator.num_open_handles == 5
    agent = weakref.ref(communicator._agent)
    del communicator, into
    gc.collect()
    assert agent() is not None
    fresh = [torch.zeros(size, dtype=torch.uint8) for _ in range(4)]
    assert all(abs(tensor.data_ptr() - address) >= size for tensor in fresh)
    kill(rank, 1)
    assert not any(tensor.any() for tensor in fresh)


@pytest.mark.parametrize("tcp", [False, True])
@processes(2, dies=(1,))
def test_a_rank_that_dies_after_its_offer_is_named_at_once(rank: Rank, tcp: bool) -> None:
    if tcp:
        use_only_tcp()
    communicator = make(rank, timeout_s=LONG_S)
    size = 16 * MEGABYTE
    if rank.rank == 1:
        communicator.add_send(torch.ones(size, dtype=torch.uint8), 0)
        signal_after_offer(communicator, signal.SIGKILL)
        communicator.execute()
    communicator.add_recv(torch.zeros(size, dtype=torch.uint8), 1)
    started = time.monotonic()
    with pytest.raises(TransferError, match="rank 1") as caught:
        communicator.execute()
    assert time.monotonic() - started < LONG_S
    assert caught.value.peer == 1
    communicator.close()
    assert communicator.num_open_handles == 0


@processes(2)
def test_an_offer_of_memory_that_nobody_registered_is_refused_on_both_sides(rank: Rank) -> None:
    communicator = make(rank, timeout_s=LONG_S)
    assert communicator._wire is not None
    loose = torch.ones(1000, dtype=torch.uint8)
    if rank.rank == 1:
        everything = Regions(Spans.of([(1, 1 << 62)]))
        object.__setattr__(communicator._wire, "registered", everything)
        communicator.add_send(loose, 0)
    else:
        communicator.add_recv(loose, 1)
    started = time.monotonic()
    with pytest.raises(TransferError, match="rank 0 cannot read from rank 1: NIXL says") as caught:
        communicator.execute()
    assert time.monotonic() - started < LONG_S
    assert (caught.value.rank, caught.value.peer) == (rank.rank, 1 - rank.rank)
    communicator.close()
    assert communicator.num_open_handles == 0


@processes(3)
def test_a_bystander_learns_of_a_failure_at_its_next_exchange(rank: Rank) -> None:
    communicator = make(rank, timeout_s=LONG_S)
    if rank.rank == 0:
        communicator.add_send(torch.ones(4), 1)
    if rank.rank == 2:
        communicator.execute()
        started = time.monotonic()
        with pytest.raises(TransferError, match="has failed in exchange 2"):
            communicator.execute()
        assert time.monotonic() - started < LONG_S
        rank.store.set("told", "yes")
    else:
        with pytest.raises(TransferError, match="rank 1 expects 0 tensors"):
            communicator.execute()
        # A rank that has ended would be found gone, before anybody hears what it said.
        rank.store.wait(["told"], timedelta(seconds=2 * LONG_S))


@processes(2, dies=(1,))
def test_a_rank_that_does_not_come_to_the_set_up_is_named(rank: Rank) -> None:
    group = rank.make_group(timeout_s=LONG_S)
    # Not while the other still makes the group.
    group.barrier()
    if rank.rank == 1:
        rank.store.wait(["ready"], timedelta(seconds=LONG_S))
        os.kill(os.getpid(), signal.SIGKILL)
    rank.store.set("ready", "yes")
    with pytest.raises(TransferError, match="rank 0, nixl: rank 1 closed the connection"):
        NixlEplbCommunicator(group, (), LONG_S)
