"""Bytes to be sent that are not in registered memory: planned into offers, staged in a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.comm.byte_views import view_bytes
from equipoise.comm.parcels import ExpertRows, Outgoing
from equipoise.comm.spans import Regions, Spans, span_of


@dataclass(frozen=True)
class PlannedOffer:
    """A part of what a peer gets, announced and read as one.

    Attributes:
        parts: in the order of the wire: registered memory, or [bytes] uint8 to be staged.
        staged_bytes: of all parts that must be staged; at most a piece of the pool.
    """

    parts: tuple[Spans | Tensor, ...]
    staged_bytes: int


def plan_offers(
    outgoing: Sequence[Outgoing], registered: Regions, piece_bytes: int
) -> list[PlannedOffer]:
    """Cut what a peer gets into offers that each need at most one piece of the pool.

    A strided tensor is made contiguous here: a copy of it lives until the exchange is over.

    Args:
        outgoing: what the peer gets, in order; may be empty.
        registered: memory that the peer can read as it is.
        piece_bytes: of one piece.
    Returns:
        At least one offer; one alone if nothing need be staged.
    """
    offers: list[PlannedOffer] = []
    parts: list[Spans | Tensor] = []
    staged = 0
    for item in outgoing:
        if isinstance(item, ExpertRows):
            parts.append(item.pieces)
            continue
        data = view_bytes(item.tensor.contiguous())
        address, num_bytes = span_of(data)
        if registered.contain(address, num_bytes):
            parts.append(Spans.of([(address, num_bytes)]))
            continue
        while data.numel():
            if staged == piece_bytes:
                offers.append(PlannedOffer(tuple(parts), staged))
                parts, staged = [], 0
            head, data = data[: piece_bytes - staged], data[piece_bytes - staged :]
            parts.append(head)
            staged += head.numel()
    return [*offers, PlannedOffer(tuple(parts), staged)]


class SendPool:
    """Registered memory in pieces; each holds the staged bytes of one offer until it was read.

    Args:
        num_bytes: of all of it, about.
        num_pieces: how many offers can be staged at a time.
        device: where.
    """

    def __init__(self, num_bytes: int, num_pieces: int, device: torch.device) -> None:
        self.piece_bytes = max(1, num_bytes // num_pieces)
        self.data = torch.empty(self.piece_bytes * num_pieces, dtype=torch.uint8, device=device)
        self.num_pieces = num_pieces
        self._free = list(range(num_pieces))

    def take(self) -> int | None:
        """A piece that nobody uses, if there is one."""
        return self._free.pop() if self._free else None

    def give(self, piece: int) -> None:
        """The piece was read."""
        self._free.append(piece)

    def fill(self, piece: int, planned: PlannedOffer) -> Spans:
        """Enqueue the copies into a piece.

        Returns:
            Where all of the offer's bytes are then.
        """
        cursor = piece * self.piece_bytes
        spans = []
        for part in planned.parts:
            if isinstance(part, Spans):
                spans.append(part)
                continue
            room = self.data[cursor : cursor + part.numel()]
            room.copy_(part, non_blocking=True)
            spans.append(Spans.of([span_of(room)]))
            cursor += part.numel()
        return Spans.join(spans)
