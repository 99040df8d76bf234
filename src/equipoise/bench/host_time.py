"""What a rank's processor does for a rearrangement, with the wire left out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

import numpy as np
import torch

from equipoise.bench.outcome import Row, with_goal
from equipoise.comm.byte_views import view_rows
from equipoise.comm.groups import RankGroup
from equipoise.comm.nixl.pool import plan_offers
from equipoise.comm.parcels import Inbox, Outbox, find_spans
from equipoise.comm.queued import Queued, QueuedCommunicator
from equipoise.comm.spans import Regions, Spans
from equipoise.comm.weight_table import WeightTable
from equipoise.placement import Placement, place_in_order
from equipoise.plan.transfer_plan import make_plan
from equipoise.topology import Topology
from equipoise.transfer.mover import ChunkMover
from equipoise.transfer.staging import share_plan

GOAL_S = 0.02
"""Most that planning and issuing may take of one rank's processor."""

_NUM_LAYERS, _NUM_RANKS, _SLOTS_PER_RANK, _NUM_EXPERTS = 58, 32, 9, 256
_ROW_BYTES = 64
_NUM_ROUNDS = 9
_REGISTERED = Regions(Spans.of(()))


class _Unsent(QueuedCommunicator[Queued]):
    """Does all that NIXL's wire does before it would post a READ, and posts none."""

    name: ClassVar[str] = "unsent"
    num_ahead = 1

    def _begin(self, number: int, outbox: Outbox, inbox: Inbox) -> Queued:
        self._announce(number, outbox, inbox)
        for peer in self._peers:
            plan_offers(outbox.get(peer, []), _REGISTERED, 1 << 20)
            find_spans(inbox.get(peer, []))
        return Queued(number, outbox, inbox)

    def _end(self, flight: Queued) -> None:
        """Nothing was sent."""

    def _release(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class _Seat:
    """As much of a group as a mover asks for."""

    rank: int


def measure_host_time(seed: int) -> Row:
    """Plan and issue a rearrangement of DeepSeek-V3's size on one rank.

    Of 58 layers x 288 slots on 32 ranks every slot gets an expert anew: the plan, this rank's share
    of it, and for each chunk what is queued, announced, offered and copied.

    Args:
        seed: of the placements.
    Returns:
        A row with the median of the rounds.
    Collective: none.
    """
    topology = Topology(_NUM_RANKS, _SLOTS_PER_RANK)
    rng = np.random.default_rng(seed)
    old = place_in_order(_NUM_LAYERS, _NUM_EXPERTS, topology)
    dealt = rng.permuted(old.slot_to_expert, axis=1)
    new = Placement(dealt, _NUM_EXPERTS, topology)
    weights = [
        [torch.zeros(_SLOTS_PER_RANK, _ROW_BYTES, dtype=torch.uint8) for _ in range(2)]
        for _ in range(_NUM_LAYERS)
    ]
    rows = [[view_rows(tensor) for tensor in layer] for layer in weights]
    wire = _Unsent(0, _NUM_RANKS, weights, 1.0)
    seconds = []
    for _ in range(_NUM_ROUNDS + 1):
        started = time.perf_counter()
        plan = make_plan(old, new)
        table = WeightTable(rows)
        sizes = table.expert_bytes
        budget = 8 * _SLOTS_PER_RANK * int(sizes[0])
        shares = share_plan(plan, 0, sizes, budget)
        seat: RankGroup = _Seat(0)  # type: ignore[assignment]
        mover = ChunkMover(plan, rows, wire, seat, table)
        staging = torch.empty(int(shares.num_bytes.max()), dtype=torch.uint8)
        for share in shares:
            mover.start(mover.find_moves(share, staging))
            mover.prepare_own(share, staging)
            mover.prepare(share, staging)
            wire.finish()
        seconds.append(time.perf_counter() - started)
    row: Row = {
        "case": f"{_NUM_LAYERS} layers x {topology.num_slots} slots, {_NUM_RANKS} ranks",
        "backend": "processor alone",
        "num_chunks": len(shares),
        "seconds": median(seconds[1:]),
    }
    return with_goal(row, "seconds", GOAL_S, at_most=True)
