"""The next generation of one rank, built beside the one that serves."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.distributed_c10d import Store

from equipoise.config import EPLBConfig
from equipoise.elastic.membership import MembershipPlan
from equipoise.elastic.verdict import Word
from equipoise.models.parallel import ParallelModel

State = Literal["preparing", "ready", "decided", "aborted"]
"""`decided` once the next generation takes over, `aborted` once it is sure that it does not."""


@dataclass(frozen=True)
class Home:
    """What of a rank outlives generations.

    Attributes:
        name: of the rank.
        store: a client of the controller's store; generations take clients of their own.
        device: where its weights are.
        config: balancing; the same on every rank.
        timeout: longest wait for another rank once a generation serves.
        model: directory of the checkpoint; of a newcomer only headers are read.
        dtype: of the weights; None for that of the configuration.
        attention: transformers' attention implementation; None lets it choose.
        device_group: what tokens travel over.
    """

    name: str
    store: Store
    device: torch.device
    config: EPLBConfig
    timeout: timedelta
    model: Path
    dtype: torch.dtype | None = None
    attention: str | None = None
    device_group: Literal["gloo", "nccl"] = "gloo"


class NextGeneration:
    """Builds a rank's part of the next generation in a thread, while the forward thread serves.

    The forward thread tells `word` in every meeting before a step, gives what it heard to
    `verdict.settle`, and at SWITCH calls `switch`; at ABORT it forgets this. A newcomer, and ranks
    of a recovery, have no steps to serve: they `wait` until it is decided, and switch at once.

    Args:
        plan: the same on every participant.
        home: of this rank.
        serving: what this rank serves; None of a newcomer. It begins no rebalance from before this
            is made until the change has ended (`pause`, and not `is_rebalancing`).
    Collective: none here; its thread meets those of all participants.
    """

    def __init__(self, plan: MembershipPlan, home: Home, serving: ParallelModel | None) -> None:
        raise NotImplementedError

    @property
    def state(self) -> State:
        """How far it is; any thread may ask."""
        raise NotImplementedError

    @property
    def reason(self) -> str:
        """Why it was aborted, in one line; empty before."""
        raise NotImplementedError

    @property
    def word(self) -> Word:
        """What to tell in the meeting before the next step."""
        raise NotImplementedError

    def wait(self, timeout_s: float) -> State:
        """Wait until it is decided or aborted, or the time is over."""
        raise NotImplementedError

    def abort(self, reason: str) -> None:
        """Call it off, unless it is decided already; returns at once. Any thread."""
        raise NotImplementedError

    def switch(self) -> ParallelModel | None:
        """Forward thread, at a step boundary: serve in the next generation from here on.

        What it retires is closed in the background.

        Returns:
            The next generation's model, whose steps count from 0; None of a leaver.
        Collective: every participant.
        """
        raise NotImplementedError
