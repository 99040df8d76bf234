"""Which bytes experts that move are: several exchanges listed at once, at the cost of little more.

Axis letters: n experts of all exchanges.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from equipoise.comm.base import ExpertMoves
from equipoise.comm.byte_views import view_bytes
from equipoise.comm.parcels import ExpertRows, Landing
from equipoise.comm.weight_table import WeightTable, find_runs
from equipoise.topology import IntArray


@dataclass(frozen=True)
class MoveList:
    """What one `ExpertMoves` queues, by peer."""

    outgoing: list[tuple[int, ExpertRows]] = field(default_factory=list)
    incoming: list[tuple[int, Landing]] = field(default_factory=list)


@dataclass(frozen=True)
class MoveEnds:
    """One side's experts of several exchanges, one exchange behind the other.

    Attributes:
        rank: [n] int64, the peers.
        key: [n] int64, the peer, and R times the exchange, counted from 0.
        layer: [n] int64.
        slot: [n] int64, local; -1 for none.
    """

    rank: IntArray
    key: IntArray
    layer: IntArray
    slot: IntArray

    def is_in_order(self, num_layers: int) -> bool:
        """Whether it is by ranks in each exchange, and by layers within a rank."""
        order = self.key * num_layers + self.layer
        return not (order[1:] < order[:-1]).any()


def join_ends(several: Sequence[ExpertMoves], size: int) -> tuple[MoveEnds, MoveEnds]:
    """What is sent, and what is received.

    Args:
        several: exchanges, in the order in which they will be.
        size: R.
    Collective: none.
    """
    sent = [(moves.send_rank, moves.send_layer, moves.send_slot) for moves in several]
    received = [(moves.recv_rank, moves.recv_layer, _find_slots(moves)) for moves in several]
    return _join(sent, size), _join(received, size)


def _find_slots(moves: ExpertMoves) -> IntArray:
    return np.full(len(moves.recv_rank), -1) if moves.recv_slot is None else moves.recv_slot


def _join(side: list[tuple[IntArray, IntArray, IntArray]], size: int) -> MoveEnds:
    if len(side) == 1:
        return MoveEnds(side[0][0], *side[0])
    rank, layer, slot = (np.concatenate(column) for column in zip(*side, strict=True))
    first = np.repeat(np.arange(len(side)) * size, [len(ranks) for ranks, *_ in side])
    return MoveEnds(rank, first + rank, layer, slot)


def list_moves(
    table: WeightTable,
    several: Sequence[ExpertMoves],
    sent: MoveEnds,
    received: MoveEnds,
    size: int,
) -> list[MoveList]:
    """List what each exchange queues.

    Args:
        table: the weights.
        several: exchanges.
        sent: their ends, as `join_ends` has them; checked.
        received: the same.
        size: R.
    Collective: none.
    Raises: ValueError if what they land in is too small, or no plain bytes.
    """
    lists = [MoveList() for _ in several]
    rows = table.list_rows(sent.key, sent.layer, sent.slot)
    for (key, *spans), (start, stop) in zip(rows.split(), find_runs(sent.key), strict=True):
        number, peer = divmod(key, size)
        experts = sent.layer[start:stop], sent.slot[start:stop]
        lists[number].outgoing.append((peer, ExpertRows(table, *experts, *spans)))
    for number, peer, landing in _find_landings(table, several, received, size):
        lists[number].incoming.append((peer, landing))
    return lists


def _find_landings(
    table: WeightTable, several: Sequence[ExpertMoves], received: MoveEnds, size: int
) -> Iterator[tuple[int, int, Landing]]:
    rows = table.list_rows(received.key, received.layer, received.slot)
    in_buffer = np.cumsum(np.where(rows.in_slot, 0, rows.spans.num_bytes))
    peers = list(rows.find_peers())
    ends = in_buffer[[last - 1 for _, _, last in peers]].tolist() if peers else []
    needed = [0] * len(several)
    found = []
    for (key, first, last), (before, end) in zip(
        peers, itertools.pairwise([0, *ends]), strict=True
    ):
        number, peer = divmod(key, size)
        offset, needed[number] = needed[number], needed[number] + end - before
        found.append((number, peer, slice(first, last), offset, needed[number]))
    buffers = [_view_buffer(moves.into, most) for moves, most in zip(several, needed, strict=True)]
    for number, peer, where, offset, stop in found:
        spans = None
        if several[number].recv_slot is not None:
            spans = rows.land(where, buffers[number].data_ptr() + offset)
        sizes = rows.spans.num_bytes[where]
        yield number, peer, Landing(buffers[number][offset:stop], sizes, spans)


def _view_buffer(into: torch.Tensor, needed: int) -> torch.Tensor:
    if into.dtype != torch.uint8 or not into.is_contiguous() or into.numel() < needed:
        raise ValueError(
            f"the experts to be received need a contiguous uint8 tensor of {needed} bytes, "
            f"got {into.numel()} elements of {into.dtype}"
        )
    return view_bytes(into)
