"""One rank's part in moving a chunk; whether it is committed is settled elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from equipoise.comm.base import EplbCommunicator, ExpertMoves
from equipoise.comm.groups import RankGroup
from equipoise.errors import TransferError
from equipoise.plan.transfer_plan import TransferPlan
from equipoise.topology import IntArray
from equipoise.transfer.checksum import sum_experts
from equipoise.transfer.staging import ChunkShare, StagedBlock

Verify = Literal["off", "sample", "all"]
"""Which received experts are compared with their sources': none, one in SAMPLE_EVERY, or all."""

SAMPLE_EVERY = 16


class SlotCopy(NamedTuple):
    """One tensor of one block, on its way from staging into slots.

    Attributes:
        rows: [S, row bytes] uint8, the weights.
        slots: [w] int64, local slots to be filled.
        staged: [n, row bytes] uint8.
        positions: [w] int64, the staged expert that each slot gets; None if they are in order.
    """

    rows: Tensor
    slots: Tensor
    staged: Tensor
    positions: Tensor | None


def fill_slots(copies: Sequence[SlotCopy]) -> None:
    """Fill slots from staging, on the current stream.

    Args:
        copies: of a chunk that is committed.
    Collective: none; every rank at the same step.
    """
    for rows, slots, staged, positions in copies:
        chosen = staged if positions is None else staged.index_select(0, positions)
        rows.index_copy_(0, slots, chosen)
        if rows.is_cuda:
            # Another stream made the indices: they must outlive this one's use of them.
            stream = torch.cuda.current_stream(rows.device)
            slots.record_stream(stream)
            if positions is not None:
                positions.record_stream(stream)


@dataclass(frozen=True)
class ChunkMover:
    """What the chunks of one plan have in common on this rank.

    Attributes:
        plan: what moves.
        rows: per layer the weights as [S, row bytes] uint8.
        communicator: over the ranks of `group`, with nothing queued.
        group: all ranks.
    """

    plan: TransferPlan
    rows: list[list[Tensor]]
    communicator: EplbCommunicator
    group: RankGroup

    def stage(self, share: ChunkShare, staging: Tensor) -> None:
        """Bring every expert of the chunk that this rank needs into staging, its own included.

        Args:
            share: this rank's.
            staging: [bytes] uint8, at least `share.num_bytes`; nothing reads it any more.
        Collective: every rank of the group.
        Raises: as `EplbCommunicator.execute`.
        """
        plan, slots_per_rank = self.plan, self.plan.old.topology.slots_per_rank
        self.communicator.add_moves(
            ExpertMoves(
                send_rank=plan.dst_rank[share.sent],
                send_layer=plan.layer[share.sent],
                send_slot=plan.src_slot[share.sent] % slots_per_rank,
                recv_rank=plan.src_rank[share.received],
                recv_layer=plan.layer[share.received],
                into=staging[: share.remote_bytes],
            )
        )
        for block in share.blocks:
            if block.source == self.group.rank:
                slots = _to_index(plan.src_slot[block.rows] % slots_per_rank, staging)
                views = self._views(block, staging)
                for rows, view in zip(self.rows[block.layer], views, strict=True):
                    torch.index_select(rows, 0, slots, out=view)
        self.communicator.execute()

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

    def prepare(self, share: ChunkShare, staging: Tensor) -> tuple[SlotCopy, ...]:
        """What fills the chunk's slots from staging.

        Args:
            share: this rank's.
            staging: what it was staged into.
        Collective: none.
        """
        copies = []
        for block in share.blocks:
            slots = _to_index(block.slots, staging)
            # Without duplicates every staged expert goes to one slot, as they lie.
            is_plain = len(block.positions) == len(block.rows)
            positions = None if is_plain else _to_index(block.positions, staging)
            views = self._views(block, staging)
            for rows, view in zip(self.rows[block.layer], views, strict=True):
                copies.append(SlotCopy(rows, slots, view, positions))
        return tuple(copies)

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
        for block in share.blocks:
            here = np.flatnonzero(chosen[block.rows])
            if block.source != self.group.rank and here.size:
                views = [view[torch.tensor(here)] for view in self._views(block, staging)]
                differs = sum_experts(views) != sums[torch.tensor(block.rows[here])]
                if bool(differs.any()):
                    return int(block.rows[here[int(differs.nonzero()[0])]])
        return -1

    def _views(self, block: StagedBlock, staging: Tensor) -> list[Tensor]:
        return block.find_views(staging, [rows.shape[1] for rows in self.rows[block.layer]])


def _to_index(numbers: IntArray, like: Tensor) -> Tensor:
    return torch.tensor(numbers, device=like.device)
