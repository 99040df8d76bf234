"""What both wires over NCCL share: packing, rounds, and a deadline on work that a GPU does."""

from __future__ import annotations

import contextlib
import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equipoise.comm.base import ExpertWeights, GroupCoordinator
from equipoise.comm.deadline import call_in_time
from equipoise.comm.exchange import Exchange, PeerFailure, deadline_in
from equipoise.comm.groups import find_device
from equipoise.comm.headers import Headers, Heard
from equipoise.comm.lifeline import Lifeline
from equipoise.comm.parcels import Inbox, Landing, Outbox, Outgoing, find_sources
from equipoise.comm.queued import SLOWEST_BYTES_PER_S, QueuedCommunicator
from equipoise.comm.span_copies import SpanCopies, shift
from equipoise.comm.spans import Spans, align, span_of
from equipoise.errors import CommunicatorUnavailable, TransferError

logger = logging.getLogger(__name__)

_TAG_DONE = 8
_POOL_BYTES = 1 << 30
# Of packing, in what the wire takes: so that a message is packed before the one before it is out.
_PACK_PACE = 1.0
_ALIGNMENT = 256
_PAUSE_S = 20e-6
_LEAST_SET_UP_S = 30.0
"""NCCL takes seconds where many processes begin at once, however soon a peer shall be given up."""
_MOST_ABORT_S = 1.0


@dataclass(frozen=True)
class Message:
    """One piece of what a pair of ranks exchanges in a round.

    Attributes:
        peer: the other.
        data: [bytes] uint8, contiguous.
    """

    peer: int
    data: Tensor


@dataclass(frozen=True)
class _Flight:
    """An exchange that was enqueued.

    Attributes:
        heard: what peers said of it.
        ended: recorded behind it.
        kept: what it uses.
    """

    heard: Heard
    ended: torch.cuda.Event
    kept: object


class NcclStagedCommunicator(QueuedCommunicator[_Flight]):
    """Packs what each peer gets, piece by piece, and sends one piece while it packs the next.

    What comes from a peer lands where it belongs, if a piece belongs to one place; thousands of
    small tensors go through a pool. Counts and sizes are compared over gloo before the first
    message, since NCCL would not notice a mismatch. A peer on this host that dies is noticed at
    once, when NCCL would wait; one that hangs, at the deadline. All memory is taken, and all
    connections are made, when the communicator is.

    Args:
        coordinator: its `cpu_group` carries headers.
        expert_weights: as for the base; on a CUDA device, also where they are none.
        timeout_s: as for the base.
        pool_bytes: of the buffers that are packed into, of all peers together; the same on every
            rank, since both sides of a pair cut their messages by it.
    """

    needs_profile_buffer_reservation = False
    num_ahead = 1

    def __init__(
        self,
        coordinator: GroupCoordinator,
        expert_weights: ExpertWeights,
        timeout_s: float,
        *,
        pool_bytes: int = _POOL_BYTES,
    ) -> None:
        self._group = coordinator.cpu_group
        super().__init__(self._group.rank(), self._group.size(), expert_weights, timeout_s)
        self._device = find_device(coordinator, expert_weights)
        if self._device.type != "cuda":
            raise CommunicatorUnavailable(f"{self.name} moves weights on CUDA, not on the CPU")
        self.device = self._device
        # Before whatever fills slots meanwhile.
        self._packing, self._wire = (
            torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        num_peers = max(1, self.size - 1)
        piece_bytes = pool_bytes // (2 * num_peers) // _ALIGNMENT * _ALIGNMENT
        self._piece_bytes = max(piece_bytes, _ALIGNMENT)
        shape = (2, num_peers, self._piece_bytes)
        self._send_pool = torch.empty(shape, dtype=torch.uint8, device=self.device)
        self._recv_pool: Tensor | None = None
        # Rounds of all exchanges take turns in the halves of the pools.
        self._num_rounds = 0
        self._freed: list[torch.cuda.Event | None] = [None, None]
        self._lifeline = Lifeline(self._group, timeout_s)

    def _connect(self) -> None:
        """Send every peer a byte, so that NCCL makes its connections and takes its memory."""
        peers = self._peers
        self._num_exchanges += 1

        # Not made in there: they must live until it is over.
        sent = torch.zeros(1, dtype=torch.uint8, device=self.device)
        landed = torch.zeros(self.size, dtype=torch.uint8, device=self.device)
        self._wire.wait_stream(torch.cuda.current_stream(self.device))

        def greet() -> None:
            with torch.cuda.device(self.device), torch.cuda.stream(self._wire):
                self._post(
                    [Message(peer, sent) for peer in peers],
                    [Message(peer, landed[peer : peer + 1]) for peer in peers],
                )

        try:
            # Here NCCL waits for the other ranks without a deadline.
            call_in_time(greet, self._set_up_s)
            ended = self._wire.record_event()
        except Exception as error:
            self.close()
            raise self._explain_set_up(error) from error
        failures = self._await(ended, peers, self._set_up_s)
        if failures:
            self.close()
            self._raise({}, failures, self.timeout_s)

    @property
    def _set_up_s(self) -> float:
        return max(self.timeout_s, _LEAST_SET_UP_S)

    @property
    def _abort_s(self) -> float:
        """Well below what others wait for this rank."""
        return min(_MOST_ABORT_S, self.timeout_s / 4)

    def _explain_set_up(self, cause: Exception) -> TransferError:
        return TransferError(
            f"rank {self.rank}, {self.name}: NCCL could not be set up: {cause}", rank=self.rank
        )

    @abstractmethod
    def _post(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Enqueue messages, as one group, on the current stream."""

    @abstractmethod
    def _take_abort(self) -> Callable[[], None] | None:
        """What ends all that was enqueued, for whoever takes it; None where there is nothing."""

    def _abort(self) -> None:
        """End what was enqueued and will never come to its end.

        NCCL ends its kernels at once. Then it may wait, without a deadline, for peers on this host
        to let go of its memory, which for one that hangs it does on a thread of its own.
        """
        abort = self._take_abort()
        if abort is None:
            return
        try:
            call_in_time(abort, self._abort_s)
        except Exception as error:
            logger.info("rank %d, %s: NCCL has not let go yet: %s", self.rank, self.name, error)

    @abstractmethod
    def _disconnect(self) -> None:
        """Let NCCL go, without waiting for a peer; once or more."""

    def _begin(self, number: int, outbox: Outbox, inbox: Inbox) -> _Flight:
        with torch.cuda.device(self.device):
            headers = Headers(self._group, self.rank, self._announce(number, outbox, inbox))
            try:
                packs = self._pack_first(outbox)
            except BaseException:
                headers.abandon()
                raise
            heard = headers.hear(self.timeout_s)
            if heard.is_late:
                self._raise({}, heard.failures, self.timeout_s)
            self._carry(heard.sound, packs, inbox)
            return _Flight(heard, self._wire.record_event(), packs)

    def _end(self, flight: _Flight) -> None:
        heard = flight.heard
        seconds = self.timeout_s + heard.most_bytes / SLOWEST_BYTES_PER_S
        failures = {**heard.failures, **self._await(flight.ended, heard.sound, seconds)}
        if failures or heard.refusals:
            self._raise(heard.refusals, failures, seconds)

    def _pack_first(self, outbox: Outbox) -> _Packs:
        """Make ready what packs, and pack the first round, before peers have said a word."""
        sends = _Parcels.of(outbox, self._piece_bytes, self.device)
        ready = self._current_stream().record_event()
        self._packing.wait_event(ready)
        self._wire.wait_event(ready)
        with torch.cuda.stream(self._packing):
            packs = _Packs(sends, sends.prepare(self._send_pool, self._num_rounds))
        if sends.num_rounds:
            self._pack(packs, 0)
        return packs

    def _pack(self, packs: _Packs, number: int) -> None:
        """Enqueue what packs a round, the next of all rounds."""
        event = self._freed[self._num_rounds % 2]
        with torch.cuda.stream(self._packing):
            if event is not None:
                self._packing.wait_event(event)
            is_first = not self._under_way and number == 0
            packs.copies.run(number, gently=0.0 if is_first else _PACK_PACE)
            packs.packed = self._packing.record_event()

    def _carry(self, peers: list[int], packs: _Packs, inbox: Inbox) -> None:
        """Enqueue everything; round k carries piece k of each pair, so no round waits for another.

        Nothing here waits for the device.
        """
        sends = packs.sends
        receives = {
            peer: list(_find_targets(inbox[peer], self._piece_bytes))
            for peer in peers
            if peer in inbox
        }
        rounds = [sends.num_rounds, *map(len, receives.values())]
        for number in range(max(rounds)):
            half = self._num_rounds % 2
            if 0 < number < sends.num_rounds:
                self._pack(packs, number)
            with torch.cuda.stream(self._wire):
                if packs.packed is not None:
                    self._wire.wait_event(packs.packed)
                outgoing = [
                    Message(peer, self._send_pool[half, index, :num_bytes])
                    for index, (peer, num_bytes) in enumerate(sends.measure(number))
                    if num_bytes and peer in peers
                ]
                incoming, scatters = self._lay_out(receives, number, half)
                self._post(outgoing, incoming)
                for scatter in scatters:
                    scatter.run()
                self._freed[half] = self._wire.record_event()
            self._num_rounds += 1

    def _lay_out(
        self, receives: Mapping[int, list[list[Tensor]]], number: int, half: int
    ) -> tuple[list[Message], list[SpanCopies]]:
        """Where a round's pieces are received, and what takes them on from the pool."""
        messages, scatters = [], []
        for index, (peer, pieces) in enumerate(receives.items()):
            if number >= len(pieces):
                continue
            parts = pieces[number]
            if len(parts) == 1:
                messages.append(Message(peer, parts[0]))
                continue
            if self._recv_pool is None:
                self._recv_pool = torch.empty_like(self._send_pool)
            targets = Spans.of(map(span_of, parts))
            room = self._recv_pool[half, index, : targets.total_bytes]
            messages.append(Message(peer, room))
            packed = shift(targets, room.data_ptr())
            scatters.append(SpanCopies(packed, targets, self.device, parts))
        return messages, scatters

    def _await(
        self, ended: torch.cuda.Event, peers: list[int], seconds: float
    ) -> dict[int, PeerFailure]:
        """Wait on the host for what was enqueued by then, and for the peers to have done so too.

        Returns:
            What went wrong, by peer; then nothing that was enqueued is under way any more.
        """
        deadline = deadline_in(seconds)
        while not ended.query():  # type: ignore[no-untyped-call]
            dead = self._lifeline.find_dead()
            if dead or time.monotonic() > deadline or self._interrupted.is_set():
                self._abort()
                self._await_end()
                self._refuse_if_interrupted()
                return _blame(dead, peers)
            time.sleep(_PAUSE_S)
        # A peer may still be reading what NCCL holds here.
        done = Exchange(self._group, _TAG_DONE)
        word = torch.zeros(1, dtype=torch.uint8)
        for peer in peers:
            done.recv(torch.zeros(1, dtype=torch.uint8), peer)
        for peer in peers:
            done.send(word, peer)
        return dict(done.wait(deadline_in(seconds)))

    def _cut_short(self) -> None:
        # A kernel that waits for a peer would wait for good, and with it whoever uses the device.
        if not self._await_end():
            self._abort()
            self._await_end()

    def _await_end(self) -> bool:
        """Whether all that was enqueued ends soon; kernels that were told to need a moment."""
        deadline = deadline_in(self._abort_s)
        # A device that is lost says so to whoever uses it next.
        with contextlib.suppress(RuntimeError):
            while not self._wire.query():
                if time.monotonic() > deadline:
                    return False
                time.sleep(_PAUSE_S)
        return True

    def _release(self) -> None:
        self._lifeline.close()
        self._cut_short()
        self._disconnect()
        for pool in (self._send_pool, self._recv_pool):
            if pool is not None and pool.is_cuda:
                # After a failure something may still be packed.
                pool.record_stream(self._packing)
                pool.record_stream(self._wire)
        self._recv_pool = None
        self._send_pool = torch.empty(0, dtype=torch.uint8)


def _blame(dead: list[int], peers: list[int]) -> dict[int, PeerFailure]:
    if dead:
        gone = RuntimeError("the process has ended")
        return {peer: PeerFailure(late=False, error=gone) for peer in dead}
    late = TimeoutError("NCCL has not ended")
    return {peer: PeerFailure(late=True, error=late) for peer in peers}


@dataclass(frozen=True)
class _Parcels:
    """All that goes out in an exchange.

    Attributes:
        spans: what each peer gets, by rank; cut where rounds end.
        piece_bytes: what a peer gets in a round.
        device: of all of it.
        keep: what owns the memory.
    """

    spans: Mapping[int, Spans]
    piece_bytes: int
    device: torch.device
    keep: object

    @classmethod
    def of(
        cls, outbox: Mapping[int, list[Outgoing]], piece_bytes: int, device: torch.device
    ) -> _Parcels:
        # Strided tensors are made contiguous; the copies live as long as this.
        kept: list[Tensor] = []
        spans = {}
        for peer, queued in outbox.items():
            whole, copies = find_sources(queued)
            kept += copies
            edges = np.arange(0, whole.total_bytes, piece_bytes, dtype=np.int64)
            rounds = Spans(edges, np.diff(edges, append=whole.total_bytes))
            spans[peer] = align(whole, rounds)[0] if len(edges) else whole
        return cls(spans, piece_bytes, device, kept)

    @property
    def num_rounds(self) -> int:
        """How many it takes."""
        totals = [spans.total_bytes for spans in self.spans.values()]
        return -(-max(totals, default=0) // self.piece_bytes)

    def measure(self, number: int) -> list[tuple[int, int]]:
        """Each peer, and the bytes that it gets in a round."""
        start = number * self.piece_bytes
        return [
            (peer, max(0, min(self.piece_bytes, spans.total_bytes - start)))
            for peer, spans in self.spans.items()
        ]

    def prepare(self, pool: Tensor, first_round: int) -> SpanCopies:
        """What packs it, each round as a part of its own.

        Args:
            pool: [2, peers, piece bytes] uint8; rounds take turns in its halves.
            first_round: number of the first, among all rounds.
        """
        sources, targets, rounds = [], [], [np.zeros(0, dtype=np.int64)]
        for index, spans in enumerate(self.spans.values()):
            start = np.cumsum(spans.num_bytes) - spans.num_bytes
            number, offset = np.divmod(start, self.piece_bytes)
            half = (number + first_round) % 2
            room = (half * pool.shape[1] + index) * self.piece_bytes
            sources.append(spans)
            targets.append(Spans(pool.data_ptr() + room + offset, spans.num_bytes))
            rounds.append(number)
        part = np.concatenate(rounds)
        return SpanCopies(Spans.join(sources), Spans.join(targets), self.device, self.keep, part)


@dataclass
class _Packs:
    """What an exchange sends, on its way through the pool.

    Attributes:
        sends: all of it.
        copies: what packs it, each round as a part of its own.
        packed: recorded behind the round that was packed last.
    """

    sends: _Parcels
    copies: SpanCopies
    packed: torch.cuda.Event | None = None


def _find_targets(landings: Sequence[Landing], piece_bytes: int) -> Iterator[list[Tensor]]:
    """For each round the pieces of memory that a peer's bytes fill, in order."""
    pieces: list[Tensor] = []
    missing = piece_bytes
    for landing in landings:
        data = landing.data
        while data.numel():
            pieces.append(data[:missing])
            data = data[missing:]
            missing -= pieces[-1].numel()
            if not missing:
                yield pieces
                pieces, missing = [], piece_bytes
    if pieces:
        yield pieces
