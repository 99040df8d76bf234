"""What all wires share: the queue, and the checks of what goes into it."""

from __future__ import annotations

import contextlib
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Generic, Literal, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from equipoise.comm.announcement import NOTHING, Announcement, Sizes
from equipoise.comm.base import EplbCommunicator, ExpertMoves, ExpertWeights, MayLand
from equipoise.comm.byte_views import view_bytes, view_rows
from equipoise.comm.exchange import PeerFailure, explain
from equipoise.comm.move_lists import MoveEnds, MoveList, join_ends, list_moves
from equipoise.comm.parcels import (
    Inbox,
    Landing,
    Outbox,
    Outgoing,
    WholeTensor,
    join_sizes,
)
from equipoise.comm.span_copies import warm_up
from equipoise.comm.weight_table import WeightTable
from equipoise.comm.weights import check_expert_weights
from equipoise.errors import TransferError

SLOWEST_BYTES_PER_S = 50e6
"""What a wire is trusted to carry at least; a deadline is the timeout and the bytes over this."""


class Queued(NamedTuple):
    """An exchange of a wire that does nothing before its end.

    Attributes:
        number: of the exchange, from 1.
        outbox: what each peer gets.
        inbox: where what comes from each goes.
    """

    number: int
    outbox: Outbox
    inbox: Inbox


FlightT = TypeVar("FlightT")
"""What a wire keeps of an exchange between its start and its end."""


class QueuedCommunicator(EplbCommunicator, Generic[FlightT]):
    """A communicator that checks and queues, and leaves the exchange itself to its wire.

    Args:
        rank: this rank.
        size: R, ranks of the group.
        expert_weights: what `add_moves` sends from; may be empty.
        timeout_s: longest wait for a peer, to which the time for the bytes is added.
    Raises: PlacementError if the weights cannot be moved slot by slot.
    """

    def __init__(
        self, rank: int, size: int, expert_weights: ExpertWeights, timeout_s: float
    ) -> None:
        check_expert_weights(expert_weights)
        self.rank = rank
        self.size = size
        self.timeout_s = timeout_s
        self._rows = [[view_rows(tensor) for tensor in layer] for layer in expert_weights]
        self.table: WeightTable | None = WeightTable(self._rows)
        devices = [tensor.device for layer in self._rows for tensor in layer]
        self._device: torch.device | None = devices[0] if devices else None
        self._outbox: dict[int, list[Outgoing]] = {}
        self._inbox: dict[int, list[Landing]] = {}
        self._foreseen: dict[int, tuple[ExpertMoves, MoveList]] = {}
        self._state: Literal["open", "failed", "closed"] = "open"
        self._stream: torch.cuda.Stream | None = None
        if self._is_cuda:
            warm_up(self._device)
        self._num_exchanges = 0
        # Of the exchange that begins.
        self._may_land: MayLand | None = None
        # Of the exchange that ends.
        self._may_be_read = False
        self._under_way: deque[FlightT] = deque()
        # Set by another thread, looked at by the one that waits for peers; once and for all.
        self._interrupted = threading.Event()

    def add_send(self, tensor: Tensor, dst_rank: int) -> None:  # noqa: D102 - see the base
        self._refuse_unless_open()
        self._check_peer(dst_rank, "send to")
        self._check_device(tensor)
        self._outbox.setdefault(dst_rank, []).append(WholeTensor(tensor))

    def add_recv(self, tensor: Tensor, src_rank: int) -> None:  # noqa: D102 - see the base
        self._refuse_unless_open()
        self._check_peer(src_rank, "receive from")
        self._check_device(tensor)
        if not tensor.is_contiguous():
            raise ValueError(
                f"a receive needs a contiguous tensor, got shape {list(tensor.shape)} "
                f"with strides {list(tensor.stride())}"
            )
        data = view_bytes(tensor)
        self._inbox.setdefault(src_rank, []).append(Landing(data, np.array([data.numel()])))

    def add_moves(self, moves: ExpertMoves) -> None:  # noqa: D102 - see the base
        self._refuse_unless_open()
        if id(moves) not in self._foreseen:
            self.foresee([moves])
        _, listed = self._foreseen.pop(id(moves))
        for peer, outgoing in listed.outgoing:
            self._outbox.setdefault(peer, []).append(outgoing)
        for peer, landing in listed.incoming:
            self._inbox.setdefault(peer, []).append(landing)

    def foresee(self, several: Sequence[ExpertMoves]) -> None:  # noqa: D102 - see the base
        self._refuse_unless_open()
        if not self._rows:
            raise TransferError(
                f"rank {self.rank}: add_moves needs the expert weights that the communicator "
                "was created with, and it was created with none",
                rank=self.rank,
            )
        for moves in several:
            self._check_device(moves.into)
            if moves.recv_slot is not None and not self.lands_in_place:
                raise ValueError(f"{self.name} brings experts to a buffer, and never to slots")
        sent, received = join_ends(several, self.size)
        self._check_ends(sent, received)
        listed = list_moves(self._open_table, several, sent, received, self.size)
        # Held as well, so that none of them gives its number to another.
        self._foreseen |= {id(each): (each, its) for each, its in zip(several, listed, strict=True)}

    def start(self, may_land: MayLand | None = None) -> None:  # noqa: D102 - see the base
        self._refuse_unless_open()
        if may_land is not None and not self.can_hold:
            raise ValueError(f"{self.name} cannot wait for what is to be filled: call it then")
        outbox, inbox = self._outbox, self._inbox
        self._outbox, self._inbox = {}, {}
        self._num_exchanges += 1
        self._may_land = may_land
        try:
            self._under_way.append(self._begin(self._num_exchanges, outbox, inbox))
        except BaseException:
            self._fail()
            raise
        finally:
            self._may_land = None

    def finish(self, *, may_be_read: bool = False) -> None:  # noqa: D102 - see the base
        self._refuse_unless_open()
        if not self._under_way:
            raise TransferError(f"rank {self.rank}: no exchange was started", rank=self.rank)
        self._may_be_read = may_be_read
        try:
            self._end(self._under_way.popleft())
        except BaseException:
            self._fail()
            raise

    def interrupt(self) -> None:  # noqa: D102 - see the base
        self._interrupted.set()

    def set_stream(self, stream: torch.cuda.Stream | None) -> None:  # noqa: D102 - see the base
        self._stream = stream

    def close(self) -> None:  # noqa: D102 - see the base
        self._state = "closed"
        self._outbox, self._inbox, self._rows, self._foreseen = {}, {}, [], {}
        self._under_way.clear()
        self.table = None
        self._release()

    @abstractmethod
    def _begin(self, number: int, outbox: Outbox, inbox: Inbox) -> FlightT:
        """Do what `start` promises with what was queued, and return what `_end` needs."""

    @abstractmethod
    def _end(self, flight: FlightT) -> None:
        """Do what `finish` promises."""

    def _fail(self) -> None:
        self._state = "failed"
        self._cut_short()

    def _cut_short(self) -> None:
        """After a failure: end what is under way still, and may never come to its end."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of what the wire holds; called once or more."""

    @property
    def _is_cuda(self) -> bool:
        return self._device is not None and self._device.type == "cuda"

    @property
    def _open_table(self) -> WeightTable:
        assert self.table is not None, "closed communicators are refused before"
        return self.table

    def _current_stream(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream(self._device)

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        if self._device is None or self._device.type != "cuda":
            return contextlib.nullcontext()
        # To enter a stream, and with it its device, costs as much as a launch.
        if self._stream is None and torch.cuda.current_device() == self._device.index:
            return contextlib.nullcontext()
        return torch.cuda.stream(self._current_stream())

    def _refuse_if_interrupted(self) -> None:
        if self._interrupted.is_set():
            raise TransferError(
                f"rank {self.rank}, {self.name}: the exchange was given up", rank=self.rank
            )

    @property
    def _peers(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.rank]

    def _announce(self, number: int, outbox: Outbox, inbox: Inbox) -> dict[int, Announcement]:
        """What to tell each peer about an exchange."""
        sends = {p: _size_up(outbox.get(p)) for p in self._peers}
        expects = {p: _size_up(inbox.get(p)) for p in self._peers}
        total = sum(sizes.num_bytes for sizes in (*sends.values(), *expects.values()))
        return {p: Announcement(number, sends[p], expects[p], total) for p in self._peers}

    def _raise(
        self, refusals: Mapping[int, str], failures: Mapping[int, PeerFailure], seconds: float
    ) -> NoReturn:
        """Raise what went wrong; at least one of the two is not empty."""
        peers, parts, cause = list(refusals), list(refusals.values()), None
        if failures:
            what, peer, cause = explain(failures, seconds)
            peers.append(peer)
            parts.append(what)
        raise TransferError(
            f"rank {self.rank}, {self.name}: {'; '.join(parts)}", rank=self.rank, peer=peers[0]
        ) from cause

    def _refuse_unless_open(self) -> None:
        if self._state != "open":
            reason = "has failed and can only be closed" if self._state == "failed" else "is closed"
            raise TransferError(
                f"rank {self.rank}: this {self.name} communicator {reason}; build a new one",
                rank=self.rank,
            )

    def _check_peer(self, peer: int, what: str) -> None:
        if peer == self.rank:
            raise ValueError(f"rank {self.rank} cannot {what} itself: copy on the rank instead")
        if not 0 <= peer < self.size:
            raise ValueError(
                f"rank {self.rank} cannot {what} rank {peer}: ranks are 0 to {self.size - 1}"
            )

    def _check_ends(self, sent: MoveEnds, received: MoveEnds) -> None:
        for ends in (sent, received):
            ranks = ends.rank
            strange = (ranks == self.rank) | (ranks < 0) | (ranks >= self.size)
            if strange.any():
                self._check_peer(int(ranks[strange][0]), "exchange experts with")
            outside = ends.layer[(ends.layer < 0) | (ends.layer >= len(self._rows))]
            if outside.size:
                raise ValueError(f"there are {len(self._rows)} layers, no layer {outside[0]}")
            if not ends.is_in_order(len(self._rows)):
                raise ValueError("moves must be in order of ranks, and of layers within a rank")
        num_slots = self._open_table.num_slots
        outside = sent.slot[(sent.slot < 0) | (sent.slot >= num_slots[sent.layer])]
        if outside.size:
            raise ValueError(f"there is no local slot {outside[0]} to send from")
        outside = received.slot[received.slot >= num_slots[received.layer]]
        if outside.size:
            raise ValueError(f"there is no local slot {outside[0]} to land in")

    def _check_device(self, tensor: Tensor) -> None:
        if self._device is None:
            self._device = tensor.device
        if tensor.device != self._device:
            raise ValueError(
                f"this communicator works on {self._device}, got a tensor on {tensor.device}: "
                "one communicator serves one device"
            )


def _size_up(parts: Sequence[Outgoing] | Sequence[Landing] | None) -> Sizes:
    return Sizes.of(join_sizes(parts)) if parts else NOTHING
