"""A wire that is no wire: ranks are threads of one process. For tests of what builds on one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from equipoise.comm.announcement import Announcement, find_mismatch
from equipoise.comm.base import ExpertWeights
from equipoise.comm.exchange import PeerFailure, deadline_in
from equipoise.comm.parcels import Inbox, Landing, Outbox, Outgoing
from equipoise.comm.queued import Queued, QueuedCommunicator


@dataclass(frozen=True)
class _Post:
    """What one rank lays out for the others in one exchange."""

    announcements: dict[int, Announcement]
    outbox: Outbox


class MemoryFabric:
    """What the ranks of one group share.

    Owner: all of its ranks' threads; the condition guards every field.

    Args:
        size: R.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._posts: dict[int, tuple[int, _Post]] = {}
        self._finished: dict[int, int] = {}
        self._gone: set[int] = set()

    def leave(self, rank: int) -> None:
        """Be a rank that has died: whoever waits for it fails at once."""
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()

    def post(self, rank: int, number: int, post: _Post) -> None:
        """Lay something out for the peers; all of them have finished with what lay there."""
        with self._changed:
            self._posts[rank] = (number, post)
            self._changed.notify_all()

    def finish(self, rank: int, number: int) -> None:
        """Say that this rank reads nothing more of what others laid out."""
        with self._changed:
            self._finished[rank] = number
            self._changed.notify_all()

    def await_post(self, peer: int, number: int, deadline: float) -> _Post | PeerFailure:
        """What a peer lays out, once it does."""
        failure = self._await(peer, lambda: self._posts.get(peer, (0,))[0] == number, deadline)
        return failure or self._posts[peer][1]

    def await_finish(self, peer: int, number: int, deadline: float) -> PeerFailure | None:
        """Return when a peer has finished."""
        return self._await(peer, lambda: self._finished.get(peer, 0) >= number, deadline)

    def _await(self, peer: int, holds: Callable[[], bool], deadline: float) -> PeerFailure | None:
        with self._changed:
            self._changed.wait_for(
                lambda: holds() or peer in self._gone, max(0.0, deadline - time.monotonic())
            )
            if holds():
                return None
            late = peer not in self._gone
        return PeerFailure(late=late, error=RuntimeError("timed out" if late else "left"))


class MemoryEplbCommunicator(QueuedCommunicator[Queued]):
    """Copies straight from the sender's tensors to the receiver's.

    Args:
        fabric: shared with the other ranks.
        rank: this rank.
        expert_weights: as for the base.
        timeout_s: as for the base.
    """

    name: ClassVar[str] = "memory"
    needs_profile_buffer_reservation = False

    def __init__(
        self, fabric: MemoryFabric, rank: int, expert_weights: ExpertWeights, timeout_s: float
    ) -> None:
        super().__init__(rank, fabric.size, expert_weights, timeout_s)
        self._fabric = fabric

    def _begin(self, number: int, outbox: Outbox, inbox: Inbox) -> Queued:
        return Queued(number, outbox, inbox)

    def _end(self, flight: Queued) -> None:
        number, outbox, inbox = flight
        mine = self._announce(number, outbox, inbox)
        self._fabric.post(self.rank, number, _Post(mine, outbox))
        deadline = deadline_in(self.timeout_s)
        failures: dict[int, PeerFailure] = {}
        refusals: dict[int, str] = {}
        try:
            for peer in self._peers:
                post = self._fabric.await_post(peer, number, deadline)
                if isinstance(post, PeerFailure):
                    failures[peer] = post
                    continue
                mismatch = find_mismatch(self.rank, mine[peer], peer, post.announcements[self.rank])
                if mismatch is not None:
                    refusals[peer] = mismatch
                else:
                    _copy(post.outbox.get(self.rank, []), inbox.get(peer, []))
        finally:
            self._fabric.finish(self.rank, number)
        if any(failure.late for failure in failures.values()):
            self._raise({}, failures, self.timeout_s)
        for peer in self._peers:
            failure = self._fabric.await_finish(peer, number, deadline)
            if failure is not None:
                failures.setdefault(peer, failure)
        if failures or refusals:
            self._raise(refusals, failures, self.timeout_s)

    def _release(self) -> None:
        """Nothing is held."""


def _copy(queued: list[Outgoing], landings: list[Landing]) -> None:
    parts = [part for each in queued for part in each.split()]
    wire = torch.empty(sum(part.num_bytes for part in parts), dtype=torch.uint8)
    for part, piece in zip(parts, wire.split_with_sizes([p.num_bytes for p in parts]), strict=True):
        part.pack(piece)
    arrived = wire.split_with_sizes([landing.data.numel() for landing in landings])
    for landing, piece in zip(landings, arrived, strict=True):
        landing.data.copy_(piece)
