"""Moves experts in place, chunk by chunk; all ranks commit a chunk or none does.

Staging takes memory on the weights' device. On the CPU one buffer, as large as the largest chunk's
experts on this rank. On a GPU up to three, so that chunks travel into some while one fills slots:
at most `staging_bytes` together, or by default a part of what is free. Where the wire can, experts
land in empty slots directly. On a GPU slots and maps switch in the order of the current stream,
which nobody waits for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from equipoise.comm.base import EplbCommunicator, ExpertWeights
from equipoise.comm.byte_views import view_rows
from equipoise.comm.groups import RankGroup
from equipoise.comm.queued import SLOWEST_BYTES_PER_S
from equipoise.comm.weight_table import WeightTable
from equipoise.comm.weights import check_expert_weights
from equipoise.errors import EquipoiseError, MembershipError, PlacementError, TransferError
from equipoise.placement import Placement
from equipoise.plan.transfer_plan import TransferPlan, make_plan
from equipoise.topology import IntArray
from equipoise.transfer.agreement import agree
from equipoise.transfer.budget import StagingBudget, choose_budget, find_spare, settle
from equipoise.transfer.mover import ChunkMover, Verify
from equipoise.transfer.pipeline import Pipeline
from equipoise.transfer.profile import reserve_buffers
from equipoise.transfer.staging import PlanShares, share_plan

_ALIGNMENT = 256
_FARED_WELL, _FARED_ILL = torch.tensor([False]), torch.tensor([True])
_FACTS = ("old placement", "new placement", "plan", "weights", "options")


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

    Args:
        old: what the slots hold now.
        new: what they shall hold; same layers, experts and topology.
        expert_weights: per layer the tensors [S, ...] of this rank's slots, the ones that the
            communicator was created with; changed in place. What stands in slots that `new`
            leaves empty is not touched.
        communicator: over the ranks of `group`, with nothing queued.
        group: all ranks of the topology.
        staging_bytes: bound of the staging memory; None for what the largest layer needs, and on a
            GPU for more than that where much is free.
        on_commit: called with the layers [l] int64 whose slots have just switched, so that the
            caller switches their maps; each layer that differs is named once.
        plan: of `old` and `new`; made here if None.
        is_profile: change nothing; take the buffers that a real call may need, to be profiled.
        verify: whose checksums are compared with their sources' before they are committed.
    Returns:
        what this rank did; zeros for a profile pass.
    Collective: every rank of the group, with equal arguments; while it runs, no other use of the
        group.
    Raises: TransferError, on every rank that lives, naming the peer: chunks that `on_commit` was
        called for are committed on all of them, all others on none. PlacementError if the
        weights do not fit; ConfigError if no chunk fits `staging_bytes`.
    """
    started = time.perf_counter()
    checked = _check(old, new, expert_weights, communicator, group, plan)
    checked.facts["options"] = repr((staging_bytes, is_profile, verify))
    num_chunks = 0
    try:
        own = 0 if staging_bytes is not None else find_spare(checked.device)
        cutter = _Cutter(checked, communicator, group, staging_bytes)
        cut_early = None if is_profile else partial(cutter.try_cut, own)
        spare_bytes = agree(group, checked.facts, checked.problem, own, cut_early)
        if is_profile:
            reserve_buffers(checked.table.rows, communicator, group, staging_bytes)
            return TransferStats(0, 0, 0, 0, 0, 0, time.perf_counter() - started)
        mover, (budget, shares) = cutter.mover, cutter.cut(spare_bytes)
        num_chunks = _move_all(mover, budget, shares, verify, on_commit)
    except MembershipError as error:
        raise TransferError(str(error), rank=error.rank, peer=error.peer) from error
    seconds = time.perf_counter() - started
    return _sum_up(checked.plan, checked.table, group.rank, num_chunks, seconds)


@dataclass(frozen=True)
class _Checked:
    """What this rank knows before it meets the others."""

    facts: dict[str, str]
    device: torch.device
    found: tuple[TransferPlan, WeightTable] | None = None
    problem: EquipoiseError | None = None

    @property
    def plan(self) -> TransferPlan:
        """What moves; ranks have agreed that none has a problem."""
        assert self.found is not None, "without a plan there is a problem"
        return self.found[0]

    @property
    def table(self) -> WeightTable:
        """Of the weights."""
        assert self.found is not None, "without a plan there is a problem"
        return self.found[1]


def _check(
    old: Placement,
    new: Placement,
    expert_weights: ExpertWeights,
    communicator: EplbCommunicator,
    group: RankGroup,
    plan: TransferPlan | None,
) -> _Checked:
    try:
        table = communicator.table
        if table is None or not table.is_of(expert_weights):
            check_expert_weights(expert_weights)
            table = WeightTable([[view_rows(one) for one in layer] for layer in expert_weights])
        _check_sizes(old, expert_weights, group)
        device = expert_weights[0][0].device
        # Peers may READ the weights from here on, and READs follow no stream.
        settle(device)
        plan = plan or make_plan(old, new)
        return _Checked(_collect_facts(old, new, plan, table), device, (plan, table))
    except EquipoiseError as error:
        return _Checked(dict.fromkeys(_FACTS, ""), group.device, problem=error)


class _Cutter:
    """Cuts the plan into chunks; early, for the memory that this rank has, which may be the least.

    Args:
        checked: what this rank knows; it has a plan wherever anything is cut.
        communicator: over the ranks of `group`.
        group: all ranks.
        staging_bytes: bound of the staging memory, or None.
    """

    def __init__(
        self,
        checked: _Checked,
        communicator: EplbCommunicator,
        group: RankGroup,
        staging_bytes: int | None,
    ) -> None:
        self._checked = checked
        self._staging_bytes = staging_bytes
        self._communicator, self._group = communicator, group
        self._early: tuple[int, tuple[StagingBudget, PlanShares]] | None = None

    @cached_property
    def mover(self) -> ChunkMover:
        """What moves the chunks."""
        table = self._checked.table
        return ChunkMover(self._checked.plan, table.rows, self._communicator, self._group, table)

    def try_cut(self, spare_bytes: int) -> None:
        """While the other ranks are heard; what goes wrong is raised when it is known for sure."""
        if self._checked.found is not None:
            with contextlib.suppress(EquipoiseError):
                self._early = spare_bytes, self.cut(spare_bytes)

    def cut(self, spare_bytes: int) -> tuple[StagingBudget, PlanShares]:
        """Chunks for the memory that the rank has which has least, and this rank's shares."""
        if self._early is not None and self._early[0] == spare_bytes:
            return self._early[1]
        mover, sizes = self.mover, self._checked.table.expert_bytes
        budget = choose_budget(
            mover.plan, sizes, self._staging_bytes, spare_bytes, self._checked.device
        )
        shares = share_plan(
            mover.plan,
            self._group.rank,
            sizes,
            budget.buffer_bytes,
            in_place=self._communicator.lands_in_place,
            ends_small=budget.num_buffers > 1,
        )
        return budget, shares


def _move_all(
    mover: ChunkMover,
    budget: StagingBudget,
    shares: PlanShares,
    verify: Verify,
    on_commit: Callable[[IntArray], None] | None,
) -> int:
    """Move chunk after chunk, and say how many; some travel while one is committed."""
    rank, device = mover.group.rank, mover.rows[0][0].device
    if not shares:
        return 0
    pipeline = Pipeline(mover, shares, _make_staging(shares, budget.num_buffers, device))
    patience_s = find_busy_s(int(shares.busiest_bytes.max()), mover.group)
    with pipeline.open(patience_s):
        for number in range(len(shares)):
            share = pipeline.find_share(number)
            problem = _receive(pipeline, mover, number, verify)
            stands = mover.group.decide("abort" if problem else "commit")
            if stands == "commit":
                pipeline.fill()
                if on_commit is not None:
                    on_commit(share.layers)
            if problem is not None:
                raise problem
            if stands != "commit":
                raise TransferError(
                    f"rank {rank}: another rank gave up, so layers {share.layers.tolist()} stay "
                    "as they were",
                    rank=rank,
                )
    return len(shares)


def _make_staging(shares: PlanShares, num_buffers: int, device: torch.device) -> Tensor:
    """[buffers, bytes] uint8, each aligned."""
    most = -(-int(shares.num_bytes.max()) // _ALIGNMENT) * _ALIGNMENT
    return torch.empty(min(num_buffers, len(shares)), most, dtype=torch.uint8, device=device)


def _receive(
    pipeline: Pipeline, mover: ChunkMover, number: int, verify: Verify
) -> Exception | None:
    """Have a chunk staged, and hear how every rank fared with it; None if all are fine."""
    group, share = mover.group, pipeline.find_share(number)
    expected = group.expect(_FARED_WELL)
    try:
        problem = pipeline.receive()
    except BaseException:
        expected.exchange.abandon()
        raise
    try:
        fared = group.all_gather(
            _FARED_WELL if problem is None else _FARED_ILL,
            busy_s=find_busy_s(share.busiest_bytes, group),
            meanwhile=pipeline.look_ahead,
            expected=expected,
        )
        failed = [rank for rank, theirs in enumerate(fared) if bool(theirs)]
        if not failed and verify != "off":
            return mover.verify(share, pipeline.find_buffer(number), verify)
    except MembershipError as error:
        return problem or TransferError(str(error), rank=error.rank, peer=error.peer)
    if problem is None and failed:
        problem = TransferError(
            f"rank {group.rank}: the exchange failed on rank {failed[0]}, so layers "
            f"{share.layers.tolist()} stay as they were",
            rank=group.rank,
            peer=failed[0],
        )
    return problem


def find_busy_s(busiest_bytes: int, group: RankGroup) -> float:
    """Seconds that a peer may still be in its exchange when this rank has ended its own.

    Args:
        busiest_bytes: most that any rank sends and receives in it.
        group: of the ranks.
    Collective: none.
    """
    return 2 * group.timeout.total_seconds() + busiest_bytes / SLOWEST_BYTES_PER_S


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
    _check_sizes(placement, expert_weights, group)


def _check_sizes(placement: Placement, expert_weights: ExpertWeights, group: RankGroup) -> None:
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
    old: Placement, new: Placement, plan: TransferPlan, table: WeightTable
) -> dict[str, str]:
    if plan.old != old or plan.new != new:
        raise PlacementError("the plan is of other placements than the ones given")
    facts = (old.fingerprint(), new.fingerprint(), plan.fingerprint(), table.layout, "")
    return dict(zip(_FACTS, facts, strict=True))


def _sum_up(
    plan: TransferPlan, table: WeightTable, rank: int, num_chunks: int, seconds: float
) -> TransferStats:
    sizes = table.expert_bytes[plan.layer]
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
