"""Where the weights of all layers are: as addresses, from which moves are made without Python."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from equipoise.comm.spans import Spans, span_of
from equipoise.topology import IntArray


class WeightTable:
    """Where the weights of all layers are, as arrays.

    Args:
        rows: per layer the tensors as [S, row bytes] uint8.

    Attributes:
        rows: as given.
        num_slots: [L] int64.
    """

    def __init__(self, rows: list[list[Tensor]]) -> None:
        self.rows = rows
        most = max(map(len, rows), default=0)
        self.num_slots = np.array([layer[0].shape[0] for layer in rows], dtype=np.int64)
        self._num_tensors = np.array([len(layer) for layer in rows], dtype=np.int64)
        self._address = np.zeros((len(rows), most), dtype=np.int64)
        self._row_bytes = np.zeros((len(rows), most), dtype=np.int64)
        for index, layer in enumerate(rows):
            self._address[index, : len(layer)] = [tensor.data_ptr() for tensor in layer]
            self._row_bytes[index, : len(layer)] = [tensor.shape[1] for tensor in layer]
        self._bytes_before = np.cumsum(self._row_bytes, axis=1) - self._row_bytes
        self._addresses = [tensor.data_ptr() for layer in rows for tensor in layer]
        self._known: list[Tensor] = []

    @cached_property
    def expert_bytes(self) -> IntArray:
        """[L] int64, bytes of one expert of each layer."""
        total: IntArray = self._row_bytes.sum(axis=1)
        return total

    @cached_property
    def layout(self) -> str:
        """Slots and bytes of each row, of each layer's tensors; equal for ranks that fit."""
        return repr([[tuple(tensor.shape) for tensor in layer] for layer in self.rows])

    def is_of(self, expert_weights: Sequence[Sequence[Tensor]]) -> bool:
        """Whether this is the table of these tensors, as they are.

        Args:
            expert_weights: per layer the tensors [S, ...].
        Collective: none.
        """
        given = [tensor for layer in expert_weights for tensor in layer]
        counts = list(map(len, expert_weights))
        if counts != list(map(len, self.rows)):
            return False
        # What was found to be the same before is looked at less closely: every transfer begins so.
        addresses = [tensor.data_ptr() for tensor in given]
        if addresses != self._addresses:
            return False
        if self._known and all(map(operator.is_, given, self._known)):
            return True
        is_same = all(
            tensor.is_contiguous()
            and tensor.shape[0] == rows.shape[0]
            and span_of(tensor)[1] == rows.numel()
            for tensor, rows in zip(given, itertools.chain(*self.rows), strict=True)
        )
        if is_same:
            self._known = given
        return is_same

    def list_rows(self, ranks: IntArray, layers: IntArray, slots: IntArray) -> RowList:
        """The rows of experts that are exchanged with some ranks, in the order of the wire.

        Args:
            ranks: [n] int64, with whom each expert is exchanged; ascending.
            layers: [n] int64, its layer; ascending within a rank.
            slots: [n] int64, its local slot; below 0 for none.
        """
        expert, tensor, block = self._order_rows(ranks, layers)
        layer = layers[expert]
        num_bytes = self._row_bytes[layer, tensor]
        spans = Spans(self._address[layer, tensor] + slots[expert] * num_bytes, num_bytes)
        return RowList(ranks[expert], block, slots[expert] >= 0, spans)

    def _order_rows(self, ranks: IntArray, layers: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """[rows] each, in the order of the wire: of which expert, which tensor, and the block."""
        count = len(ranks)
        if count and ranks[0] == ranks[-1] and layers[0] == layers[-1]:
            # One layer to one rank, a chunk of the least memory: nothing to sort.
            expert, tensor = np.arange(count), np.arange(self._num_tensors[layers[0]])
            block = np.repeat(tensor, count)
            return np.tile(expert, len(tensor)), block, block
        expert, tensor = _count_up(self._num_tensors[layers])
        run = np.ones(count, dtype=np.int64)
        run[1:] = (ranks[1:] != ranks[:-1]) | (layers[1:] != layers[:-1])
        block = np.cumsum(run)[expert] * self._row_bytes.shape[1] + tensor
        order = np.argsort(block, kind="stable")
        return expert[order], tensor[order], block[order]

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

    def count_spans(self, layers: IntArray) -> IntArray:
        """[n] int64, how many spans of each expert `pair_up` finds.

        Args:
            layers: [n] int64, of each expert.
        """
        counts: IntArray = np.count_nonzero(self._row_bytes, axis=1)[layers]
        return counts


@dataclass(frozen=True)
class RowList:
    """Rows of experts in the order of the wire: by rank, by layer, by tensor, by expert.

    Attributes:
        rank: [rows] int64, with whom each is exchanged.
        block: [rows] int64, equal for rows of one tensor that are exchanged with one rank.
        in_slot: [rows] bool, whether it has a slot.
        spans: where in that slot it is, and its bytes, which may be 0.
    """

    rank: IntArray
    block: IntArray
    in_slot: npt.NDArray[np.bool_]
    spans: Spans

    def find_peers(self) -> Iterator[tuple[int, int, int]]:
        """Each rank, and where its rows start and stop."""
        for start, stop in find_runs(self.rank):
            yield int(self.rank[start]), start, stop

    def split(self) -> Iterator[tuple[int, Spans, Spans]]:
        """By rank: its rows, and where their bytes are, in as few spans as can be."""
        pieces, first = join_touching(self.spans, self.block)
        peers = list(self.find_peers())
        stops = np.searchsorted(first, [stop for _, _, stop in peers]).tolist()
        for (rank, start, stop), edges in zip(peers, itertools.pairwise([0, *stops]), strict=True):
            yield rank, self.spans.cut(start, stop), pieces.cut(*edges)

    def land(self, rows: slice, address: int) -> Spans:
        """Where some rows land, in their slots, and those without one in a buffer.

        Args:
            rows: of one rank.
            address: in the buffer, where those without a slot stand behind each other from.
        """
        in_slot, num_bytes = self.in_slot[rows], self.spans.num_bytes[rows]
        filled = np.where(in_slot, 0, num_bytes)
        buffered = address + np.cumsum(filled) - filled
        where = np.where(in_slot, self.spans.address[rows], buffered)
        block = np.where(in_slot, self.block[rows], -1)
        return join_touching(Spans(where, num_bytes), block)[0]


def find_runs(numbers: IntArray) -> list[tuple[int, int]]:
    """Where equal numbers stand together, of ascending ones: start and stop of each run."""
    if not len(numbers):
        return []
    if numbers[0] == numbers[-1]:
        return [(0, len(numbers))]
    edges = np.flatnonzero(numbers[1:] != numbers[:-1]) + 1
    return list(itertools.pairwise([0, *edges.tolist(), len(numbers)]))


def join_touching(spans: Spans, group: IntArray) -> tuple[Spans, IntArray]:
    """Make one of spans that touch, where they are of a group; those of no bytes are left out.

    Args:
        spans: n of them.
        group: [n] int64; memory of two tensors may touch, and be registered apart.
    Returns:
        m spans, and [m] int64, which was the first of each.
    """
    kept = np.flatnonzero(spans.num_bytes)
    address, num_bytes, group = spans.address[kept], spans.num_bytes[kept], group[kept]
    begins = np.ones(len(kept), dtype=np.bool_)
    begins[1:] = (address[1:] != address[:-1] + num_bytes[:-1]) | (group[1:] != group[:-1])
    first = np.flatnonzero(begins)
    return Spans(address[first], np.add.reduceat(num_bytes, first)), kept[first]


def _count_up(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Each index as often as it counts, and how often it came before."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
