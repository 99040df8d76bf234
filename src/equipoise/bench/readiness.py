"""What it costs a step that ranks could recover from a death, when none dies."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # noqa: TID251

from equipoise.comm.groups import create_rank_group
from equipoise.elastic.channel import Channel
from equipoise.elastic.rank import Pulse
from equipoise.elastic.spec import ServiceSpec
from equipoise.models.families import read_model_shape

NUM_BEATS = 2000
NUM_ROUNDS, NUM_WAITS = 20, 200
WAITS_PER_LAYER = 3
"""Exchanges of a dispatch and its combine: splits, tokens there, tokens back."""


@dataclass(frozen=True)
class Readiness:
    """Each cost, timed by itself; a whole step is too unsteady to show any of them.

    Attributes:
        beat_s: CPU seconds of one sign of life, in a thread beside the forward thread's.
        deadline_s: by how much a wait between ranks takes longer because it has a deadline.
        num_waits: of a step.
        step_s: of one step, median.
    """

    beat_s: float
    deadline_s: float
    num_waits: int
    step_s: float

    @property
    def share(self) -> float:
        """Of a step's time, taking signs of life as if the forward thread gave them itself."""
        beats = self.beat_s * self.step_s / ServiceSpec.beat_s
        return (beats + self.num_waits * max(0.0, self.deadline_s)) / self.step_s


def measure_readiness(model: Path, step_s: float) -> Readiness:
    """Time what recovering needs of steps that nobody dies in. Host copies are none of it.

    Args:
        model: checkpoint directory of what was served.
        step_s: that a step of it took, median.
    Collective: none.
    """
    num_layers = read_model_shape(model).num_layers
    # And the meeting before the step.
    num_waits = WAITS_PER_LAYER * num_layers + 1
    return Readiness(_measure_beat_s(), _measure_deadline_s(), num_waits, step_s)


def _measure_beat_s() -> float:
    """Setting what it says after a step, making a frame of it and sending that."""
    left, right = socket.socketpair()
    sender, receiver = Channel(left), Channel(right)
    pulse = Pulse()
    reader = threading.Thread(target=_receive, args=(receiver, NUM_BEATS), daemon=True)
    reader.start()
    started = time.thread_time()
    for step in range(NUM_BEATS):
        pulse.set(steps=step, running=8, step_s=0.01)
        sender.send(pulse.read())
    seconds = time.thread_time() - started
    reader.join(ServiceSpec.silence_s)
    sender.close()
    receiver.close()
    return seconds / NUM_BEATS


def _receive(channel: Channel, count: int) -> None:
    for _ in range(count):
        channel.receive()


def _measure_deadline_s() -> float:
    """By alternating rounds of waits with and without, on a group of this process alone."""
    timeout = timedelta(seconds=ServiceSpec.timeout_s)
    cpu = torch.device("cpu")
    group = create_rank_group(HashStore(), 0, 1, cpu, timeout=timeout, device_group="gloo")
    into, rows = torch.zeros(1), torch.zeros(1)
    deadline = (timeout,)
    taken: dict[tuple[timedelta, ...], list[float]] = {(): [], deadline: []}
    try:
        for _ in range(NUM_ROUNDS):
            for arguments, seconds in taken.items():
                works = [
                    group.device_group.alltoall_base(into, rows, [], []) for _ in range(NUM_WAITS)
                ]
                started = time.perf_counter()
                for work in works:
                    work.wait(*arguments)
                seconds.append((time.perf_counter() - started) / NUM_WAITS)
    finally:
        group.close()
    middle = NUM_ROUNDS // 2
    without, with_one = (sorted(seconds)[middle] for seconds in (taken[()], taken[deadline]))
    return with_one - without
