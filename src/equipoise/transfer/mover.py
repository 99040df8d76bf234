"""One rank's part in moving a chunk; whether it is committed is settled elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from equipoise.comm.base import EplbCommunicator, ExpertMoves, MayLand
from equipoise.comm.groups import RankGroup
from equipoise.comm.span_copies import SpanCopies
from equipoise.comm.spans import NO_SPANS, Spans
from equipoise.comm.weight_table import WeightTable
from equipoise.errors import TransferError
from equipoise.plan.transfer_plan import TransferPlan
from equipoise.topology import IntArray
from equipoise.transfer.checksum import sum_experts
from equipoise.transfer.staging import ChunkShare, StagedBlock

Verify = Literal["off", "sample", "all"]
"""Which received experts are compared with their sources': none, one in SAMPLE_EVERY, or all."""

SAMPLE_EVERY = 16


@dataclass(frozen=True)
class ChunkMover:
    """What the chunks of one plan have in common on this rank.

    Attributes:
        plan: what moves.
        rows: per layer the weights as [S, row bytes] uint8.
        communicator: over the ranks of `group`, with nothing queued.
        group: all ranks.
        table: of the rows.
    """

    plan: TransferPlan
    rows: list[list[Tensor]]
    communicator: EplbCommunicator
    group: RankGroup
    table: WeightTable

    def stage(self, share: ChunkShare, staging: Tensor) -> None:
        """Bring every expert of the chunk that this rank needs into staging, its own included.

        Args:
            share: this rank's.
            staging: [bytes] uint8, at least `share.num_bytes`; nothing reads it any more.
        Collective: every rank of the group.
        Raises: as `EplbCommunicator.execute`.
        """
        self.start(self.find_moves(share, staging))
        # Behind the start, which waits for what stands on the stream; beside a forward pass.
        self.prepare_own(share, staging).run(gently=True)
        self.communicator.finish()

    def decline(self) -> None:
        """Come to a chunk's exchange with nothing: whoever begins it hears so, and fails at once.

        Collective: in the place of `stage`; the communicator is not used again.
        """
        with contextlib.suppress(TransferError):
            self.communicator.execute()

    def start(self, moves: ExpertMoves, may_land: MayLand | None = None) -> None:
        """Begin to bring what comes from other ranks into staging; the communicator finishes it.

        Args:
            moves: as `find_moves` says; the staging is free, or still read until `may_land` says
                that it is not.
            may_land: as for `EplbCommunicator.start`.
        Collective: as `EplbCommunicator.start`.
        Raises: as `EplbCommunicator.start`.
        """
        self.communicator.add_moves(moves)
        self.communicator.start(may_land)

    def find_moves(self, share: ChunkShare, staging: Tensor) -> ExpertMoves:
        """What is exchanged with other ranks.

        Args:
            share: this rank's.
            staging: as for `stage`.
        Collective: none.
        """
        plan, slots_per_rank = self.plan, self.plan.old.topology.slots_per_rank
        return ExpertMoves(
            send_rank=plan.dst_rank[share.sent],
            send_layer=plan.layer[share.sent],
            send_slot=plan.src_slot[share.sent] % slots_per_rank,
            recv_rank=plan.old.topology.rank_of_slot(plan.src_slot[share.received]),
            recv_layer=plan.layer[share.received],
            into=staging[: share.remote_bytes],
            recv_slot=share.received_into if (share.received_into >= 0).any() else None,
        )

    def prepare_own(self, share: ChunkShare, staging: Tensor) -> SpanCopies:
        """What brings this rank's own experts into staging, on the stream that it is run on.

        Args:
            share: this rank's.
            staging: as for `stage`.
        Collective: none.
        """
        own = np.flatnonzero(share.staged.source == self.group.rank)
        if not own.size:
            return SpanCopies(NO_SPANS, NO_SPANS, staging.device, ())
        slots = self.plan.src_slot[share.staged.row[own]] % self.plan.old.topology.slots_per_rank
        in_slots, in_staging = self._find_ends(share, own, slots, staging)
        return SpanCopies(in_slots, in_staging, staging.device, (staging, self.rows))

    def verify(self, share: ChunkShare, staging: Tensor, verify: Verify) -> TransferError | None:
        """Compare checksums of received experts with their sources'.

        Args:
            share: this rank's; staged on every rank.
            staging: what it was staged into.
            verify: which of them.
        Returns:
            The same on every rank: None, or what says which expert arrived damaged, where.
        Collective: every rank of the group.
        Raises: MembershipError if a rank does not take part.
        """
        plan, chosen = self.plan, self._choose(verify)
        sums = torch.zeros(len(plan.layer), dtype=torch.int64)
        to_sum = share.sent[chosen[share.sent]]
        for layer in np.unique(plan.layer[to_sum]):
            sent = to_sum[plan.layer[to_sum] == layer]
            slots = _to_index(plan.src_slot[sent] % plan.old.topology.slots_per_rank, staging)
            sums[torch.tensor(sent)] = sum_experts(
                rows.index_select(0, slots) for rows in self.rows[layer]
            )
        self.group.all_reduce(sums)
        damaged = self._find_damaged(share, staging, sums, chosen)
        for found in self.group.all_gather(torch.tensor([damaged])):
            row = int(found)
            if row >= 0:
                source, layer = int(plan.src_rank[row]), int(plan.layer[row])
                return TransferError(
                    f"rank {self.group.rank}: layer {layer}, expert {plan.expert[row]} arrived "
                    f"damaged on rank {plan.dst_rank[row]} from rank {source}; layers "
                    f"{share.layers.tolist()} stay as they were",
                    rank=self.group.rank,
                    peer=source,
                    layer=layer,
                )
        return None

    def prepare(
        self, share: ChunkShare, staging: Tensor, beside: tuple[Spans, Spans] | None = None
    ) -> SpanCopies:
        """What fills the chunk's slots from staging, on the stream that it is run on.

        Args:
            share: this rank's.
            staging: what it was staged into.
            beside: what else is copied by the same launch: from where, and to where.
        Collective: none.
        """
        slots, staged = self._find_ends(share, share.write_staged, share.write_slot, staging)
        if beside is not None:
            staged, slots = Spans.join([staged, beside[0]]), Spans.join([slots, beside[1]])
        return SpanCopies(staged, slots, staging.device, (staging, self.rows))

    def prepare_many(self, shares: Sequence[ChunkShare], staging: Sequence[Tensor]) -> SpanCopies:
        """What `prepare` makes of several chunks, at little more than the cost of one.

        Args:
            shares: this rank's.
            staging: what each is staged into.
        Returns:
            A part for each chunk.
        Collective: none.
        """
        columns = [
            (
                share.staged.layer[share.write_staged],
                share.write_slot,
                buffer.data_ptr() + share.staged.offset[share.write_staged],
                share.staged.block_rows[share.write_staged],
                share.staged.place[share.write_staged],
            )
            for share, buffer in zip(shares, staging, strict=True)
        ]
        layers, *others = (np.concatenate(column) for column in zip(*columns, strict=True))
        slots, staged = self.table.pair_up(layers, *others)
        chunk = np.repeat(np.arange(len(shares)), [len(share.write_slot) for share in shares])
        part = np.repeat(chunk, self.table.count_spans(layers))
        return SpanCopies(staged, slots, staging[0].device, (staging, self.rows), part)

    def _find_ends(
        self, share: ChunkShare, chosen: IntArray, slots: IntArray, staging: Tensor
    ) -> tuple[Spans, Spans]:
        """Where staged experts are in these slots, and where in staging."""
        staged = share.staged
        return self.table.pair_up(
            staged.layer[chosen],
            slots,
            staging.data_ptr() + staged.offset[chosen],
            staged.block_rows[chosen],
            staged.place[chosen],
        )

    def _choose(self, verify: Verify) -> npt.NDArray[np.bool_]:
        """[M], which rows of the plan are verified; the same on every rank."""
        if verify == "sample":
            # Another sixteenth for another plan.
            first = int(self.plan.fingerprint(), 16) % SAMPLE_EVERY
            return np.equal(np.arange(len(self.plan.layer)) % SAMPLE_EVERY, first)
        return np.full(len(self.plan.layer), verify == "all")

    def _find_damaged(
        self, share: ChunkShare, staging: Tensor, sums: Tensor, chosen: npt.NDArray[np.bool_]
    ) -> int:
        """The first row of the plan whose expert is not what its source sent; -1 if none."""
        for rows, views in self._list_received(share, staging):
            here = np.flatnonzero(chosen[rows])
            if here.size:
                index = torch.tensor(here, device=staging.device)
                found = sum_experts(view.index_select(0, index) for view in views)
                differs = found != sums[torch.tensor(rows[here])]
                if bool(differs.any()):
                    return int(rows[here[int(differs.nonzero()[0])]])
        return -1

    def _list_received(
        self, share: ChunkShare, staging: Tensor
    ) -> Iterator[tuple[IntArray, list[Tensor]]]:
        """Rows of the plan that came from other ranks, with their tensors [n, row bytes]."""
        for block in share.staged.list_blocks():
            if block.source != self.group.rank:
                yield block.rows, self._views(block, staging)
        for row, slot in zip(share.received, share.received_into, strict=True):
            if slot >= 0:
                layer = self.rows[int(self.plan.layer[row])]
                yield np.array([row]), [rows[int(slot)][None] for rows in layer]

    def _views(self, block: StagedBlock, staging: Tensor) -> list[Tensor]:
        return block.find_views(staging, [rows.shape[1] for rows in self.rows[block.layer]])


def _to_index(numbers: IntArray, like: Tensor) -> Tensor:
    return torch.tensor(numbers, device=like.device)
