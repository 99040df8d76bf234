"""Ranks as threads of one process, for what is the same in processes and takes long to import."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from equipoise.comm.groups import RankGroup, create_rank_group

TIMEOUT_S = 50.0
Result = TypeVar("Result")


class ThreadRanks:
    """Threads that run the same function, each with a group of its own that lasts.

    Args:
        size: how many ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._store = dist.HashStore()
        self.groups = self._run(self._meet)

    def __call__(self, body: Callable[[RankGroup], Result]) -> list[Result]:
        """Run `body` on every rank; raises what the first rank that failed raised."""
        return self._run(lambda rank: body(self.groups[rank]))

    def close(self) -> None:
        """Close the groups."""
        self(lambda group: group.close())

    def _meet(self, rank: int) -> RankGroup:
        return create_rank_group(
            self._store,
            rank,
            self.size,
            torch.device("cpu"),
            timeout=timedelta(seconds=TIMEOUT_S),
            device_group="gloo",
        )

    def _run(self, body: Callable[[int], Result]) -> list[Result]:
        results: dict[int, Result] = {}
        errors: dict[int, BaseException] = {}
        order: list[int] = []

        def run(rank: int) -> None:
            try:
                results[rank] = body(rank)
            except BaseException as error:
                errors[rank] = error
                order.append(rank)

        threads = [
            threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(self.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * TIMEOUT_S)
        if errors:
            raise errors[order[0]]
        assert len(results) == self.size, "a rank still runs at the deadline"
        return [results[rank] for rank in range(self.size)]
