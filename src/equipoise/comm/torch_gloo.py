"""Experts over gloo: few large messages, staged through pinned memory where weights are on CUDA."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.comm.base import ExpertWeights, GroupCoordinator
from equipoise.comm.exchange import Exchange
from equipoise.comm.headers import swap_headers
from equipoise.comm.parcels import Inbox, Landing, Outbox, Outgoing, Part, find_sources, join_sizes
from equipoise.comm.process_groups import NUM_LANES
from equipoise.comm.queued import SLOWEST_BYTES_PER_S, Queued, QueuedCommunicator
from equipoise.comm.span_copies import SpanCopies, shift
from equipoise.topology import IntArray

_TAG_PAYLOAD = 32

_LARGE_BYTES = 1 << 20
"""From here on a tensor, or an expert's row of one, is a message of its own: what a message costs
is less than what a copy of it does."""
_MESSAGE_BYTES = 4 << 20
"""About where messages of smaller ones are cut, so that one is packed while another travels."""
_STAGED_BYTES = 32 << 20
"""About where messages are cut where all go through buffers anyhow."""


def cut_messages(sizes: IntArray, *, are_staged: bool = False) -> list[tuple[int, int]]:
    """Where the messages of a pair of ranks start and stop; the same on both sides.

    Args:
        sizes: [n] int64, bytes of each tensor or row, in order.
        are_staged: whether all of them go through buffers.
    Returns:
        Start and stop of each message in the bytes of all of them; none is empty.
    Collective: none.
    """
    stops = np.cumsum(sizes)
    starts = stops - sizes
    is_large = (sizes >= _LARGE_BYTES) & (not are_staged)
    piece = starts // (_STAGED_BYTES if are_staged else _MESSAGE_BYTES)
    is_first = np.ones(len(sizes), dtype=bool)
    is_first[1:] = is_large[1:] | is_large[:-1] | (piece[1:] != piece[:-1])
    edges = np.unique(np.concatenate((starts[is_first], stops[-1:])))
    return list(itertools.pairwise(edges.tolist()))


class TorchDistGlooStagedEplbCommunicator(QueuedCommunicator[Queued]):
    """One small header to each peer, then few messages.

    All messages are under way together. Headers carry counts and sizes, so that a mismatch is an
    error on both sides before any payload. On the CPU, large tensors and experts are sent from
    where they are, and what a message brings to one place is received there; all else goes through
    two buffers, for sending and receiving, that grow by need and stay. With weights on CUDA all of
    it does, and the buffers are pinned. Packing and unpacking overlap with other messages.

    Args:
        coordinator: its `cpu_group` carries everything.
        expert_weights: as for the base.
        timeout_s: as for the base.
    """

    name: ClassVar[str] = "torch_gloo"

    def __init__(
        self, coordinator: GroupCoordinator, expert_weights: ExpertWeights, timeout_s: float
    ) -> None:
        group = coordinator.cpu_group
        super().__init__(group.rank(), group.size(), expert_weights, timeout_s)
        self._group: dist.ProcessGroup | None = group
        self._send_pool = torch.empty(0, dtype=torch.uint8)
        self._recv_pool = torch.empty(0, dtype=torch.uint8)

    def _begin(self, number: int, outbox: Outbox, inbox: Inbox) -> Queued:
        return Queued(number, outbox, inbox)

    def _end(self, flight: Queued) -> None:
        number, outbox, inbox = flight
        assert self._group is not None, "closed communicators are refused before"
        mine = self._announce(number, outbox, inbox)
        heard = swap_headers(self._group, self.rank, mine, self.timeout_s)
        if heard.is_late:
            self._raise({}, heard.failures, self.timeout_s)
        seconds = self.timeout_s + heard.most_bytes / SLOWEST_BYTES_PER_S
        payload = Exchange(self._group, _TAG_PAYLOAD, num_lanes=NUM_LANES)
        self._carry(payload, heard.sound, outbox, inbox, time.monotonic() + seconds)
        failures = {**heard.failures, **payload.failures}
        if failures or heard.refusals:
            self._raise(heard.refusals, failures, seconds)

    def _carry(
        self, payload: Exchange, peers: list[int], outbox: Outbox, inbox: Inbox, deadline: float
    ) -> None:
        parcels = {peer: outbox[peer] for peer in peers if peer in outbox}
        num_staged = [sum(map(self._count_staged, parts)) for parts in parcels.values()]
        pack = self._pack_from_gpu if self._is_cuda else self._pack
        self._send_pool = self._grow(self._send_pool, sum(num_staged))
        buffers = self._send_pool[: sum(num_staged)].split_with_sizes(num_staged)
        streams = [
            zip(itertools.repeat(peer), pack(parts, buffer))
            for (peer, parts), buffer in zip(parcels.items(), buffers, strict=True)
        ]
        try:
            self._post_receives(payload, {peer: inbox[peer] for peer in peers if peer in inbox})
            # In turns, so that no peer waits until another has got everything.
            for turn in itertools.zip_longest(*streams):
                for peer, message in filter(None, turn):
                    payload.send(message, peer)
        except BaseException:
            payload.abandon()
            raise
        payload.wait(deadline)
        if self._is_cuda:
            self._current_stream().synchronize()

    def _count_staged(self, queued: Outgoing) -> int:
        if self._is_cuda:
            return queued.num_bytes
        parts = queued.split()
        return sum(part.num_bytes for part in parts if _find_in_place(part) is None)

    def _pack_from_gpu(self, queued: Sequence[Outgoing], buffer: Tensor) -> Iterator[Tensor]:
        """A peer's messages in order, as they come off the GPU; all copies are enqueued at once."""
        cuts = cut_messages(join_sizes(queued), are_staged=True)
        with self._on_stream():
            sources, kept = find_sources(queued)
            targets = shift(sources, buffer.data_ptr())
            starts = np.array([start for start, _ in cuts], dtype=np.int64)
            offset = targets.address - buffer.data_ptr()
            message = np.searchsorted(starts, offset, side="right") - 1
            copies = SpanCopies(sources, targets, self._current_stream().device, kept, message)
            copied = []
            for number in range(len(cuts)):
                copies.run(number)
                copied.append(self._current_stream().record_event())
        for (start, stop), event in zip(cuts, copied, strict=True):
            event.synchronize()
            yield buffer[start:stop]

    def _pack(self, queued: Sequence[Outgoing], buffer: Tensor) -> Iterator[Tensor]:
        """A peer's messages in order, packed into the buffer when they are asked for."""
        cuts = cut_messages(join_sizes(queued))
        num_packed = num_sent = number = 0
        for part in (part for item in queued for part in item.split()):
            in_place = _find_in_place(part)
            if in_place is not None:
                yield from in_place
                number += len(in_place)
                continue
            part.pack(buffer[num_packed : num_packed + part.num_bytes])
            num_packed += part.num_bytes
            while num_sent < num_packed:
                start, stop = cuts[number]
                if stop - start > num_packed - num_sent:
                    break
                yield buffer[num_sent : num_sent + stop - start]
                num_sent += stop - start
                number += 1

    def _post_receives(self, payload: Exchange, inbox: Inbox) -> None:
        targets = [
            (peer, pieces)
            for peer, landings in inbox.items()
            for pieces in _find_targets(landings, are_staged=self._is_cuda)
        ]
        num_staged = [
            sum(piece.numel() for piece in pieces) if self._is_cuda or len(pieces) > 1 else 0
            for _, pieces in targets
        ]
        self._recv_pool = self._grow(self._recv_pool, sum(num_staged))
        buffers = self._recv_pool[: sum(num_staged)].split_with_sizes(num_staged)
        for (peer, pieces), buffer in zip(targets, buffers, strict=True):
            if buffer.numel():
                payload.recv(buffer, peer, partial(self._unpack, buffer, pieces))
            else:
                payload.recv(pieces[0], peer)

    def _unpack(self, buffer: Tensor, pieces: Sequence[Tensor]) -> None:
        parts = buffer.split_with_sizes([piece.numel() for piece in pieces])
        with self._on_stream():
            for piece, part in zip(pieces, parts, strict=True):
                piece.copy_(part, non_blocking=True)

    def _grow(self, pool: Tensor, num_bytes: int) -> Tensor:
        if pool.numel() >= num_bytes:
            return pool
        # Later exchanges may be out of the inference mode that this one is in.
        with torch.inference_mode(False):
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)

    def _release(self) -> None:
        self._group = None
        self._send_pool = self._recv_pool = torch.empty(0, dtype=torch.uint8)


def _find_in_place(part: Part) -> list[Tensor] | None:
    """A part's messages on the CPU, where it need not be packed."""
    return part.find_in_place() if part.sizes[0] >= _LARGE_BYTES else None


def _find_targets(landings: Sequence[Landing], *, are_staged: bool) -> Iterator[list[Tensor]]:
    """For each message of a peer the pieces of memory that it fills, in order."""
    rest = iter([landing.data for landing in landings if landing.data.numel()])
    data = torch.empty(0, dtype=torch.uint8)
    for start, stop in cut_messages(join_sizes(landings), are_staged=are_staged):
        missing, pieces = stop - start, []
        while missing:
            if not data.numel():
                data = next(rest)
            pieces.append(data[:missing])
            data = data[missing:]
            missing -= pieces[-1].numel()
        yield pieces
