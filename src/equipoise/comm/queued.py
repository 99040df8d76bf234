"""What all wires share: the queue, and the checks of what goes into it."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from equipoise.comm.announcement import Announcement, Sizes
from equipoise.comm.base import EplbCommunicator, ExpertMoves, ExpertWeights
from equipoise.comm.byte_views import view_bytes, view_rows
from equipoise.comm.exchange import PeerFailure, explain
from equipoise.comm.weights import check_expert_weights
from equipoise.errors import TransferError
from equipoise.topology import IntArray

SLOWEST_BYTES_PER_S = 50e6
"""What a wire is trusted to carry at least; a deadline is the timeout and the bytes over this."""


@dataclass(frozen=True)
class WholeTensor:
    """A tensor to be sent as it is."""

    tensor: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire."""
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def sizes(self) -> IntArray:
        """[1] int64, bytes of each tensor or row."""
        return np.array([self.num_bytes])

    def find_in_place(self) -> list[Tensor] | None:
        """The bytes where they are, [bytes] uint8 each; None if they do not stand together."""
        return [view_bytes(self.tensor)] if self.tensor.is_contiguous() else None

    def pack(self, out: Tensor) -> None:
        """Enqueue the copy into `out` [num_bytes] uint8."""
        out.copy_(view_bytes(self.tensor.contiguous()), non_blocking=True)


@dataclass(frozen=True)
class SlotRows:
    """Rows of one weight tensor to be sent behind each other.

    Attributes:
        rows: [S, row bytes] uint8, the weights.
        slots: [n] int64, which of them; on the host, where addresses are counted.
    """

    rows: Tensor
    slots: IntArray

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire."""
        return len(self.slots) * self.rows.shape[1]

    @property
    def sizes(self) -> IntArray:
        """[n] int64, bytes of each tensor or row."""
        return np.full(len(self.slots), self.rows.shape[1])

    def find_in_place(self) -> list[Tensor] | None:
        """The bytes where they are, [row bytes] uint8 each."""
        return [self.rows[slot] for slot in self.slots.tolist()]

    def pack(self, out: Tensor) -> None:
        """Enqueue the copy into `out` [num_bytes] uint8."""
        shaped = out.view(len(self.slots), self.rows.shape[1])
        slots = torch.tensor(self.slots, device=self.rows.device)
        if out.device == self.rows.device:
            torch.index_select(self.rows, 0, slots, out=shaped)
        else:
            shaped.copy_(self.rows.index_select(0, slots), non_blocking=True)


Outgoing = WholeTensor | SlotRows


@dataclass(frozen=True)
class Landing:
    """Where bytes from one peer go.

    Attributes:
        data: [bytes] uint8, contiguous.
        sizes: [n] int64, bytes of each tensor in it, or of each row where experts move; in order.
    """

    data: Tensor
    sizes: IntArray


def join_sizes(parts: Sequence[Outgoing] | Sequence[Landing]) -> IntArray:
    """[n] int64, bytes of each tensor or row that goes one way between two ranks, in order."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *(part.sizes for part in parts)])


Outbox = Mapping[int, list[Outgoing]]
Inbox = Mapping[int, list[Landing]]


class QueuedCommunicator(EplbCommunicator):
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
        devices = [tensor.device for layer in self._rows for tensor in layer]
        self._device: torch.device | None = devices[0] if devices else None
        self._outbox: dict[int, list[Outgoing]] = {}
        self._inbox: dict[int, list[Landing]] = {}
        self._state: Literal["open", "failed", "closed"] = "open"
        self._stream: torch.cuda.Stream | None = None
        self._num_exchanges = 0

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
        if not self._rows:
            raise TransferError(
                f"rank {self.rank}: add_moves needs the expert weights that the communicator "
                "was created with, and it was created with none",
                rank=self.rank,
            )
        self._check_device(moves.into)
        self._check_moves(moves)
        incoming = list(self._find_landings(moves))
        for peer, layer, span in _split(moves.send_rank, moves.send_layer):
            for rows in self._rows[layer]:
                self._outbox.setdefault(peer, []).append(SlotRows(rows, moves.send_slot[span]))
        for peer, landing in incoming:
            self._inbox.setdefault(peer, []).append(landing)

    def execute(self) -> None:  # noqa: D102 - see the base
        self._refuse_unless_open()
        outbox, inbox = self._outbox, self._inbox
        self._outbox, self._inbox = {}, {}
        self._num_exchanges += 1
        try:
            self._exchange(outbox, inbox)
        except BaseException:
            self._state = "failed"
            raise

    def set_stream(self, stream: torch.cuda.Stream | None) -> None:  # noqa: D102 - see the base
        self._stream = stream

    def close(self) -> None:  # noqa: D102 - see the base
        self._state = "closed"
        self._outbox, self._inbox, self._rows = {}, {}, []
        self._release()

    @abstractmethod
    def _exchange(self, outbox: Outbox, inbox: Inbox) -> None:
        """Do what `execute` promises with what was queued."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of what the wire holds; called once or more."""

    @property
    def _peers(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.rank]

    def _announce(self, outbox: Outbox, inbox: Inbox) -> dict[int, Announcement]:
        """What to tell each peer about the exchange that begins."""
        sends = {p: Sizes.of(join_sizes(outbox.get(p, []))) for p in self._peers}
        expects = {p: Sizes.of(join_sizes(inbox.get(p, []))) for p in self._peers}
        total = sum(sizes.num_bytes for sizes in (*sends.values(), *expects.values()))
        return {
            p: Announcement(self._num_exchanges, sends[p], expects[p], total) for p in self._peers
        }

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

    def _find_landings(self, moves: ExpertMoves) -> Iterator[tuple[int, Landing]]:
        offset = 0
        sizes: dict[int, list[IntArray]] = {}
        for peer, layer, span in _split(moves.recv_rank, moves.recv_layer):
            num_rows = span.stop - span.start
            rows = [np.full(num_rows, tensor.shape[1]) for tensor in self._rows[layer]]
            sizes.setdefault(peer, []).extend(rows)
        by_peer = {peer: np.concatenate(rows) for peer, rows in sizes.items()}
        needed = sum(int(each.sum()) for each in by_peer.values())
        into = moves.into
        if into.dtype != torch.uint8 or not into.is_contiguous() or into.numel() < needed:
            raise ValueError(
                f"the experts to be received need a contiguous uint8 tensor of {needed} bytes, "
                f"got {into.numel()} elements of {into.dtype}"
            )
        for peer, each in by_peer.items():
            num_bytes = int(each.sum())
            yield peer, Landing(view_bytes(into)[offset : offset + num_bytes], each)
            offset += num_bytes

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

    def _check_moves(self, moves: ExpertMoves) -> None:
        for peer in np.unique(np.concatenate((moves.send_rank, moves.recv_rank))):
            self._check_peer(int(peer), "exchange experts with")
        for ranks, layers in (
            (moves.send_rank, moves.send_layer),
            (moves.recv_rank, moves.recv_layer),
        ):
            outside = layers[(layers < 0) | (layers >= len(self._rows))]
            if outside.size:
                raise ValueError(f"there are {len(self._rows)} layers, no layer {outside[0]}")
            if (np.diff(ranks * len(self._rows) + layers) < 0).any():
                raise ValueError("moves must be in order of ranks, and of layers within a rank")
        num_slots = np.array([layer[0].shape[0] for layer in self._rows])[moves.send_layer]
        outside = moves.send_slot[(moves.send_slot < 0) | (moves.send_slot >= num_slots)]
        if outside.size:
            raise ValueError(f"there is no local slot {outside[0]} to send from")

    def _check_device(self, tensor: Tensor) -> None:
        if self._device is None:
            self._device = tensor.device
        if tensor.device != self._device:
            raise ValueError(
                f"this communicator works on {self._device}, got a tensor on {tensor.device}: "
                "one communicator serves one device"
            )


def _split(ranks: IntArray, layers: IntArray) -> Iterator[tuple[int, int, slice]]:
    """Runs of equal rank and layer: rank, layer, where."""
    if not len(ranks):
        return
    changes = np.flatnonzero((np.diff(ranks) != 0) | (np.diff(layers) != 0)) + 1
    edges = [0, *changes.tolist(), len(ranks)]
    for start, stop in itertools.pairwise(edges):
        yield int(ranks[start]), int(layers[start]), slice(start, stop)
