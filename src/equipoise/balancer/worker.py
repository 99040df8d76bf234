"""The thread in which a rank's rebalances run."""

from __future__ import annotations

import atexit
import contextlib
import math
import queue
import sys
import threading
from collections.abc import Sequence

import torch

from equipoise.balancer.accounting import Measure, sum_measures
from equipoise.balancer.events import CpuGpuEvent
from equipoise.balancer.halves import StagingHalves
from equipoise.balancer.handover import MARGIN_STEPS, End, Handover
from equipoise.balancer.limits import Pace
from equipoise.balancer.model_state import EplbModelState
from equipoise.balancer.protocol import Status
from equipoise.balancer.rebalance import Rebalance, Request
from equipoise.comm.groups import RankGroup
from equipoise.config import EPLBConfig
from equipoise.errors import EquipoiseError
from equipoise.policy.base import PlacementPolicy

SWITCH_S = 1e-4
"""On a GPU: how long the interpreter may be another thread's before a forward thread that wants to
launch gets it. By default it is 5 ms, the better part of a step."""

GRACE_S = 1.0
"""How long a worker that is stopped may be at an exchange, before that is given up."""

EXIT_S = 2.0
"""How long a process that ends lets its worker stop, before that is cut off: the interpreter aborts
where a thread comes back from a library later."""


class EplbWorker:
    """Plans, and stages experts, while the forward pass runs.

    One thread, with a stream of its own on a CUDA device. It takes requests one by one, and ends
    when it is stopped or a rebalance does not end well. The forward thread makes every call.

    Args:
        models: under balance; none is added any more.
        group: the workers' own.
        config: balancing.
        policy: makes placements.
        handover: to the forward thread.
    """

    def __init__(
        self,
        models: Sequence[EplbModelState],
        group: RankGroup,
        config: EPLBConfig,
        policy: PlacementPolicy,
        handover: Handover,
    ) -> None:
        self._models = tuple(models)
        self._group = group
        self._config = config
        self._policy = policy
        self._handover = handover
        self._pace = Pace(config.max_bytes_per_s)
        # None ends it. The queue orders all that the forward thread wrote before a request.
        self._lock = threading.Lock()
        # Number of the last request, and of the last poll that another has answered too.
        self._newest = 0
        self._answered = 0
        # Of polls that need no answer of their own; the same on every rank.
        self._measures: list[Measure] = []
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        # That requests came with, waited for: to make one takes longer than to record it.
        self._events: queue.SimpleQueue[CpuGpuEvent] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="equipoise-worker", daemon=True)
        self._thread.start()
        atexit.register(self.stop, EXIT_S)

    def take_event(self) -> CpuGpuEvent:
        """An event for a request, not recorded yet. Collective: none."""
        try:
            return self._events.get_nowait()
        except queue.Empty:
            return CpuGpuEvent(self._group.device)

    def ask(self, request: Request) -> None:
        """Have it rebalance, or poll. Collective: every rank, at the same step."""
        with self._lock:
            self._newest = request.number
        self._requests.put(request)

    def stop(self, timeout_s: float) -> bool:
        """End it, from whatever it is doing.

        Args:
            timeout_s: longest wait for the end, before the workers' connections are closed.
        Returns:
            Whether it has ended; if not, it will when a wait of its own reaches its deadline.
        Collective: none; a rebalance under way is given up by all ranks.
        """
        self._handover.stop()
        self._requests.put(None)
        self._thread.join(min(GRACE_S, timeout_s))
        if self._thread.is_alive():
            # It may wait for a peer that has given up before the exchange began.
            for model in self._models:
                model.communicator.interrupt()
            self._thread.join(timeout_s - min(GRACE_S, timeout_s))
        if self._thread.is_alive():
            # No wire can keep it any more.
            self._group.cut_off()
            self._thread.join(GRACE_S)
        has_ended = not self._thread.is_alive()
        if has_ended:
            atexit.unregister(self.stop)
        return has_ended

    def _run(self) -> None:
        try:
            with self._own_stream(), self._make_staging() as self._staging:
                while (request := self._requests.get()) is not None:
                    self._handover.begin(4 * self._group.timeout.total_seconds())
                    end = self._poll(request) if request.is_poll else self._rebalance(request)
                    self._handover.begin(math.inf)
                    if end is not None:
                        self._handover.end(end)
                        return
                    self._events.put(request.ready)
        except BaseException as error:
            # Nobody else would hear of it.
            problem = error if isinstance(error, Exception) else RuntimeError(repr(error))
            self._handover.end(End(Status.FAILED, problem))
            raise

    def _poll(self, request: Request) -> End | None:
        """Ask whether any rank has an order, and if so, settle the step at which all follow it.

        What this rank has been asked for beyond this poll is told too: polls that all ranks wait
        with are answered by this one, so that none pile up where steps are short.
        """
        try:
            request.ready.wait(self._group.timeout.total_seconds())
            return self._answer(request)
        except (EquipoiseError, TimeoutError) as error:
            return End(Status.FAILED, error)

    def _answer(self, request: Request) -> End | None:
        self._measures += request.measures
        if request.number <= self._answered:
            return None
        with self._lock:
            newest = self._newest
        words = [self._handover.wanted, self._handover.orders.first(), newest]
        told = torch.stack(self._group.all_gather(torch.tensor([int(word) for word in words])))
        worst = Status(int(told[:, 0].max()))
        if worst is not Status.FINE:
            return End(worst, RuntimeError("another rank gave up") if worst > 1 else None)
        self._answered = int(told[:, 2].min())
        says = self._group.rank == 0
        self._handover.note_measured(
            sum_measures(self._measures, self._group.all_reduce, says=says)
        )
        self._measures = []
        return self._rebalance(request) if told[:, 1].any() else None

    def _rebalance(self, request: Request) -> End | None:
        rebalance = Rebalance(
            request,
            () if request.is_poll else self._models,
            self._group,
            self._config,
            self._policy,
            self._handover,
            self._pace,
            self._staging,
        )
        worker = rebalance.run(MARGIN_STEPS)
        if rebalance.received_bytes:
            self._handover.note_byte_s(rebalance.transfer_s / rebalance.received_bytes)
        if worker.status is Status.FINE:
            return None
        return End(worker.status, rebalance.problem)

    def _make_staging(self) -> StagingHalves:
        communicators = [model.communicator for model in self._models]
        return StagingHalves(communicators, self._group.device)

    def _own_stream(self) -> contextlib.AbstractContextManager[object]:
        device = self._group.device
        if device.type != "cuda":
            return contextlib.nullcontext()
        torch.cuda.set_device(device)
        # For good: it is the process's, and somebody else may count on what was set meanwhile.
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
