"""Where a step's time goes while ranks wait for each other.

Axis letters: L layers, R ranks.
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

Mark = torch.cuda.Event | float
"""A moment: of the device's own time, or of the host's where that computes."""


class StepClock:
    """Marks, in the device's own time, what layers send, compute and bring home.

    Owner: the forward thread.

    Args:
        group: the ranks.
        dispatcher: of a model's one set of layers.
    """

    def __init__(self, group: RankGroup, dispatcher: TokenDispatcher) -> None:
        self._group, self._dispatcher = group, dispatcher
        self._marks: list[Mark] = []
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
        seconds = [*map(measure, self._marks[:-1], self._marks[1:]), 0.0]
        self._steps.append(torch.tensor(seconds, dtype=torch.float64).view(-1, _MARKS))
        self._marks.clear()

    def sum_up(self) -> StepParts:
        """The figures of all ranks.

        Collective: every rank of the group, each after as many steps.
        """
        # [R, steps, L, parts]
        parts = torch.stack(self._group.all_gather(torch.stack(self._steps)))
        dispatch_s, _, combine_s, between_s = parts.mean((0, 1)).sum(0).tolist()
        _, experts_scatter_s, _, between_scatter_s = parts.std(1).mean((0, 1)).tolist()
        experts = parts[..., 1]
        return StepParts(
            dispatch_s=dispatch_s,
            experts_s=tuple(experts.mean(1).sum(1).tolist()),
            slowest_experts_s=float(experts.amax(0).sum(1).mean()),
            combine_s=combine_s,
            between_s=between_s,
            experts_scatter_s=experts_scatter_s,
            between_scatter_s=between_scatter_s,
        )

    def _between_marks(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*given: Any) -> Any:
            self._marks.append(mark(self._group.device))
            result = call(*given)
            self._marks.append(mark(self._group.device))
            return result

        return marked


def mark(device: torch.device) -> Mark:
    """The moment at which what was asked of the device is done. Collective: none."""
    if device.type != "cuda":
        return time.perf_counter()
    reached = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    reached.record()
    return reached


def measure(before: Mark, after: Mark) -> float:
    """Seconds between two moments that have passed. Collective: none."""
    if isinstance(before, float) or isinstance(after, float):
        assert isinstance(before, float)
        assert isinstance(after, float)
        return after - before
    return float(before.elapsed_time(after)) / 1e3
