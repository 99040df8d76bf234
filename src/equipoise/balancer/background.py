"""The forward thread's side of rebalancing in the background."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from equipoise.balancer.accounting import Measure
from equipoise.balancer.handover import Chunk, End, Handover
from equipoise.balancer.model_state import EplbModelState
from equipoise.balancer.orders import Order
from equipoise.balancer.outcome import RebalanceOutcome
from equipoise.balancer.protocol import Status
from equipoise.balancer.rebalance import Request
from equipoise.balancer.worker import EplbWorker
from equipoise.comm.groups import RankGroup
from equipoise.config import EPLBConfig
from equipoise.errors import MembershipError, TransferError
from equipoise.plan.gate import MoveCosts
from equipoise.policy.base import PlacementPolicy

logger = logging.getLogger(__name__)

POLL_STEPS = 32
"""Steps between two polls of the workers for orders, while no rebalance is under way."""


class Background:
    """Starts rebalances, and commits what the worker has staged at the step agreed upon.

    Owner: the forward thread. It exchanges nothing with other ranks: that everybody starts at the
    same step, and drops the same triggers, follows from counts alone.

    Args:
        group: the workers' own; this closes it.
        config: balancing.
        policy: makes placements.
    """

    def __init__(self, group: RankGroup, config: EPLBConfig, policy: PlacementPolicy) -> None:
        self.group = group
        self.is_paused = False
        self._config = config
        self._policy = policy
        timeout_s = group.timeout.total_seconds()
        decide = group.decide
        # No method of this: what goes round in a circle stays until somebody collects garbage.
        self._handover = Handover(lambda asked, proposal: decide(proposal, asked), timeout_s)
        self._worker: EplbWorker | None = None
        self._models: tuple[EplbModelState, ...] = ()
        self._number = 0
        self._is_under_way = False
        # Asked for by orders, of which one step may follow several, and not begun yet.
        self._num_wanted = 0
        # By an order: none begins any more.
        self._is_stopped = False
        self._end: End | None = None
        # Of this thread, since the rebalance under way began.
        self._forward_s = 0.0
        # Of the last chunk, for each of its layers.
        self._layer_s = 0.0

    @property
    def has_started(self) -> bool:
        """Whether models can no longer be added."""
        return self._worker is not None

    @property
    def is_under_way(self) -> bool:
        """Whether a rebalance is; the same on every rank at the same step, unless it fails."""
        return self._is_under_way and self._end is None

    @property
    def failure(self) -> str | None:
        """Why balancing has ended, or None."""
        if self._end is None and self._is_stopped:
            return _explain(End(Status.STOPPED, None))
        return None if self._end is None else _explain(self._end)

    def start(self, models: Sequence[EplbModelState]) -> None:
        """Start the worker, with all models there are. Collective: none."""
        self._models = tuple(models)
        self._worker = EplbWorker(models, self.group, self._config, self._policy, self._handover)

    def close_step(self, step: int) -> tuple[RebalanceOutcome, ...]:
        """Commit what is due at this step.

        Args:
            step: the count, this one included.
        Returns:
            One outcome per model whose last layers were committed.
        Collective: none; every rank calls it equally often. It waits only where an answer of this
            rank's worker is overdue.
        Raises: TransferError if rebalancing has failed and that is to be raised: all that was
            decided is committed before. MembershipError if the store does not answer, so that
            nobody knows here what was decided, or if this rank could not commit before. What an
            `on_commit` raises.
        """
        if self._end is not None and self._end.cut_off:
            raise MembershipError(_explain(self._end), rank=self.group.rank) from self._end.problem
        outcomes: list[RebalanceOutcome] = []
        for chunk in self._handover.close_step():
            outcomes += self._commit(chunk, step)
        ended = self._handover.ended
        is_news = self._end is None or (ended is not None and ended.cut_off)
        if ended is not None and is_news:
            outcomes += self._take_end(ended, step)
        if self._end is not None:
            self._handover.let_go()
        return tuple(outcomes)

    @property
    def may_begin(self) -> bool:
        """Whether a rebalance would be started; the same on every rank at the same step."""
        has_ended = self._is_stopped or self._end is not None
        return not (self._is_under_way or has_ended) and bool(self._models)

    def take_wanted(self) -> bool:
        """Whether an order asks for a rebalance that may begin now; it is forgotten then."""
        is_wanted = self._num_wanted > 0 and self.may_begin
        self._num_wanted -= is_wanted
        return is_wanted

    def take_measured(self) -> list[RebalanceOutcome]:
        """Outcomes whose effect was measured since the last call. Collective: none."""
        return self._handover.take_measured()

    def trigger(self, step: int) -> bool:
        """Start a rebalance from the windows' load, unless one is under way.

        Args:
            step: the count.
        Returns:
            Whether one was started; the same on every rank.
        Collective: every rank at the same step; exchanges nothing.
        """
        if not self.may_begin:
            return False
        assert self._worker is not None, "the first step starts it"
        self._number += 1
        self._is_under_way = True
        self._forward_s = 0.0
        loads = tuple(model.window.sum() for model in self._models)
        ready = self._worker.take_event()
        ready.record()
        costs = MoveCosts(self._handover.byte_s, self._layer_s)
        self._worker.ask(Request(self._number, step, loads, ready, costs))
        return True

    def poll(self, step: int, measures: tuple[Measure, ...]) -> None:
        """Have the workers look for orders, at certain steps, and sum what is to be measured.

        Not while a rebalance is under way: it takes orders too.

        Args:
            step: the count.
            measures: none unless one `may_begin`.
        Collective: every rank at the same step; exchanges nothing.
        """
        if not self.may_begin or (step % POLL_STEPS and not measures):
            return
        assert self._worker is not None, "the first step starts it"
        self._number += 1
        ready = self._worker.take_event()
        ready.record()
        costs = MoveCosts(0.0, 0.0)
        self._worker.ask(Request(self._number, step, (), ready, costs, True, measures))

    def order(self, order: Order) -> None:
        """Have all ranks follow an order, at a step that their workers settle.

        Collective: none; any thread of any one rank.
        """
        self._handover.orders.put(order)

    def close(self, wait_s: float | None = None) -> bool:
        """Stop the worker, from whatever it is doing, and let its group go; twice is fine.

        Args:
            wait_s: longest wait for this rank's worker; None for the timeout.
        Returns:
            Whether the worker has ended. If not, it uses its communicators up to a deadline of
            its own.
        Collective: every rank, at the same step.
        Raises: MembershipError if a chunk is on offer and the store does not say what stands.
        """
        longest_s = self.group.timeout.total_seconds() if wait_s is None else wait_s
        has_ended = self._worker is None or self._worker.stop(longest_s)
        if self._end is None or self._end.status is Status.STOPPED:
            self._end = self._handover.ended or End(Status.STOPPED, None)
        try:
            if not self._end.cut_off:
                # Decided while this rank was on its way here; the others commit it too.
                for chunk in self._handover.take_all():
                    self._commit(chunk, 0)
        finally:
            self._handover.let_go()
            self.group.close()
        return has_ended

    def _commit(self, chunk: Chunk, step: int) -> list[RebalanceOutcome]:
        started = time.perf_counter()
        result = chunk.result
        if result is not None:
            try:
                result.commit()
            except BaseException as error:
                # The others have committed it, so this rank serves no more with them.
                problem = error if isinstance(error, Exception) else RuntimeError(repr(error))
                self._end = End(Status.FAILED, problem, cut_off=True)
                self._handover.fail(self._end)
                raise
            num_layers = len(result.maps.index)
            self._layer_s = (time.perf_counter() - started) / max(1, num_layers)
        self._forward_s += time.perf_counter() - started
        if chunk.is_last:
            self._is_under_way = False
        self._follow(chunk.order, step)
        return [
            replace(outcome, step=step, forward_s=self._forward_s) for outcome in chunk.outcomes
        ]

    def _follow(self, order: Order, step: int) -> None:
        match order:
            case Order.REARRANGE:
                self._num_wanted += 1
            case Order.PAUSE:
                self.is_paused = True
            case Order.RESUME:
                self.is_paused = False
            case Order.STOP:
                # The worker is not told: it would tell ranks that are not at this step yet.
                self._is_stopped = True
                logger.info("step %d: balancing has stopped, as a rank asked for", step)
            case Order.NONE:
                pass

    def _take_end(self, end: End, step: int) -> list[RebalanceOutcome]:
        """Raise, or go on without balancing.

        A chunk that was decided is committed by all ranks; here at once, if no step follows.
        """
        self._end = end
        if end.status is Status.STOPPED:
            logger.info("step %d: balancing has stopped, as a rank asked for", step)
            return []
        if self._config.on_failure == "disable" and not end.cut_off:
            logger.error("step %d: balancing is off from here on: %s", step, _explain(end))
            return []
        if end.cut_off:
            raise MembershipError(_explain(end), rank=self.group.rank) from end.problem
        for chunk in self._handover.take_all():
            self._commit(chunk, step)
        peer = getattr(end.problem, "peer", None)
        raise TransferError(_explain(end), rank=self.group.rank, peer=peer) from end.problem


def _explain(end: End) -> str:
    if end.status is Status.STOPPED:
        return "a rank has stopped it"
    return str(end.problem) or repr(end.problem)
