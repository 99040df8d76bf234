"""Where staged experts lie, and which slots get them: offsets of one rank's share of each chunk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from torch import Tensor

from equipoise.plan.transfer_plan import TransferPlan
from equipoise.topology import IntArray

_MOST_LANDING_BYTES = 6 << 30
"""Of a chunk whose experts land where they stay, and are not staged. Each is agreed on by itself,
and a READ of many is a little faster; a peer that hangs is waited for by its bytes."""


@dataclass(frozen=True)
class StagedBlock:
    """Experts of one layer that come from one rank; they stand together, tensor by tensor.

    Attributes:
        source: rank that they come from; may be this one.
        layer: theirs.
        rows: [n] int64, rows of the plan, ascending.
        offset: bytes from the start of the staging buffer.
    """

    source: int
    layer: int
    rows: IntArray
    offset: int

    def find_views(self, staging: Tensor, row_bytes: list[int]) -> list[Tensor]:
        """The block's part of the staging buffer.

        Args:
            staging: [bytes] uint8.
            row_bytes: bytes of one slot of each tensor of the layer.
        Returns:
            for each tensor [n, row bytes] uint8.
        """
        num_rows = len(self.rows)
        ends = itertools.accumulate((num_rows * size for size in row_bytes), initial=self.offset)
        return [
            staging[start:end].view(num_rows, size)
            for (start, end), size in zip(itertools.pairwise(ends), row_bytes, strict=True)
        ]


@dataclass(frozen=True)
class StagedRows:
    """What a rank stages in a chunk, in the order in which it lies.

    Received experts come first, by source, layer and its slot, as the wire brings them; then its
    own by layer and slot. Those of one source and layer are a block, which lies tensor by tensor.

    Attributes:
        row: [n] int64, rows of the plan.
        source: [n] int64, rank that each comes from.
        layer: [n] int64.
        offset: [n] int64, where the block that it is in begins, in bytes.
        block_rows: [n] int64, experts of that block.
        place: [n] int64, which of them it is.
    """

    row: IntArray
    source: IntArray
    layer: IntArray
    offset: IntArray
    block_rows: IntArray
    place: IntArray

    def list_blocks(self) -> Iterator[StagedBlock]:
        """The blocks in order."""
        starts = np.flatnonzero(self.place == 0).tolist()
        for start, stop in itertools.pairwise([*starts, len(self.row)]):
            yield StagedBlock(
                int(self.source[start]),
                int(self.layer[start]),
                self.row[start:stop],
                int(self.offset[start]),
            )


@dataclass(frozen=True)
class ChunkShare:
    """What one rank does in one chunk.

    Attributes:
        layers: [l] int64, the chunk's, ascending; the same on every rank.
        sent: [s] int64, rows of the plan that this rank sends; by destination, layer, slot.
        received: [m] int64, rows that it receives; by source, layer, its slot.
        received_into: [m] int64, the empty local slot (0..S-1) that each lands in; -1 if staged.
        staged: what it stages.
        write_staged: [w] int64, which of the staged rows each write takes; several may take one.
        write_slot: [w] int64, local slot (0..S-1) that it fills.
        remote_bytes: bytes of the received ones that are staged.
        num_bytes: bytes of all that are staged.
        busiest_bytes: most that any rank sends and receives in this chunk; the same everywhere.
    """

    layers: IntArray
    sent: IntArray
    received: IntArray
    received_into: IntArray
    staged: StagedRows
    write_staged: IntArray
    write_slot: IntArray
    remote_bytes: int
    num_bytes: int
    busiest_bytes: int


def share_plan(
    plan: TransferPlan,
    rank: int,
    expert_bytes: IntArray,
    staging_bytes: int | None,
    *,
    in_place: bool = False,
    ends_small: bool = False,
) -> PlanShares:
    """Cut a plan into chunks, and work out one rank's share of each.

    Args:
        plan: what moves.
        rank: whose shares.
        expert_bytes: [L] int64, bytes of one expert of each layer.
        staging_bytes: most that a chunk may stage on any rank; None for the least that works.
        in_place: whether received experts land in slots that stand empty, and are not staged.
        ends_small: whether the last chunk is a single layer, since nothing travels beside what
            fills its slots, and those before it are about alike, so that each leaves time to
            prepare the next.
    Returns:
        One share per chunk; every layer that differs is in one of them.
    Collective: none; the same chunks on every rank.
    Raises: ConfigError if a layer does not fit `staging_bytes`.
    """
    # Where no slot stands empty, as is usual, there is nothing to look for.
    landing = _find_landing(plan) if in_place and plan.old.slot_to_expert.min() < 0 else None
    staged = None if landing is None else landing < 0
    chunks = plan.chunks(expert_bytes, staging_bytes, staged=staged, most_bytes=_MOST_LANDING_BYTES)
    if ends_small:
        chunks = _end_small(chunks, plan.staged_bytes(expert_bytes, staged))
    # Layers in which slots only become empty have maps to switch, and nothing to stage.
    changed = (plan.old.slot_to_expert != plan.new.slot_to_expert).any(axis=1)
    idle = np.flatnonzero(changed & (plan.rows_per_layer == 0))
    if idle.size:
        chunks = [np.union1d(chunks[0], idle), *chunks[1:]] if chunks else [idle]
    return PlanShares(plan, rank, chunks, expert_bytes, landing)


def _end_small(chunks: list[IntArray], staged: IntArray) -> list[IntArray]:
    """The same layers, the last on its own if it is staged at all; staged: [L, R] bytes."""
    if not chunks or len(chunks) == len(chunks[-1]) == 1 or not staged[chunks[-1][-1]].any():
        return chunks
    *chunks, end = [*chunks[:-1], chunks[-1][:-1], chunks[-1][-1:]]
    if not len(chunks[-1]):
        chunks.pop()
    if len(chunks) > 1:
        both = np.concatenate(chunks[-2:])
        before = np.cumsum(staged[both], axis=0)
        # The larger part, by where the second one begins; no larger than it was.
        larger = np.maximum(before[:-1], before[-1] - before[:-1]).max(axis=1)
        stop = int(np.flatnonzero(larger == larger.min())[-1]) + 1
        chunks[-2:] = [both[:stop], both[stop:]]
    return [*chunks, end]


def share_chunks(
    plan: TransferPlan, rank: int, chunks: Sequence[IntArray], expert_bytes: IntArray
) -> PlanShares:
    """Work out one rank's share of each chunk.

    Args:
        plan: what moves.
        rank: whose share.
        chunks: the layers [l] int64 of each, ascending.
        expert_bytes: [L] int64, bytes of one expert of each layer.
    Collective: none.
    """
    return PlanShares(plan, rank, chunks, expert_bytes)


class PlanShares(Sequence[ChunkShare]):
    """One rank's shares of all chunks; rows are sorted at once, each share is cut when asked for.

    Any thread may ask; the same share is cut again each time.

    Args:
        plan: as for `share_chunks`, and so are the others.
        landing: [M] int64, the empty global slot that each row lands in, or -1; None for all -1.

    Attributes:
        chunks: the layers [l] int64 of each.
        num_bytes: [chunks] int64, bytes that this rank stages.
        busiest_bytes: [chunks] int64, most that any rank sends and receives.
    """

    def __init__(
        self,
        plan: TransferPlan,
        rank: int,
        chunks: Sequence[IntArray],
        expert_bytes: IntArray,
        landing: IntArray | None = None,
    ) -> None:
        self.chunks, self._rank, self._layer = chunks, rank, plan.layer
        num_chunks = len(chunks)
        chunk_of_layer = np.full(plan.old.num_layers, num_chunks)
        for number, layers in enumerate(chunks):
            chunk_of_layer[layers] = number
        chunk, source = chunk_of_layer[plan.layer], plan.src_rank
        inside = chunk < num_chunks
        sent = np.flatnonzero(inside & (source == rank) & (plan.dst_rank != rank))
        self._sent = sent = sent[np.lexsort((plan.dst_rank[sent], chunk[sent]))]
        ours = np.flatnonzero(inside & (plan.dst_rank == rank))
        # Own experts last; the sort is stable, so layers and experts keep the plan's order.
        ours = ours[np.lexsort((source[ours], source[ours] == rank, chunk[ours]))]
        self._received = received = ours[source[ours] != rank]
        self._into = np.full(len(received), -1)
        self._staged = staged = ours
        if landing is not None:
            into, slots_per_rank = landing[received], plan.new.topology.slots_per_rank
            self._into = np.where(into >= 0, into % slots_per_rank, -1)
            self._staged = staged = ours[landing[ours] < 0]
        self._source, self._sizes = source[staged], expert_bytes[plan.layer[staged]]
        writes, self._write_staged = _find_writes(plan, staged)
        self._cuts = [_cut(chunk[rows], num_chunks) for rows in (sent, received, staged)]
        self._write_cut = np.searchsorted(self._write_staged, self._cuts[2])
        self._slots = plan.write_slot[writes] % plan.new.topology.slots_per_rank
        self.busiest_bytes = _find_busiest(plan, chunk_of_layer, num_chunks, expert_bytes)
        self.num_bytes = np.diff(np.concatenate(([0], np.cumsum(self._sizes)))[self._cuts[2]])

    def __len__(self) -> int:
        return len(self.chunks)

    @overload
    def __getitem__(self, number: int) -> ChunkShare: ...

    @overload
    def __getitem__(self, number: slice) -> list[ChunkShare]: ...

    def __getitem__(self, number: int | slice) -> ChunkShare | list[ChunkShare]:
        if isinstance(number, slice):
            return [self._cut_out(each) for each in range(len(self))[number]]
        return self._cut_out(range(len(self))[number])

    def _cut_out(self, number: int) -> ChunkShare:
        sends, receives, stages = (slice(*cut[number : number + 2]) for cut in self._cuts)
        filled = slice(*self._write_cut[number : number + 2])
        rows, source, sizes = self._staged[stages], self._source[stages], self._sizes[stages]
        return ChunkShare(
            layers=self.chunks[number],
            sent=self._sent[sends],
            received=self._received[receives],
            received_into=self._into[receives],
            staged=_lay_out(rows, source, self._layer[rows], sizes),
            write_staged=self._write_staged[filled] - stages.start,
            write_slot=self._slots[filled],
            remote_bytes=int(sizes[source != self._rank].sum()),
            num_bytes=int(self.num_bytes[number]),
            busiest_bytes=int(self.busiest_bytes[number]),
        )


def _cut(chunk: IntArray, num_chunks: int) -> IntArray:
    """[chunks + 1], where each chunk begins in rows that are sorted by it."""
    edges: IntArray = np.searchsorted(chunk, np.arange(num_chunks + 1))
    return edges


def _find_landing(plan: TransferPlan) -> IntArray:
    """[M] int64, the global slot of each row that comes to one empty slot and no other; else -1."""
    num_writes = np.bincount(plan.write_row, minlength=len(plan.layer))
    slot = np.full(len(plan.layer), -1)
    slot[plan.write_row] = plan.write_slot
    is_empty = plan.old.slot_to_expert[plan.layer, slot] < 0
    return np.where(is_empty & (num_writes == 1) & ~plan.is_local, slot, -1)


def _find_busiest(
    plan: TransferPlan, chunk_of_layer: IntArray, num_chunks: int, expert_bytes: IntArray
) -> IntArray:
    """[chunks] int64, most bytes that any rank sends and receives.

    chunk_of_layer: [L] int64; `num_chunks` for a layer of none.
    """
    layers, size = plan.old.num_layers, plan.old.topology.num_ranks
    source = plan.src_rank
    travels = source != plan.dst_rank
    first = plan.layer[travels] * size
    ends = np.concatenate((first + source[travels], first + plan.dst_rank[travels]))
    each = np.bincount(ends, minlength=layers * size).reshape(layers, size) * expert_bytes[:, None]
    of_chunk = np.zeros((num_chunks + 1, size), dtype=np.int64)
    np.add.at(of_chunk, chunk_of_layer, each)
    busiest: IntArray = of_chunk[:-1].max(axis=1)
    return busiest


def _find_writes(plan: TransferPlan, staged: IntArray) -> tuple[IntArray, IntArray]:
    """Writes that take a staged row, and which of them each takes; in the order of those."""
    place = np.full(len(plan.layer), -1)
    place[staged] = np.arange(len(staged))
    taken = place[plan.write_row]
    writes = np.flatnonzero(taken >= 0)
    writes = writes[np.argsort(taken[writes], kind="stable")]
    return writes, taken[writes]


def _lay_out(rows: IntArray, source: IntArray, layer: IntArray, sizes: IntArray) -> StagedRows:
    is_first = np.ones(len(rows), dtype=bool)
    is_first[1:] = (source[1:] != source[:-1]) | (layer[1:] != layer[:-1])
    first = np.flatnonzero(is_first)
    block = np.cumsum(is_first) - 1
    counts = np.bincount(block, minlength=len(first))
    return StagedRows(
        row=rows,
        source=source,
        layer=layer,
        offset=(np.cumsum(sizes) - sizes)[first][block],
        block_rows=counts[block],
        place=np.arange(len(rows)) - first[block],
    )
