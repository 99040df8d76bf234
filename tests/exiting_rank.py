"""A rank whose process simply ends while its experts are balanced in the background, for tests.

python -m tests.exiting_rank STATE RANK FOLDER
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from equipoise.balancer.handover import Handover
from tests.background import A_LAYER_AT_A_TIME, ServingInBackground
from tests.ranks import Rank
from tests.test_balancer import NUM_LAYERS, skew

NUM_RANKS = 2
LONGEST_S = 60.0
STATES = (
    "not begun",
    "at rest",
    "planning",
    "at an exchange",
    "waiting for a step",
    "failed",
    "closed",
)


def bring_to(state: str, serving: ServingInBackground, rank: int) -> None:
    """Return once the worker is there, and stays."""
    reached, never = threading.Event(), threading.Event()

    def hang(*_: Any, **__: Any) -> None:
        reached.set()
        never.wait()

    if state == "not begun":
        return
    if state == "planning":
        serving.state.policy.place = hang  # type: ignore[method-assign, assignment]
    if state == "at an exchange":
        finish = serving.communicator.finish
        come: Callable[[], None] = lambda: (reached.set(), finish())[1]  # noqa: E731
        # The other has come, and waits for this one.
        serving.communicator.finish = hang if rank else come  # type: ignore[method-assign]
    if state == "waiting for a step":
        enter, calls = Handover.enter, itertools.count(1)

        def count(handover: Handover, question: str) -> None:
            enter(handover, question)
            if next(calls) == NUM_LAYERS:
                reached.set()

        Handover.enter = count  # type: ignore[method-assign]
    if state == "failed":
        serving.state.policy.place = None  # type: ignore[method-assign, assignment]
    serving.step(skew(5))
    serving.state.rearrange()
    if state == "closed":
        serving.state.close()
    elif state == "failed":
        deadline = time.monotonic() + LONGEST_S
        while serving.state.stats().failure is None:
            assert time.monotonic() < deadline
            serving.step_alone(skew(5))
    elif state != "at rest":
        assert reached.wait(LONGEST_S)
    else:
        serving.step_until_done(skew(5))


def main(state: str, number: int, folder: Path) -> None:
    rank = Rank(number, NUM_RANKS, dist.FileStore(str(folder / "store"), NUM_RANKS), folder)
    serving = ServingInBackground(
        rank.make_group(timeout_s=LONGEST_S),
        step_interval=1000,
        staging_bytes=A_LAYER_AT_A_TIME,
        on_failure="disable",
    )
    serving.add()
    bring_to(state, serving, number)
    print(f"rank {number} is {state}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
