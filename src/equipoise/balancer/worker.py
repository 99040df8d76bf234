"""The thread in which a rank's rebalances run."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Sequence

import torch

from equipoise.balancer.handover import MARGIN_STEPS, End, Handover
from equipoise.balancer.limits import Pace
from equipoise.balancer.model_state import EplbModelState
from equipoise.balancer.protocol import Status
from equipoise.balancer.rebalance import Rebalance, Request
from equipoise.comm.groups import RankGroup
from equipoise.config import EPLBConfig
from equipoise.policy.base import PlacementPolicy


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
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="equipoise-worker", daemon=True)
        self._thread.start()

    def ask(self, request: Request) -> None:
        """Have it rebalance. Collective: every rank, at the same step, none under way."""
        self._requests.put(request)

    def stop(self, timeout_s: float) -> bool:
        """End it, from whatever it is doing.

        Args:
            timeout_s: longest wait for the end.
        Returns:
            Whether it has ended; if not, it will when a wait of its own reaches its deadline.
        Collective: none; a rebalance under way is given up by all ranks.
        """
        self._handover.stop()
        self._requests.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with self._own_stream():
                while (request := self._requests.get()) is not None:
                    end = self._rebalance(request)
                    if end is not None:
                        self._handover.end(end)
                        return
        except BaseException as error:
            # Nobody else would hear of it.
            problem = error if isinstance(error, Exception) else RuntimeError(repr(error))
            self._handover.end(End(Status.FAILED, problem))
            raise

    def _rebalance(self, request: Request) -> End | None:
        rebalance = Rebalance(
            request,
            self._models,
            self._group,
            self._config,
            self._policy,
            self._handover,
            self._pace,
        )
        worker = rebalance.run(MARGIN_STEPS)
        if rebalance.received_bytes:
            self._handover.note_byte_s(rebalance.transfer_s / rebalance.received_bytes)
        if worker.status is Status.FINE:
            return None
        return End(worker.status, rebalance.problem)

    def _own_stream(self) -> contextlib.AbstractContextManager[object]:
        device = self._group.device
        if device.type != "cuda":
            return contextlib.nullcontext()
        torch.cuda.set_device(device)
        return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
