"""Where staged experts lie, and which slots get them: offsets of one rank's share of a chunk."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from equipoise.plan.transfer_plan import TransferPlan
from equipoise.topology import IntArray


@dataclass(frozen=True)
class StagedBlock:
    """Experts of one layer that come from one rank; they stand together, tensor by tensor.

    Attributes:
        source: rank that they come from; may be this one.
        layer: theirs.
        rows: [n] int64, rows of the plan, ascending.
        offset: bytes from the start of the staging buffer.
        positions: [w] int64, which of the n each write takes; more than one may take the same.
        slots: [w] int64, local slot (0..S-1) that it fills.
    """

    source: int
    layer: int
    rows: IntArray
    offset: int
    positions: IntArray
    slots: IntArray

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
class ChunkShare:
    """What one rank does in one chunk.

    Attributes:
        layers: [l] int64, the chunk's, ascending; the same on every rank.
        sent: [s] int64, rows of the plan that this rank sends; by destination, layer, expert.
        received: [m] int64, rows that it receives; by source, layer, expert.
        received_into: [m] int64, the empty local slot (0..S-1) that each lands in; -1 if staged.
        blocks: what it stages, in the order in which it lies: received experts by source and
            layer, as the wire brings them, then its own by layer.
        remote_bytes: bytes of the received ones that are staged.
        num_bytes: bytes of all that are staged.
        busiest_bytes: most that any rank sends and receives in this chunk; the same everywhere.
    """

    layers: IntArray
    sent: IntArray
    received: IntArray
    received_into: IntArray
    blocks: tuple[StagedBlock, ...]
    remote_bytes: int
    num_bytes: int
    busiest_bytes: int


def measure_experts(rows: list[list[Tensor]]) -> IntArray:
    """[L] int64, bytes of one expert of each layer, whose weights are [S, row bytes] uint8."""
    return np.array([sum(tensor.shape[1] for tensor in layer) for layer in rows], dtype=np.int64)


def share_plan(
    plan: TransferPlan,
    rank: int,
    expert_bytes: IntArray,
    staging_bytes: int | None,
    *,
    in_place: bool = False,
) -> list[ChunkShare]:
    """Cut a plan into chunks, and work out one rank's share of each.

    Args:
        plan: what moves.
        rank: whose shares.
        expert_bytes: [L] int64, bytes of one expert of each layer.
        staging_bytes: most that a chunk may bring to any rank; None for the least that works.
        in_place: whether received experts land in slots that stand empty, and are not staged.
    Returns:
        One share per chunk; every layer that differs is in one of them.
    Collective: none; the same chunks on every rank.
    Raises: ConfigError if a layer does not fit `staging_bytes`.
    """
    chunks = plan.chunks(expert_bytes, staging_bytes)
    # Layers in which slots only become empty have maps to switch, and nothing to stage.
    changed = (plan.old.slot_to_expert != plan.new.slot_to_expert).any(axis=1)
    idle = np.setdiff1d(np.flatnonzero(changed), plan.layer)
    if idle.size:
        chunks = [np.union1d(chunks[0], idle), *chunks[1:]] if chunks else [idle]
    return [share_chunk(plan, rank, layers, expert_bytes, in_place=in_place) for layers in chunks]


def share_chunk(
    plan: TransferPlan,
    rank: int,
    layers: IntArray,
    expert_bytes: IntArray,
    *,
    in_place: bool = False,
) -> ChunkShare:
    """Work out one rank's share of a chunk.

    Args:
        plan: what moves.
        rank: whose share.
        layers: [l] int64, the chunk's.
        expert_bytes: [L] int64, bytes of one expert of each layer.
        in_place: as for `share_plan`.
    Collective: none.
    """
    inside = np.isin(plan.layer, layers)
    comes_from, goes_to = plan.src_rank, plan.dst_rank
    sent = np.flatnonzero(inside & (comes_from == rank) & (goes_to != rank))
    sent = sent[np.argsort(goes_to[sent], kind="stable")]
    staged = np.flatnonzero(inside & (goes_to == rank))
    # Own experts last; the sort is stable, so layers and experts keep the plan's order.
    staged = staged[np.lexsort((comes_from[staged], comes_from[staged] == rank))]
    received = staged[comes_from[staged] != rank]
    received_into = _find_empty(plan, received) if in_place else np.full(len(received), -1)
    staged = staged[~np.isin(staged, received[received_into >= 0])]
    is_remote = comes_from[staged] != rank
    sizes = expert_bytes[plan.layer[staged]]
    return ChunkShare(
        layers=layers,
        sent=sent,
        received=received,
        received_into=received_into,
        blocks=_cut_blocks(plan, staged, sizes),
        remote_bytes=int(sizes[is_remote].sum()),
        num_bytes=int(sizes.sum()),
        busiest_bytes=_find_busiest(plan, np.flatnonzero(inside & ~plan.is_local), expert_bytes),
    )


def _find_empty(plan: TransferPlan, rows: IntArray) -> IntArray:
    """[n] int64, the local slot of each row that fills one empty slot and no other; else -1."""
    num_writes = np.bincount(plan.write_row, minlength=len(plan.layer))
    slot = np.full(len(plan.layer), -1)
    slot[plan.write_row] = plan.write_slot
    is_empty = plan.old.slot_to_expert[plan.layer[rows], slot[rows]] < 0
    lands = is_empty & (num_writes[rows] == 1)
    return np.where(lands, slot[rows] % plan.new.topology.slots_per_rank, -1)


def _find_busiest(plan: TransferPlan, travelling: IntArray, expert_bytes: IntArray) -> int:
    ends = np.concatenate((plan.src_rank[travelling], plan.dst_rank[travelling]))
    sizes = np.tile(expert_bytes[plan.layer[travelling]], 2)
    return int(np.bincount(ends, sizes, minlength=1).max())


def _cut_blocks(plan: TransferPlan, staged: IntArray, sizes: IntArray) -> tuple[StagedBlock, ...]:
    if not staged.size:
        return ()
    source, layer = plan.src_rank[staged], plan.layer[staged]
    starts = np.flatnonzero((np.diff(source) != 0) | (np.diff(layer) != 0)) + 1
    edges = [0, *starts.tolist(), len(staged)]
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    # Writes in the order of where their row lies, so that a block's are a slice of them.
    place_of_row = np.full(len(plan.layer), -1)
    place_of_row[staged] = np.arange(len(staged))
    place = place_of_row[plan.write_row]
    writes = np.argsort(place, kind="stable")
    place = place[writes]
    blocks = []
    for start, stop in itertools.pairwise(edges):
        ours = slice(*np.searchsorted(place, (start, stop)))
        blocks.append(
            StagedBlock(
                source=int(source[start]),
                layer=int(layer[start]),
                rows=staged[start:stop],
                offset=int(offsets[start]),
                positions=place[ours] - start,
                slots=plan.write_slot[writes[ours]] % plan.new.topology.slots_per_rank,
            )
        )
    return tuple(blocks)
