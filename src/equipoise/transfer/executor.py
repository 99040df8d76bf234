"""Moves experts in place, chunk by chunk; all ranks commit a chunk or none does."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from equipoise.comm.base import EplbCommunicator, ExpertMoves, ExpertWeights
from equipoise.comm.byte_views import view_rows
from equipoise.comm.groups import RankGroup
from equipoise.comm.queued import SLOWEST_BYTES_PER_S
from equipoise.comm.weights import check_expert_weights
from equipoise.errors import EquipoiseError, MembershipError, PlacementError, TransferError
from equipoise.placement import Placement
from equipoise.plan.transfer_plan import TransferPlan, make_plan
from equipoise.topology import IntArray
from equipoise.transfer.agreement import agree
from equipoise.transfer.checksum import sum_experts
from equipoise.transfer.profile import reserve_buffers
from equipoise.transfer.staging import ChunkShare, StagedBlock, share_chunk

Verify = Literal["off", "all"]


@dataclass(frozen=True)
class TransferStats:
    """What one rank did.

    Attributes:
        moves: experts received from other ranks.
        sent: experts sent to other ranks.
        local_writes: slots filled from another slot of this rank, or by a fan-out copy of a
            received expert.
        received_bytes: of the received experts.
        sent_bytes: of the sent ones.
        num_chunks: how many chunks were committed.
        transfer_s: wall seconds of the whole call.
    """

    moves: int
    sent: int
    local_writes: int
    received_bytes: int
    sent_bytes: int
    num_chunks: int
    transfer_s: float


def rearrange_expert_weights_inplace(
    old: Placement,
    new: Placement,
    expert_weights: ExpertWeights,
    communicator: EplbCommunicator,
    group: RankGroup,
    *,
    staging_bytes: int | None = None,
    on_commit: Callable[[IntArray], None] | None = None,
    plan: TransferPlan | None = None,
    is_profile: bool = False,
    verify: Verify = "off",
) -> TransferStats:
    """Make every slot hold what `new` says, and return.

    Layers move in chunks. What a rank needs for a chunk, its own experts included, is staged
    first; then all ranks say how they fared, and settle through the group's store whether the
    chunk is committed. So slots and maps agree on every rank at every moment, whatever fails.

    Takes one staging buffer on the weights' device, as large as the largest chunk's experts on
    this rank: at most `staging_bytes`, or by default what the largest layer brings to any rank.

    Args:
        old: what the slots hold now.
        new: what they shall hold; same layers, experts and topology.
        expert_weights: per layer the tensors [S, ...] of this rank's slots, the ones that the
            communicator was created with; changed in place. What stands in slots that `new`
            leaves empty is not touched.
        communicator: over the ranks of `group`, with nothing queued.
        group: all ranks of the topology.
        staging_bytes: bound of the staging buffer; None for the least that works.
        on_commit: called with the layers [l] int64 whose slots have just switched, so that the
            caller switches their maps; each layer that differs is named once.
        plan: of `old` and `new`; made here if None.
        is_profile: change nothing, but take the buffers that a real call may need, so that
            memory profiling sees them.
        verify: "all" compares checksums of every received expert with its source's before it is
            committed.
    Returns:
        what this rank did; zeros for a profile pass.
    Collective: every rank of the group, with equal arguments; while it runs, no other use of the
        group.
    Raises: TransferError, on every rank that lives, naming the peer: chunks that `on_commit` was
        called for are committed on all of them, all others on none. PlacementError if the
        weights do not fit; ConfigError if no chunk fits `staging_bytes`.
    """
    started = time.perf_counter()
    problem: Exception | None = None
    facts = dict.fromkeys(("old placement", "new placement", "plan", "weights", "options"), "")
    try:
        check_fit(old, expert_weights, group)
        plan = plan or make_plan(old, new)
        facts = _collect_facts(old, new, plan, expert_weights)
    except EquipoiseError as error:
        problem = error
    facts["options"] = repr((staging_bytes, is_profile, verify))
    try:
        agree(group, facts, problem)
        assert plan is not None, "without a plan there is a problem"
        rows = [[view_rows(tensor) for tensor in layer] for layer in expert_weights]
        if is_profile:
            reserve_buffers(rows, communicator, group, staging_bytes)
            return TransferStats(0, 0, 0, 0, 0, 0, time.perf_counter() - started)
        shares = _share_all(plan, group.rank, rows, staging_bytes)
        most = max((share.num_bytes for share in shares), default=0)
        staging = torch.empty(most, dtype=torch.uint8, device=rows[0][0].device)
        mover = _Mover(plan, rows, communicator, group, staging, verify)
        for share in shares:
            mover.move(share, on_commit)
    except MembershipError as error:
        raise TransferError(str(error), rank=error.rank, peer=error.peer) from error
    return _sum_up(plan, rows, group.rank, len(shares), time.perf_counter() - started)


@dataclass(frozen=True)
class _Mover:
    """One call's parts; `rows` are the weights as [S, row bytes] uint8."""

    plan: TransferPlan
    rows: list[list[Tensor]]
    communicator: EplbCommunicator
    group: RankGroup
    staging: Tensor
    verify: Verify

    def move(self, share: ChunkShare, on_commit: Callable[[IntArray], None] | None) -> None:
        problem: Exception | None = None
        try:
            self._stage(share)
        except Exception as error:
            # Raised below, once the others know.
            problem = error
        problem = self._compare(share, problem)
        stands = self.group.decide("abort" if problem else "commit")
        if stands == "commit":
            for block in share.blocks:
                self._commit(block)
            if on_commit is not None:
                on_commit(share.layers)
        if problem is not None:
            raise problem
        if stands != "commit":
            raise TransferError(
                f"rank {self.group.rank}: another rank gave up, so layers "
                f"{share.layers.tolist()} stay as they were",
                rank=self.group.rank,
            )

    def _stage(self, share: ChunkShare) -> None:
        plan, slots_per_rank = self.plan, self.plan.old.topology.slots_per_rank
        self.communicator.add_moves(
            ExpertMoves(
                send_rank=plan.dst_rank[share.sent],
                send_layer=plan.layer[share.sent],
                send_slot=plan.src_slot[share.sent] % slots_per_rank,
                recv_rank=plan.src_rank[share.received],
                recv_layer=plan.layer[share.received],
                into=self.staging[: share.remote_bytes],
            )
        )
        for block in share.blocks:
            if block.source == self.group.rank:
                slots = self._to_index(plan.src_slot[block.rows] % slots_per_rank)
                for rows, view in zip(self.rows[block.layer], self._views(block), strict=True):
                    torch.index_select(rows, 0, slots, out=view)
        self.communicator.execute()

    def _compare(self, share: ChunkShare, problem: Exception | None) -> Exception | None:
        """Hear how every rank fared; None if all are fine."""
        try:
            # A peer may still be in its exchange: that long for headers, and for the payload.
            timeout_s = self.group.timeout.total_seconds()
            busy_s = 2 * timeout_s + share.busiest_bytes / SLOWEST_BYTES_PER_S
            fared = self.group.all_gather(torch.tensor([problem is not None]), busy_s=busy_s)
            failed = [rank for rank, status in enumerate(fared) if bool(status)]
            if not failed and self.verify == "all":
                return self._check_sums(share)
        except MembershipError as error:
            return problem or TransferError(str(error), rank=error.rank, peer=error.peer)
        if problem is None and failed:
            problem = TransferError(
                f"rank {self.group.rank}: the exchange failed on rank {failed[0]}, so layers "
                f"{share.layers.tolist()} stay as they were",
                rank=self.group.rank,
                peer=failed[0],
            )
        return problem

    def _check_sums(self, share: ChunkShare) -> TransferError | None:
        plan = self.plan
        sums = torch.zeros(len(plan.layer), dtype=torch.int64)
        for layer in np.unique(plan.layer[share.sent]):
            sent = share.sent[plan.layer[share.sent] == layer]
            slots = self._to_index(plan.src_slot[sent] % plan.old.topology.slots_per_rank)
            sums[torch.tensor(sent)] = sum_experts(
                rows.index_select(0, slots) for rows in self.rows[layer]
            )
        self.group.all_reduce(sums)
        damaged = -1
        for block in share.blocks:
            if block.source != self.group.rank and damaged < 0:
                differs = sum_experts(self._views(block)) != sums[torch.tensor(block.rows)]
                if bool(differs.any()):
                    damaged = int(block.rows[int(differs.nonzero()[0])])
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

    def _commit(self, block: StagedBlock) -> None:
        slots, positions = self._to_index(block.slots), self._to_index(block.positions)
        for rows, view in zip(self.rows[block.layer], self._views(block), strict=True):
            rows.index_copy_(0, slots, view.index_select(0, positions))

    def _views(self, block: StagedBlock) -> list[Tensor]:
        return block.find_views(self.staging, [rows.shape[1] for rows in self.rows[block.layer]])

    def _to_index(self, numbers: IntArray) -> Tensor:
        return torch.tensor(numbers, device=self.staging.device)


def check_fit(placement: Placement, expert_weights: ExpertWeights, group: RankGroup) -> None:
    """Refuse weights that are not what a placement says of a rank's slots.

    Args:
        placement: what the slots hold.
        expert_weights: per layer the tensors [S, ...] of this rank's slots.
        group: all ranks of the placement.
    Collective: none.
    Raises: PlacementError that says what does not fit, as `check_expert_weights` does too.
    """
    check_expert_weights(expert_weights)
    topology = placement.topology
    if topology.num_ranks != group.size:
        raise PlacementError(
            f"the placement is for {topology.num_ranks} ranks, the group has {group.size}"
        )
    if len(expert_weights) != placement.num_layers:
        raise PlacementError(
            f"there are weights for {len(expert_weights)} layers, the placement has "
            f"{placement.num_layers}"
        )
    num_slots = expert_weights[0][0].shape[0]
    if num_slots != topology.slots_per_rank:
        raise PlacementError(
            f"the weights have {num_slots} slots, the placement has {topology.slots_per_rank} "
            "on each rank"
        )


def _collect_facts(
    old: Placement, new: Placement, plan: TransferPlan, expert_weights: ExpertWeights
) -> dict[str, str]:
    if plan.old != old or plan.new != new:
        raise PlacementError("the plan is of other placements than the ones given")
    shapes = [[(list(t.shape), str(t.dtype)) for t in layer] for layer in expert_weights]
    return {
        "old placement": old.fingerprint(),
        "new placement": new.fingerprint(),
        "plan": plan.fingerprint(),
        "weights": repr(shapes),
        "options": "",
    }


def _share_all(
    plan: TransferPlan, rank: int, rows: list[list[Tensor]], staging_bytes: int | None
) -> list[ChunkShare]:
    expert_bytes = _measure_experts(rows)
    chunks = plan.chunks(expert_bytes, staging_bytes)
    # Layers in which slots only become empty have maps to switch, and nothing to stage.
    changed = (plan.old.slot_to_expert != plan.new.slot_to_expert).any(axis=1)
    idle = np.setdiff1d(np.flatnonzero(changed), plan.layer)
    if idle.size:
        chunks = [np.union1d(chunks[0], idle), *chunks[1:]] if chunks else [idle]
    return [share_chunk(plan, rank, layers, expert_bytes) for layers in chunks]


def _measure_experts(rows: list[list[Tensor]]) -> IntArray:
    return np.array([sum(tensor.shape[1] for tensor in layer) for layer in rows], dtype=np.int64)


def _sum_up(
    plan: TransferPlan, rows: list[list[Tensor]], rank: int, num_chunks: int, seconds: float
) -> TransferStats:
    sizes = _measure_experts(rows)[plan.layer]
    received = (plan.dst_rank == rank) & (plan.src_rank != rank)
    sent = (plan.src_rank == rank) & (plan.dst_rank != rank)
    writes = int(np.count_nonzero(plan.new.topology.rank_of_slot(plan.write_slot) == rank))
    return TransferStats(
        moves=int(received.sum()),
        sent=int(sent.sum()),
        local_writes=writes - int(received.sum()),
        received_bytes=int(sizes[received].sum()),
        sent_bytes=int(sizes[sent].sum()),
        num_chunks=num_chunks,
        transfer_s=seconds,
    )
