"""What is queued for the peers, and where what comes from them goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equipoise.comm.byte_views import view_bytes
from equipoise.comm.spans import Spans, span_of
from equipoise.comm.weight_table import WeightTable, find_runs, join_touching
from equipoise.topology import IntArray


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
        """Copy into `out` [num_bytes] uint8."""
        out.copy_(view_bytes(self.tensor.contiguous()))

    def split(self) -> Iterator[WholeTensor]:
        """In parts that each come from one tensor."""
        yield self


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
        """Copy into `out` [num_bytes] uint8."""
        shaped = out.view(len(self.slots), self.rows.shape[1])
        torch.index_select(self.rows, 0, torch.tensor(self.slots), out=shaped)


@dataclass(frozen=True)
class ExpertRows:
    """Experts of any layers to be sent behind each other, as `ExpertMoves` orders them.

    Attributes:
        table: the weights.
        layers: [n] int64, of each expert; ascending.
        slots: [n] int64, its local slot.
        spans: the rows in the order of the wire; some may have no bytes.
        pieces: where their bytes are, rows that touch as one.
    """

    table: WeightTable
    layers: IntArray
    slots: IntArray
    spans: Spans
    pieces: Spans

    @classmethod
    def of(cls, table: WeightTable, layers: IntArray, slots: IntArray) -> ExpertRows:
        """Experts that one rank gets."""
        rows = table.list_rows(np.zeros_like(layers), layers, slots)
        return cls(table, layers, slots, rows.spans, join_touching(rows.spans, rows.block)[0])

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire."""
        return self.spans.total_bytes

    @property
    def sizes(self) -> IntArray:
        """[rows] int64, bytes of each row."""
        return self.spans.num_bytes

    def split(self) -> Iterator[SlotRows]:
        """In parts that each come from one tensor."""
        for start, stop in find_runs(self.layers):
            for rows in self.table.rows[int(self.layers[start])]:
                yield SlotRows(rows, self.slots[start:stop])


Outgoing = WholeTensor | ExpertRows
Part = WholeTensor | SlotRows


@dataclass(frozen=True)
class Landing:
    """Where bytes from one peer go.

    Attributes:
        data: [bytes] uint8, contiguous.
        sizes: [n] int64, bytes of each tensor in it, or of each row where experts move; in order.
        spans: where the bytes go, if not all of them to `data`.
    """

    data: Tensor
    sizes: IntArray
    spans: Spans | None = None


def join_sizes(parts: Sequence[Outgoing | Part] | Sequence[Landing]) -> IntArray:
    """[n] int64, bytes of each tensor or row that goes one way between two ranks, in order."""
    if len(parts) == 1:
        return parts[0].sizes
    return np.concatenate([np.zeros(0, dtype=np.int64), *(part.sizes for part in parts)])


def find_sources(queued: Sequence[Outgoing]) -> tuple[Spans, list[Tensor]]:
    """Where the bytes that a peer gets are, in order, and tensors that must live as long.

    A strided tensor is made contiguous here, by a copy that is enqueued.
    """
    parts, kept = [], []
    for item in queued:
        if isinstance(item, ExpertRows):
            parts.append(item.pieces)
        else:
            kept.append(item.tensor.contiguous())
            parts.append(Spans.of([span_of(kept[-1])]))
    return Spans.join(parts), kept


def find_spans(landings: Sequence[Landing]) -> Spans:
    """Where the bytes of a peer go; nothing for landings of no bytes."""
    return Spans.join(
        [Spans.of_one(*span_of(one.data)) if one.spans is None else one.spans for one in landings]
    )


Outbox = Mapping[int, list[Outgoing]]
Inbox = Mapping[int, list[Landing]]
