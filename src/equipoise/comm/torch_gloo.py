"""Experts over gloo: few large messages, staged through pinned memory where weights are on CUDA."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.comm.announcement import NUM_WORDS, Announcement, find_mismatch
from equipoise.comm.base import ExpertWeights
from equipoise.comm.byte_views import view_bytes
from equipoise.comm.exchange import Exchange, deadline_in
from equipoise.comm.queued import (
    SLOWEST_BYTES_PER_S,
    Inbox,
    Outbox,
    QueuedCommunicator,
    WholeTensor,
)

_TAG_HEADER = 2
_TAG_PAYLOAD = 3


@dataclass(frozen=True)
class _Parcel:
    """One peer's packed bytes, and the event after which they are complete."""

    data: Tensor
    packed: torch.cuda.Event | None


class TorchDistGlooStagedEplbCommunicator(QueuedCommunicator):
    """One small header to each peer, then everything for a peer as one message.

    All messages are under way together. Headers carry counts and sizes, so that a mismatch is an
    error on both sides before any payload. A single contiguous CPU tensor is sent and received in
    place; all else goes through two buffers, for sending and receiving, that grow by need and
    stay. With weights on CUDA the buffers are pinned and a peer's copies overlap with other
    peers' messages.

    Args:
        group: with a gloo backend for CPU tensors.
        expert_weights: as for the base.
        timeout_s: as for the base.
    """

    name: ClassVar[str] = "torch_gloo"

    def __init__(
        self, group: dist.ProcessGroup, expert_weights: ExpertWeights, timeout_s: float
    ) -> None:
        super().__init__(group.rank(), group.size(), expert_weights, timeout_s)
        self._group: dist.ProcessGroup | None = group
        self._send_pool = torch.empty(0, dtype=torch.uint8)
        self._recv_pool = torch.empty(0, dtype=torch.uint8)

    def _exchange(self, outbox: Outbox, inbox: Inbox) -> None:
        assert self._group is not None, "closed communicators are refused before"
        mine = self._announce(outbox, inbox)
        headers = Exchange(self._group, _TAG_HEADER)
        heard = {peer: torch.zeros(NUM_WORDS, dtype=torch.int64) for peer in self._peers}
        for peer in self._peers:
            headers.recv(view_bytes(heard[peer]), peer)
        for peer in self._peers:
            headers.send(view_bytes(mine[peer].to_tensor()), peer)
        parcels = self._pack(outbox, mine)
        failures = dict(headers.wait(deadline_in(self.timeout_s)))
        if any(failure.late for failure in failures.values()):
            self._raise({}, failures, self.timeout_s)
        theirs = {p: Announcement.from_tensor(heard[p]) for p in self._peers if p not in failures}
        found = {peer: find_mismatch(self.rank, mine[peer], peer, theirs[peer]) for peer in theirs}
        refusals = {peer: text for peer, text in found.items() if text is not None}
        # Peers with which all is well get what is theirs, whatever went wrong with others.
        sound = [peer for peer in theirs if peer not in refusals]
        most = max((a.total_bytes for a in (*theirs.values(), *mine.values())), default=0)
        seconds = self.timeout_s + most / SLOWEST_BYTES_PER_S
        payload = Exchange(self._group, _TAG_PAYLOAD)
        self._carry(payload, sound, parcels, inbox, time.monotonic() + seconds)
        failures.update(payload.failures)
        if failures or refusals:
            self._raise(refusals, failures, seconds)

    def _carry(
        self,
        payload: Exchange,
        peers: list[int],
        parcels: dict[int, _Parcel],
        inbox: Inbox,
        deadline: float,
    ) -> None:
        landings = self._choose_landings(peers, inbox)
        for peer, landing in landings.items():
            payload.recv(landing, peer)
        for peer in peers:
            if peer in parcels:
                parcel = parcels[peer]
                if parcel.packed is not None:
                    parcel.packed.synchronize()
                payload.send(parcel.data, peer)

        def unpack(peer: int) -> None:
            parts = inbox[peer]
            if parts[0].data is landings[peer]:
                return
            pieces = landings[peer].split_with_sizes([part.data.numel() for part in parts])
            with self._on_stream():
                for part, piece in zip(parts, pieces, strict=True):
                    part.data.copy_(piece, non_blocking=True)

        payload.wait(deadline, unpack)
        if self._is_cuda:
            self._current_stream().synchronize()

    def _pack(self, outbox: Outbox, mine: dict[int, Announcement]) -> dict[int, _Parcel]:
        parcels = {}
        staged = {}
        for peer, parts in outbox.items():
            first = parts[0]
            in_place = len(parts) == 1 and isinstance(first, WholeTensor) and not self._is_cuda
            if not mine[peer].sends.num_bytes:
                continue
            if in_place and isinstance(first, WholeTensor) and first.tensor.is_contiguous():
                parcels[peer] = _Parcel(view_bytes(first.tensor), None)
            else:
                staged[peer] = mine[peer].sends.num_bytes
        self._send_pool = self._grow(self._send_pool, sum(staged.values()))
        buffers = self._send_pool[: sum(staged.values())].split_with_sizes(list(staged.values()))
        for peer, buffer in zip(staged, buffers, strict=True):
            parts = outbox[peer]
            pieces = buffer.split_with_sizes([part.num_bytes for part in parts])
            with self._on_stream():
                for part, piece in zip(parts, pieces, strict=True):
                    part.pack(piece)
            parcels[peer] = _Parcel(buffer, self._record_event())
        return parcels

    def _choose_landings(self, peers: list[int], inbox: Inbox) -> dict[int, Tensor]:
        """Where each peer's message goes: in place, or a part of the receive buffer."""
        landings = {}
        staged = {}
        for peer in peers:
            parts = inbox.get(peer, [])
            num_bytes = sum(part.data.numel() for part in parts)
            if len(parts) == 1 and num_bytes and not self._is_cuda:
                landings[peer] = parts[0].data
            elif num_bytes:
                staged[peer] = num_bytes
        self._recv_pool = self._grow(self._recv_pool, sum(staged.values()))
        buffers = self._recv_pool[: sum(staged.values())].split_with_sizes(list(staged.values()))
        landings.update(zip(staged, buffers, strict=True))
        return landings

    def _grow(self, pool: Tensor, num_bytes: int) -> Tensor:
        if pool.numel() >= num_bytes:
            return pool
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)

    def _release(self) -> None:
        self._group = None
        self._send_pool = self._recv_pool = torch.empty(0, dtype=torch.uint8)

    @property
    def _is_cuda(self) -> bool:
        return self._device is not None and self._device.type == "cuda"

    def _current_stream(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream(self._device)

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        if not self._is_cuda:
            return contextlib.nullcontext()
        return torch.cuda.stream(self._current_stream())

    def _record_event(self) -> torch.cuda.Event | None:
        if not self._is_cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._current_stream())
        return event
