"""Messages between two ranks, posted together and waited for with one deadline."""

from __future__ import annotations

import ctypes
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class PeerFailure:
    """Why a message of a peer did not come, or was not taken.

    Attributes:
        late: the deadline passed; otherwise the connection was closed.
        error: what the wire said.
    """

    late: bool
    error: Exception


@dataclass(frozen=True)
class _Message:
    peer: int
    incoming: bool
    work: dist.Work
    tensor: Tensor
    on_received: Callable[[], None] | None


class Exchange:
    """Sends and receives of one rank over a gloo group that are under way together.

    Each peer's messages are waited for on its own connection, so that a failure names the peer.
    A deadline that passes closes all connections of the group: gloo has no smaller way out.

    Args:
        group: with a gloo backend for CPU tensors.
        tag: keeps this exchange's messages apart from others of the same pair.
        num_lanes: tags from `tag` on that the messages of a pair, each way, take in turns; a group
            that has as many connections to a peer carries them side by side.
    """

    def __init__(self, group: dist.ProcessGroup, tag: int, *, num_lanes: int = 1) -> None:
        self._group = group
        self._tag = tag
        self._num_lanes = num_lanes
        self._num_posted: Counter[tuple[int, bool]] = Counter()
        self._messages: list[_Message] = []
        self.failures: dict[int, PeerFailure] = {}

    def send(self, tensor: Tensor, peer: int) -> None:
        """Post a contiguous CPU tensor; it must not change until `wait` has returned."""
        self._post(tensor, peer, None, incoming=False)

    def recv(
        self, tensor: Tensor, peer: int, on_received: Callable[[], None] | None = None
    ) -> None:
        """Post a contiguous CPU tensor to be filled.

        Args:
            tensor: what the next message of the peer fills.
            peer: whose.
            on_received: called by `wait` when it has arrived, while others travel.
        """
        self._post(tensor, peer, on_received, incoming=True)

    def _post(
        self,
        tensor: Tensor,
        peer: int,
        on_received: Callable[[], None] | None,
        *,
        incoming: bool,
    ) -> None:
        post = self._group.recv if incoming else self._group.send
        tag = self._tag + self._num_posted[peer, incoming] % self._num_lanes
        self._num_posted[peer, incoming] += 1
        try:
            work = post([tensor], peer, tag)
        except RuntimeError as error:
            self.failures.setdefault(peer, _blame(error, late=False))
            return
        self._messages.append(_Message(peer, incoming, work, tensor, on_received))

    def abandon(self) -> None:
        """Keep what was posted alive until the process ends, instead of waiting for it."""
        _leak(self._messages)

    def wait(self, deadline: float) -> Mapping[int, PeerFailure]:
        """Wait for everything that was posted, also when some of it fails; the last call.

        Args:
            deadline: of all of it, on the clock of time.monotonic.
        Returns:
            What went wrong, by peer, in the order in which it was noticed; empty if nothing.
        Collective: the peers post the other side of each message.
        """
        pending = sorted(self._messages, key=lambda message: not message.incoming)
        self._messages = []
        try:
            while pending:
                message = pending[0]
                failure = _await(message.work, deadline)
                if failure is not None:
                    self.failures.setdefault(message.peer, failure)
                    if failure.late:
                        _leak(message)
                elif message.on_received is not None:
                    message.on_received()
                pending.pop(0)
        finally:
            # Not empty only where the caller was interrupted.
            _leak(pending)
            # Whoever keeps an error keeps this exchange, and not the connections.
            del self._group
        return self.failures


def deadline_in(seconds: float) -> float:
    """A deadline so many seconds from now, on the clock of time.monotonic."""
    return time.monotonic() + seconds


def explain(failures: Mapping[int, PeerFailure], seconds: float) -> tuple[str, int, Exception]:
    """Say which peers failed, and how.

    Args:
        failures: by peer, not empty.
        seconds: how long the deadline was.
    Returns:
        the sentence's second half, the peer to blame, what the wire said of it. A peer that let
        the deadline pass is blamed before one that closed its connection, which may have given
        up for the same reason.
    """
    late = sorted(peer for peer, failure in failures.items() if failure.late)
    closed = sorted(peer for peer, failure in failures.items() if not failure.late)
    parts = []
    if late:
        parts.append(f"{name_ranks(late)} did not answer within {seconds:.1f} s")
    if closed:
        parts.append(f"{name_ranks(closed)} closed the connection (died, or gave up first)")
    peer = (late or closed)[0]
    return "; ".join(parts), peer, failures[peer].error


def name_ranks(ranks: list[int]) -> str:
    """`rank 2` or `ranks 2, 5`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _await(work: dist.Work, deadline: float) -> PeerFailure | None:
    # Whole milliseconds, as gloo counts them; a timeout of zero would mean the group's own.
    left_ms = max(math.ceil((deadline - time.monotonic()) * 1000), 1)
    try:
        work.wait(timedelta(milliseconds=left_ms))
    except RuntimeError as error:
        # A connection that the peer closed says so, also when it is looked at past the deadline.
        late = time.monotonic() >= deadline and "by peer" not in str(error)
        return _blame(error, late=late)
    return None


def _blame(error: RuntimeError, *, late: bool) -> PeerFailure:
    # Its frames would keep the connections open for as long as somebody keeps the error.
    return PeerFailure(late=late, error=error.with_traceback(None))


def _leak(abandoned: object) -> None:
    """Keep a message that was given up alive until the process ends.

    The wire may still write to its memory, which must therefore never be used for anything else.
    """
    if abandoned != []:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(abandoned))
