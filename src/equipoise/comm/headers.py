"""What ranks tell each other over gloo before anything large travels between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from equipoise.comm.announcement import NUM_WORDS, Announcement, find_mismatch
from equipoise.comm.byte_views import view_bytes
from equipoise.comm.exchange import Exchange, PeerFailure, deadline_in

_TAG_HEADER = 2


@dataclass(frozen=True)
class Heard:
    """What came of it.

    Attributes:
        sound: peers with which all is well; they get what is theirs, whatever went wrong with
            others.
        refusals: by peer, why nothing can travel, in words for both sides.
        failures: by peer, how it was lost; mutable, for what goes wrong later.
        most_bytes: that any of these ranks exchanges.
    """

    sound: list[int]
    refusals: Mapping[int, str]
    failures: dict[int, PeerFailure]
    most_bytes: int

    @property
    def is_late(self) -> bool:
        """Whether a deadline has passed, so that the group's connections are closed."""
        return any(failure.late for failure in self.failures.values())


class Headers:
    """What is said to every peer, and heard from it, about the exchange that begins.

    Under way from the first moment on; what needs no peer is done meanwhile.

    Args:
        group: with a gloo backend for CPU tensors.
        rank: this rank.
        mine: what each peer is told.
    """

    def __init__(
        self, group: dist.ProcessGroup, rank: int, mine: Mapping[int, Announcement]
    ) -> None:
        self._rank, self._mine = rank, mine
        self._exchange = Exchange(group, _TAG_HEADER)
        self._words = {peer: torch.zeros(NUM_WORDS, dtype=torch.int64) for peer in mine}
        for peer in mine:
            self._exchange.recv(view_bytes(self._words[peer]), peer)
        for peer, announcement in mine.items():
            self._exchange.send(view_bytes(announcement.to_tensor()), peer)

    def abandon(self) -> None:
        """Instead of `hear`, where something else went wrong."""
        self._exchange.abandon()

    def hear(self, timeout_s: float) -> Heard:
        """Compare with every peer what both think of the exchange.

        Args:
            timeout_s: longest wait for a peer.
        Collective: every rank of the group.
        """
        mine, words = self._mine, self._words
        failures = dict(self._exchange.wait(deadline_in(timeout_s)))
        theirs = {p: Announcement.from_tensor(words[p]) for p in mine if p not in failures}
        found = {p: find_mismatch(self._rank, mine[p], p, theirs[p]) for p in theirs}
        refusals = {peer: text for peer, text in found.items() if text is not None}
        return Heard(
            [peer for peer in theirs if peer not in refusals],
            refusals,
            failures,
            max((a.total_bytes for a in (*theirs.values(), *mine.values())), default=0),
        )


def swap_headers(
    group: dist.ProcessGroup, rank: int, mine: Mapping[int, Announcement], timeout_s: float
) -> Heard:
    """Say and hear, with nothing between; arguments as for `Headers`.

    Collective: every rank of the group.
    """
    return Headers(group, rank, mine).hear(timeout_s)
