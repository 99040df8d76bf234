"""Where a step's time goes while ranks wait for each other.

Axis letters: L layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from equipoise.bench.step_case import StepParts
from equipoise.comm.groups import RankGroup
from equipoise.dispatch.base import TokenDispatcher

_MARKS = 4
"""Of a layer: before and behind dispatch, before and behind combine."""


class StepClock:
    """Marks, in the device's own time, what layers send, compute and bring home.

    Owner: the forward thread.

    Args:
        group: the ranks.
        dispatcher: of a model's one set of layers.
    """

    def __init__(self, group: RankGroup, dispatcher: TokenDispatcher) -> None:
        self._group, self._dispatcher = group, dispatcher
        self._marks: list[torch.cuda.Event | float] = []
        self._steps: list[Tensor] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """One step, without graphs. Collective: none; waits for the device."""
        own, dispatcher = vars(self._dispatcher), self._dispatcher
        own["dispatch"] = self._between_marks(dispatcher.dispatch)
        own["combine"] = self._between_marks(dispatcher.combine)
        try:
            yield
        finally:
            del own["dispatch"], own["combine"]
        if self._group.device.type == "cuda":
            torch.cuda.synchronize(self._group.device)
        # Behind the last layer nothing is marked.
        seconds = [*map(_measure, self._marks[:-1], self._marks[1:]), 0.0]
        self._steps.append(torch.tensor(seconds, dtype=torch.float64).view(-1, _MARKS))
        self._marks.clear()

    def sum_up(self) -> StepParts:
        """The figures of all ranks.

        Collective: every rank of the group, each after as many steps.
        """
        # [steps, L, parts]
        most = torch.stack(self._steps)
        mean = most / self._group.size
        own = most[:, :, 1].sum(1).mean()
        experts_s = tuple(float(one) for one in self._group.all_gather(own))
        self._group.all_reduce(most, "max")
        self._group.all_reduce(mean)
        dispatch_s, _, combine_s, between_s = mean.sum(1).mean(0).tolist()
        slowest_s = float(most[:, :, 1].sum(1).mean())
        return StepParts(dispatch_s, experts_s, slowest_s, combine_s, between_s)

    def _between_marks(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*given: Any) -> Any:
            self._mark()
            result = call(*given)
            self._mark()
            return result

        return marked

    def _mark(self) -> None:
        if self._group.device.type == "cuda":
            reached = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            reached.record()
            self._marks.append(reached)
        else:
            self._marks.append(time.perf_counter())


def _measure(before: torch.cuda.Event | float, after: torch.cuda.Event | float) -> float:
    """Seconds."""
    if isinstance(before, float) or isinstance(after, float):
        assert isinstance(before, float)
        assert isinstance(after, float)
        return after - before
    return float(before.elapsed_time(after)) / 1e3
