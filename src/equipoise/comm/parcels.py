"""What is queued for the peers, and where what comes from them goes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from equipoise.comm.byte_views import view_bytes
from equipoise.comm.spans import Spans, span_of
from equipoise.topology import IntArray


class WeightTable:
    """Where the weights of all layers are, as arrays.

    Args:
        rows: per layer the tensors as [S, row bytes] uint8.

    Attributes:
        rows: as given.
    """

    def __init__(self, rows: list[list[Tensor]]) -> None:
        self.rows = rows
        most = max(map(len, rows), default=0)
        self._num_tensors = np.array([len(layer) for layer in rows], dtype=np.int64)
        self._address = np.zeros((len(rows), most), dtype=np.int64)
        self._row_bytes = np.zeros((len(rows), most), dtype=np.int64)
        for index, layer in enumerate(rows):
            self._address[index, : len(layer)] = [tensor.data_ptr() for tensor in layer]
            self._row_bytes[index, : len(layer)] = [tensor.shape[1] for tensor in layer]
        self._bytes_before = np.cumsum(self._row_bytes, axis=1) - self._row_bytes

    def list_rows(self, ranks: IntArray, layers: IntArray, slots: IntArray) -> RowList:
        """The rows of experts that are exchanged with some ranks, in the order of the wire.

        Args:
            ranks: [n] int64, with whom each expert is exchanged; ascending.
            layers: [n] int64, its layer; ascending within a rank.
            slots: [n] int64, its local slot; below 0 for none.
        """
        expert, tensor = _count_up(self._num_tensors[layers])
        run = np.ones(len(ranks), dtype=np.int64)
        run[1:] = (ranks[1:] != ranks[:-1]) | (layers[1:] != layers[:-1])
        run = np.cumsum(run)
        most = self._row_bytes.shape[1]
        order = np.argsort((run[expert] * most + tensor) * len(layers) + expert)
        expert, tensor = expert[order], tensor[order]
        layer = layers[expert]
        num_bytes = self._row_bytes[layer, tensor]
        address = self._address[layer, tensor] + slots[expert] * num_bytes
        return RowList(ranks[expert], slots[expert] >= 0, Spans(address, num_bytes))

    def pair_up(
        self,
        layers: IntArray,
        slots: IntArray,
        block_address: IntArray,
        block_rows: IntArray,
        positions: IntArray,
    ) -> tuple[Spans, Spans]:
        """Where experts are in their slots, and where in blocks that lie tensor by tensor.

        Args:
            layers: [n] int64, of each expert.
            slots: [n] int64, its local slot.
            block_address: [n] int64, where its block begins.
            block_rows: [n] int64, experts of that block.
            positions: [n] int64, its place among them.
        Returns:
            Spans of the slots, and of the blocks; one pair for each expert and tensor.
        """
        counts = self._num_tensors[layers]
        expert, tensor = _count_up(counts)
        layer = layers[expert]
        num_bytes = self._row_bytes[layer, tensor]
        in_slot = self._address[layer, tensor] + slots[expert] * num_bytes
        first = block_address[expert] + block_rows[expert] * self._bytes_before[layer, tensor]
        in_block = first + positions[expert] * num_bytes
        kept = num_bytes > 0
        return Spans(in_slot[kept], num_bytes[kept]), Spans(in_block[kept], num_bytes[kept])


@dataclass(frozen=True)
class RowList:
    """Rows of experts in the order of the wire: by rank, by layer, by tensor, by expert.

    Attributes:
        rank: [rows] int64, with whom each is exchanged.
        in_slot: [rows] bool, whether it has a slot.
        spans: where in that slot it is, and its bytes, which may be 0.
    """

    rank: IntArray
    in_slot: npt.NDArray[np.bool_]
    spans: Spans

    def split(self) -> Iterator[tuple[int, RowList]]:
        """By rank."""
        for start, stop in find_runs(self.rank):
            part = slice(start, stop)
            spans = Spans(self.spans.address[part], self.spans.num_bytes[part])
            yield int(self.rank[start]), RowList(self.rank[part], self.in_slot[part], spans)

    def find_landings(self, address: int) -> Spans:
        """Where they land: in their slots, and those without one behind each other in a buffer.

        Args:
            address: of the buffer.
        """
        num_bytes = self.spans.num_bytes
        filled = np.where(self.in_slot, 0, num_bytes)
        buffered = address + np.cumsum(filled) - filled
        return drop_empty(Spans(np.where(self.in_slot, self.spans.address, buffered), num_bytes))


def find_runs(numbers: IntArray) -> list[tuple[int, int]]:
    """Where equal numbers stand together: start and stop of each run."""
    if not len(numbers):
        return []
    edges = np.flatnonzero(numbers[1:] != numbers[:-1]) + 1
    return list(itertools.pairwise([0, *edges.tolist(), len(numbers)]))


def drop_empty(spans: Spans) -> Spans:
    """Without those of no bytes."""
    kept = spans.num_bytes > 0
    return spans if kept.all() else Spans(spans.address[kept], spans.num_bytes[kept])


def _count_up(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Each index as often as it counts, and how often it came before."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)


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
    """

    table: WeightTable
    layers: IntArray
    slots: IntArray
    spans: Spans

    @classmethod
    def of(cls, table: WeightTable, layers: IntArray, slots: IntArray) -> ExpertRows:
        """Experts that one rank gets."""
        rows = table.list_rows(np.zeros_like(layers), layers, slots)
        return cls(table, layers, slots, rows.spans)

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire."""
        return self.spans.total_bytes

    @property
    def sizes(self) -> IntArray:
        """[rows] int64, bytes of each row."""
        return self.spans.num_bytes

    def find(self) -> Spans:
        """Where the bytes are."""
        return drop_empty(self.spans)

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
            parts.append(item.find())
        else:
            kept.append(item.tensor.contiguous())
            parts.append(Spans.of([span_of(kept[-1])]))
    return Spans.join(parts), kept


def find_spans(landings: Sequence[Landing]) -> Spans:
    """Where the bytes of a peer go; nothing for landings of no bytes."""
    return Spans.join(
        [Spans.of([span_of(each.data)]) if each.spans is None else each.spans for each in landings]
    )


Outbox = Mapping[int, list[Outgoing]]
Inbox = Mapping[int, list[Landing]]
