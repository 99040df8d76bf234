"""What is measured when rebalances run beside steps, and what is heard of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

import numpy as np

from equipoise.bench.option_checks import check_least, check_positive
from equipoise.errors import ConfigError
from equipoise.topology import FloatArray

BLOCK_STEPS = 50
HIDDEN_SIZE = 2048
"""Of tokens on GPUs. An expert is three matrices of it, in two bytes a number."""
EXPERT_MULTIPLE = 3 * 2 * HIDDEN_SIZE * 8


@dataclass(frozen=True)
class StallSpec:
    """What is measured; the same on every rank.

    Attributes:
        device: kind of device that the steps compute on.
        num_ranks: R, processes.
        num_layers: L.
        slots_per_rank: S; one of each rank is redundant.
        expert_bytes: of one expert of one layer; on GPUs a multiple of EXPERT_MULTIPLE.
        step_ms: what a step computes at least, on an idle machine.
        launch: how GPUs get a step: as one captured graph, or kernel by kernel.
        num_steps: of each kind, with rebalances and without.
        communicator: the wire.
        policy: makes placements.
        max_bytes_per_s: as in `EPLBConfig`; None for no bound.
        max_bytes_per_step: the same.
        max_layers_per_step: the same.
        seed: of the load.
        timeout_s: longest wait for another rank.
    Raises: ConfigError.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    num_ranks: int = 2
    num_layers: int = 58
    slots_per_rank: int = 9
    expert_bytes: int = 65_536
    step_ms: float = 15.0
    launch: Literal["graph", "eager"] = "graph"
    num_steps: int = 1000
    communicator: str = "auto"
    # It plans from nothing, so that every rebalance moves half of all experts.
    policy: str = "deepseek"
    max_bytes_per_s: int | None = None
    max_bytes_per_step: int | None = None
    max_layers_per_step: int | None = None
    seed: int = 0
    timeout_s: float = 60.0

    @classmethod
    def on_gpus(cls) -> Self:
        """The case that has goals: 58 layers of 128 experts of Qwen3-30B-A3B, over two GPUs.

        Planned as by default. Loads change their experts' names between plans, as no real load
        does.
        """
        return cls(
            device="cuda",
            slots_per_rank=65,
            expert_bytes=9_437_184,
            step_ms=12.0,
            num_steps=2000,
            communicator="nixl",
            policy="flow",
        )

    def __post_init__(self) -> None:
        check_least(
            ("--ranks", self.num_ranks, 2),
            ("--layers", self.num_layers, 1),
            ("--slots", self.slots_per_rank, 2),
            ("--expert-bytes", self.expert_bytes, 1),
            ("--steps", self.num_steps, BLOCK_STEPS),
            ("--seed", self.seed, 0),
        )
        check_positive(("--step-ms", self.step_ms), ("--timeout", self.timeout_s))
        if self.device == "cuda" and self.expert_bytes % EXPERT_MULTIPLE:
            raise ConfigError(
                f"--expert-bytes must be a multiple of {EXPERT_MULTIPLE} on GPUs, where experts "
                f"are multiplied with tokens, got {self.expert_bytes}"
            )

    @property
    def num_experts(self) -> int:
        """E, of each layer."""
        return self.num_ranks * (self.slots_per_rank - 1)


class StepParts(NamedTuple):
    """Where one step's time went, on one rank; seconds but for the last.

    Attributes:
        step_s: all of it.
        began_s: when, on the clock that all processes of a machine share.
        launch_s: until the forward pass was computed, or on GPUs enqueued.
        launch_cpu_s: of these on a processor; the rest went into waits, for the interpreter too.
        balancer_s: inside `EplbState`.
        balancer_cpu_s: of these on a processor.
        finish_s: until the device was done, or the other ranks.
        device_s: from the first kernel to the last on GPUs.
        worker_cpu_s: that the worker was on a processor meanwhile.
        num_layers: committed in this step.
    """

    step_s: float
    began_s: float
    launch_s: float
    launch_cpu_s: float
    balancer_s: float
    balancer_cpu_s: float
    finish_s: float
    device_s: float
    worker_cpu_s: float
    num_layers: float


@dataclass(frozen=True)
class Stall:
    """What one run measured.

    Attributes:
        without: [R, steps, parts] float64, steps without rebalances, as `StepParts`.
        during: the same while rebalances run back to back.
        exchanges: calls by which a forward thread met other ranks inside `EplbState`, over all
            ranks.
        rebalances: that ended.
        layers: that were committed on this rank.
        moves: experts that a rank received.
        moved_bytes: that travelled between ranks.
        transfer_s: seconds of moving, on the slowest rank of each rebalance.
        plan_s: seconds of planning, likewise.
        steps_of_rebalance: mean steps from plan to last commit.
        communicator: the wire, and why.
        device: what it ran on.
    """

    without: FloatArray
    during: FloatArray
    exchanges: int
    rebalances: int
    layers: int
    moves: int
    moved_bytes: int
    transfer_s: float
    plan_s: float
    steps_of_rebalance: float
    communicator: str
    device: str


@dataclass
class Tally:
    """Sums of one rank."""

    without: list[StepParts] = field(default_factory=list)
    during: list[StepParts] = field(default_factory=list)
    exchanges: int = 0
    rebalances: int = 0
    layers: int = 0
    moves: int = 0
    moved_bytes: int = 0
    transfer_s: float = 0.0
    plan_s: float = 0.0
    steps_of_rebalances: int = 0


def find_times(parts: FloatArray) -> FloatArray:
    """[steps] float64, seconds of each step.

    Ranks are in lockstep, so it is from when the last one began until the last one was done.

    Args:
        parts: [R, steps, parts] float64.
    """
    began = parts[:, :, StepParts._fields.index("began_s")]
    times: FloatArray = (began + parts[:, :, 0]).max(axis=0) - began.max(axis=0)
    return times


def find_slowest(parts: FloatArray, count: int) -> list[list[StepParts]]:
    """The slowest steps, the slowest first; of each what all ranks did.

    Args:
        parts: [R, steps, parts] float64.
        count: how many.
    """
    slowest = np.argsort(find_times(parts))[::-1][:count]
    return [[StepParts(*rank[step].tolist()) for rank in parts] for step in slowest]
