"""One rebalance in the background: what a rank's worker does where the protocol says so."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from equipoise.balancer.accounting import Measure
from equipoise.balancer.events import CpuGpuEvent
from equipoise.balancer.halves import StagingHalves
from equipoise.balancer.handover import AsyncEplbLayerResult, Chunk, End, Handover
from equipoise.balancer.limits import NUM_HALVES, ChunkSize, Pace, StepTally, cut_plan
from equipoise.balancer.model_state import EplbModelState
from equipoise.balancer.orders import Order, choose_order
from equipoise.balancer.outcome import RebalanceOutcome
from equipoise.balancer.planning import plan_moves
from equipoise.balancer.protocol import ABORT, Answer, Do, Status, Worker
from equipoise.comm.byte_views import view_rows
from equipoise.comm.groups import RankGroup
from equipoise.comm.weight_table import WeightTable
from equipoise.config import EPLBConfig
from equipoise.errors import EquipoiseError, MembershipError, TransferError
from equipoise.placement import Placement, measure_balancedness, spread_load
from equipoise.plan.gate import MoveCosts
from equipoise.plan.transfer_plan import TransferPlan
from equipoise.policy.base import PlacementPolicy
from equipoise.topology import IntArray
from equipoise.transfer.agreement import agree
from equipoise.transfer.executor import find_busy_s
from equipoise.transfer.mover import ChunkMover
from equipoise.transfer.staging import ChunkShare, PlanShares

_MOST_CHUNKS = 1 << 20


@dataclass(frozen=True)
class Request:
    """What a forward thread asks its worker for, at the same step on every rank.

    Attributes:
        number: of the rebalance, counted from 1.
        step: the count of steps.
        loads: per model its window's load [L, E] int64; copies. None of a poll, which only asks
            whether any rank has an order, and moves nothing.
        ready: recorded once copies are made and every commit before them is over; waited for once.
        costs: what moves have cost this rank so far; zeros where none was made.
        measures: of a poll, what is to be summed beside.
    """

    number: int
    step: int
    loads: tuple[Tensor, ...]
    ready: CpuGpuEvent
    costs: MoveCosts
    is_poll: bool = False
    measures: tuple[Measure, ...] = ()


@dataclass(frozen=True, eq=False)
class _Part:
    """One model's plan.

    Attributes:
        model: whose.
        load: [L, E] int64, over all ranks.
        mover: carries the plan out.
        expert_bytes: [L] int64.
    """

    model: EplbModelState
    load: IntArray
    mover: ChunkMover
    expert_bytes: IntArray

    @property
    def plan(self) -> TransferPlan:
        return self.mover.plan


class _PartChunk(NamedTuple):
    """One chunk of a model's plan; this rank's share of it is worked out when it is asked for."""

    part: _Part
    shares: PlanShares
    number: int

    @property
    def share(self) -> ChunkShare:
        return self.shares[self.number]

    @property
    def busiest_bytes(self) -> int:
        return int(self.shares.busiest_bytes[self.number])


@dataclass
class _Half:
    """A staging buffer [bytes] uint8; lent from the offer to the forward thread's commit."""

    staging: Tensor
    freed: CpuGpuEvent
    lent: AsyncEplbLayerResult | None = None


class Rebalance:
    """Performs what the protocol asks of one rank's worker. Owner: the worker thread.

    Whatever goes wrong becomes an answer that the protocol knows; `problem` keeps the reason.
    `received_bytes` and `transfer_s` are this rank's.

    Args:
        request: of the forward thread.
        models: in the order of its loads; their placements stand still until the first commit.
        group: the workers'.
        config: balancing.
        policy: makes placements.
        handover: to the forward thread.
        pace: of all exchanges.
        staging: of all rebalances.
    """

    def __init__(
        self,
        request: Request,
        models: Sequence[EplbModelState],
        group: RankGroup,
        config: EPLBConfig,
        policy: PlacementPolicy,
        handover: Handover,
        pace: Pace,
        staging: StagingHalves,
    ) -> None:
        self.problem: Exception | None = None
        self._request = request
        self._models = models
        self._group = group
        self._config = config
        self._policy = policy
        self._handover = handover
        self._pace = pace
        self._staging = staging
        self._timeout_s = group.timeout.total_seconds()
        self._halves: list[_Half] = []
        self._chunks: list[_PartChunk] = []
        self._sizes: list[ChunkSize] = []
        self._tally = StepTally()
        # Models whose outcome was not told yet.
        self._parts: list[_Part] = []
        self._standing: dict[str, Placement] = {}
        self._staged: AsyncEplbLayerResult | None = None
        self._offered_at = 0
        self._costs: MoveCosts | None = None
        self._order = Order.NONE
        self.received_bytes = 0
        # This rank's, then the slowest rank's as of the last exchange of statuses.
        self._plan_s = self.transfer_s = 0.0
        self._slowest_s = (0.0, 0.0)

    def run(self, margin: int) -> Worker:
        """Carry the rebalance out, or find out why it cannot be.

        Args:
            margin: as in `Worker`.
        Returns:
            where the protocol ended.
        Collective: every rank's worker.
        """
        worker = Worker(margin)
        while worker.do is not Do.END:
            self._handover.begin(self._find_longest_s(worker))
            if worker.do is Do.COUNT and self._sizes:
                earliest = self._tally.find_earliest(self._sizes[worker.chunk], self._config)
                worker = replace(worker, earliest=earliest)
            worker = worker.after(self._perform(worker))
        self._handover.begin(math.inf)
        return worker

    def _find_longest_s(self, worker: Worker) -> float:
        """Seconds that an operation may take, each of its waits up to its deadline."""
        longest_s = 4 * self._timeout_s
        if worker.do in (Do.STAGE, Do.MEET) and self._chunks:
            longest_s += self._find_busy_s(worker.chunk)
        return longest_s

    def _find_busy_s(self, number: int) -> float:
        """Seconds that a peer may still be at staging a chunk when this rank is done with it."""
        return find_busy_s(self._chunks[number].busiest_bytes, self._group) + self._pace.span_s

    def _perform(self, worker: Worker) -> Answer:
        match worker.do:
            case Do.START:
                return self._exchange_statuses(self._start(), 0.0, self._handover.orders.first())
            case Do.PLAN:
                return self._plan()
            case Do.STAGE:
                return self._stage(worker.chunk)
            case Do.MEET:
                return self._meet(worker)
            case Do.OFFER:
                return self._offer(worker.chunk)
            case Do.COUNT:
                return self._gather([self._offered_at], 0.0)
            case Do.DECIDE:
                return self._decide(worker)
            case Do.SETTLE:
                self._settle(worker)
                return None
            case Do.END:
                raise AssertionError("nothing is left to do")

    def _start(self) -> Status:
        if (wanted := self._handover.wanted) is not Status.FINE:
            return wanted
        try:
            if not self._request.is_poll:
                self._request.ready.wait(self._timeout_s)
                self._handover.take_back()
        except Exception as error:
            return self._fail(error)
        return Status.FINE

    def _plan(self) -> int | None:
        started = time.perf_counter()
        try:
            totals = []
            for load in self._request.loads:
                total = load.to("cpu", torch.int64, copy=True)
                self._group.all_reduce(total)
                totals.append(np.asarray(total.numpy()))
            problem: Exception | None = None
            parts: list[_Part] = []
            try:
                parts = [
                    self._plan_model(model, load)
                    for model, load in zip(self._models, totals, strict=True)
                    if load.any()
                ]
                self._cut(parts)
                self._parts = parts
            except Exception as error:
                problem = error
            agree(self._group, self._collect_facts(parts), problem)
        except Exception as error:
            self._fail(error)
            return None
        self._plan_s = time.perf_counter() - started
        # A rebalance that moves nothing ends by a chunk too, so that all ranks know when.
        return max(1, len(self._chunks))

    def _plan_model(self, model: EplbModelState, load: IntArray) -> _Part:
        model.check_storage()
        standing = model.placement
        self._standing[model.name] = standing
        rows = [[view_rows(tensor) for tensor in layer] for layer in model.expert_weights]
        expert_bytes = model.expert_bytes
        plan = plan_moves(
            self._policy,
            load,
            standing,
            expert_bytes,
            self._config,
            self._costs,
            says=self._group.rank == 0,
        )
        mover = ChunkMover(plan, rows, model.communicator, self._group, WeightTable(rows))
        return _Part(model, load, mover, expert_bytes)

    def _cut(self, parts: Sequence[_Part]) -> None:
        most, rank = 0, self._group.rank
        for part in parts:
            shares, sizes = cut_plan(
                part.plan, rank, part.expert_bytes, self._config, self._group.device
            )
            self._chunks += [_PartChunk(part, shares, number) for number in range(len(shares))]
            self._sizes += sizes
            most = max(most, int(shares.num_bytes.max(initial=0)))
        if self._chunks:
            count = min(NUM_HALVES, len(self._chunks))
            self._halves = [
                _Half(half, CpuGpuEvent(self._group.device))
                for half in self._staging.take(most, count)
            ]

    def _collect_facts(self, parts: Sequence[_Part]) -> dict[str, str]:
        plans = {part.model.name: part.plan for part in parts}
        return {
            "number of steps": str(self._request.step),
            "models": repr([model.name for model in self._models]),
            "standing placements": repr([p.old.fingerprint() for p in plans.values()]),
            "plans": repr([(name, p.fingerprint()) for name, p in plans.items()]),
        }

    def _stage(self, number: int) -> Status:
        self._staged = None
        self._handover.enter(self._question(number))
        if not self._chunks:
            return self._handover.wanted
        part, share = self._chunks[number].part, self._chunks[number].share
        half = self._halves[number % NUM_HALVES]
        status = self._await_half(half)
        if status is not Status.FINE:
            # Peers may have begun it, and would wait for this rank until their deadline.
            part.mover.decline()
            return status
        self._pace.note(share.busiest_bytes)
        # Not counting the wait for the forward thread: that is serving, not moving; nor what the
        # pace asks for.
        started = time.perf_counter()
        try:
            part.mover.stage(share, half.staging)
            self._staged = self._prepare(part, share, half)
        except Exception as error:
            failed = self._fail(error)
            # Where all stop, it may be a peer that declined.
            return Status.STOPPED if self._handover.wanted is Status.STOPPED else failed
        self.transfer_s += time.perf_counter() - started
        self.received_bytes += share.remote_bytes
        return Status.FINE

    def _await_half(self, half: _Half) -> Status:
        """Wait until the forward thread has emptied it, and the pace allows an exchange."""
        try:
            if half.lent is not None:
                if not half.freed.wait(self._timeout_s):
                    return self._handover.wanted
                self._handover.take_back(half.lent)
        except Exception as error:
            return self._fail(error)
        half.lent = None
        return self._handover.rest(self._pace.wait_s)

    def _prepare(self, part: _Part, share: ChunkShare, half: _Half) -> AsyncEplbLayerResult:
        standing = self._standing[part.model.name]
        maps = part.model.prepare(standing, part.plan.new, share.layers.tolist())
        # One launch for slots and maps.
        beside = part.model.maps.list_copies(maps)
        copies = part.mover.prepare(share, half.staging, beside)
        result = AsyncEplbLayerResult(
            model=part.model,
            maps=maps,
            copies=copies,
            enqueue=copies.bind(),
            staging=half.staging,
            freed=half.freed,
        )
        if half.staging.is_cuda:
            # The forward thread's stream builds on it from here on.
            torch.cuda.current_stream(half.staging.device).synchronize()
        return result

    def _meet(self, worker: Worker) -> Sequence[int] | None:
        busy_s = self._find_busy_s(worker.chunk) if self._chunks else 0.0
        statuses = self._exchange_statuses(worker.status, busy_s)
        if self._config.verify == "off" or not self._chunks or statuses is None or any(statuses):
            return statuses
        chunk, half = self._chunks[worker.chunk], self._halves[worker.chunk % NUM_HALVES]
        try:
            damage = chunk.part.mover.verify(chunk.share, half.staging, self._config.verify)
        except Exception as error:
            self._fail(error)
            return None
        if damage is not None:
            self._fail(damage)
            return [Status.FAILED]
        return statuses

    def _exchange_statuses(
        self, mine: Status, busy_s: float, order: Order = Order.NONE
    ) -> Sequence[int] | None:
        costs = self._request.costs
        seconds = (self._plan_s, self.transfer_s, costs.byte_s, costs.layer_s)
        # Of numbers that are not negative, the largest has the largest bits.
        words = [mine, order, *torch.tensor(seconds, dtype=torch.float64).view(torch.int64)]
        told = self._gather([int(word) for word in words], busy_s)
        if told is None:
            return None
        by_rank = torch.tensor(told).view(self._group.size, len(words))
        statuses: list[int] = by_rank[:, 0].tolist()
        slowest = by_rank[:, 2:].amax(0).view(torch.float64).tolist()
        self._slowest_s = (slowest[0], slowest[1])
        self._costs = MoveCosts(*slowest[2:]) if any(slowest[2:]) else None
        if not any(statuses):
            self._take_order(by_rank[:, 1].tolist())
        failed = [rank for rank, status in enumerate(statuses) if status == Status.FAILED]
        if failed and self.problem is None:
            self._fail(
                TransferError(
                    f"rank {self._group.rank}: rebalancing failed on rank {failed[0]}: see the "
                    "error there",
                    rank=self._group.rank,
                    peer=failed[0],
                )
            )
        return statuses

    def _take_order(self, told: Sequence[int]) -> None:
        rank, order = choose_order(told)
        if order is not Order.NONE:
            self._order = order
            if rank == self._group.rank:
                self._handover.orders.take()

    def _gather(self, words: list[int], busy_s: float) -> list[int] | None:
        """Everybody's words, rank by rank; None if somebody's did not come."""
        try:
            heard = self._group.all_gather(torch.tensor(words), busy_s=busy_s)
        except EquipoiseError as error:
            self._fail(error)
            return None
        return torch.cat(heard).tolist()

    def _offer(self, number: int) -> int:
        is_last = number + 1 >= len(self._chunks)
        if self._staged is not None:
            self._halves[number % NUM_HALVES].lent = self._staged
        # A model of which nothing moves is done with whatever chunk is first.
        ahead = {id(chunk.part) for chunk in self._chunks[number + 1 :]}
        done = [part for part in self._parts if is_last or id(part) not in ahead]
        chunk = Chunk(
            self._question(number),
            self._staged,
            tuple(self._describe(part) for part in done),
            is_last=is_last and not self._request.is_poll,
            # With the last chunk: nothing is under way then.
            order=self._order if is_last else Order.NONE,
        )
        self._parts = [part for part in self._parts if part not in done]
        self._offered_at = self._handover.offer(self._request.number * _MOST_CHUNKS + number, chunk)
        return self._offered_at

    def _describe(self, part: _Part) -> RebalanceOutcome:
        plan, load = part.plan, part.load
        plan_s, transfer_s = self._slowest_s
        return RebalanceOutcome(
            model=part.model.name,
            planned_step=self._request.step,
            step=self._request.step,
            moves=plan.num_moves,
            local_moves=len(plan.write_slot) - plan.num_moves,
            moves_per_layer=plan.moves_per_layer,
            bytes=int(part.expert_bytes[plan.layer[~plan.is_local]].sum()),
            plan_s=plan_s,
            transfer_s=transfer_s,
            forward_s=0.0,
            balancedness_before=measure_balancedness(spread_load(load, plan.old)),
            balancedness_after=measure_balancedness(spread_load(load, plan.new)),
            placement=plan.new,
        )

    def _decide(self, worker: Worker) -> str | None:
        try:
            return self._group.decide(worker.word, self._question(worker.chunk))
        except MembershipError as error:
            self._fail(error)
            # Before the offer is withdrawn: the forward thread must not pass the step unknowing.
            self._handover.end(End(Status.FAILED, error, cut_off=True))
            return None

    def _settle(self, worker: Worker) -> None:
        if worker.word != ABORT and self._staged is not None:
            self._standing[self._staged.model.name] = self._staged.maps.placement
            self._tally = self._tally.add(self._sizes[worker.chunk], worker.word)
        self._handover.settle(worker.word)

    def _question(self, number: int) -> str:
        return f"rebalance {self._request.number}, chunk {number}"

    def _fail(self, error: Exception) -> Status:
        # The first is what the others follow from.
        self.problem = self.problem or error
        return Status.FAILED
