"""What each rank does when step times are compared with rebalances beside them and without."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from equipoise.balancer import EplbState
from equipoise.comm.groups import RankGroup
from equipoise.comm.registry import create_eplb_communicator
from equipoise.config import EPLBConfig
from equipoise.dispatch.maps import PlacementMaps
from equipoise.errors import ConfigError
from equipoise.load.recorder import LoadRecorder
from equipoise.placement import place_in_order
from equipoise.policy import get_policy
from equipoise.topology import Topology

BLOCK_STEPS = 50
_TOKENS = 256
_EXCHANGES = ("all_gather", "all_reduce", "barrier", "send", "recv", "decide")


@dataclass(frozen=True)
class StallSpec:
    """What is measured; the same on every rank.

    Attributes:
        num_ranks: R, processes.
        num_layers: L.
        slots_per_rank: S; one of each rank is redundant.
        expert_bytes: of one expert of one layer.
        step_ms: what a step computes, on an idle machine.
        num_steps: of each kind, with rebalances and without.
        communicator: the wire.
        seed: of the load.
        timeout_s: longest wait for another rank.
    Raises: ConfigError.
    """

    num_ranks: int = 2
    num_layers: int = 58
    slots_per_rank: int = 9
    expert_bytes: int = 65_536
    step_ms: float = 15.0
    num_steps: int = 1000
    communicator: str = "auto"
    seed: int = 0
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--ranks", self.num_ranks, 2),
            ("--layers", self.num_layers, 1),
            ("--slots", self.slots_per_rank, 2),
            ("--expert-bytes", self.expert_bytes, 1),
            ("--steps", self.num_steps, BLOCK_STEPS),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{flag} must be at least {least}, got {value}")
        for flag, seconds in (("--step-ms", self.step_ms), ("--timeout", self.timeout_s)):
            if not 0 < seconds < float("inf"):
                raise ConfigError(f"{flag} must be a number above 0, got {seconds}")


@dataclass(frozen=True)
class Stall:
    """What one run measured.

    Attributes:
        without_s: seconds of each step without rebalances, of the slowest rank.
        during_s: the same while rebalances run back to back.
        exchanges: calls by which a forward thread met other ranks inside `EplbState.step`, over
            all ranks.
        rebalances: that ended.
        layers: that were committed.
        moves: experts that a rank received.
        forward_s: seconds of a forward thread inside `step` in the second kind beyond the first,
            of the slowest rank.
        steps_of_rebalance: mean steps from plan to last commit.
        communicator: the wire, and why.
    """

    without_s: tuple[float, ...]
    during_s: tuple[float, ...]
    exchanges: int
    rebalances: int
    layers: int
    moves: int
    forward_s: float
    steps_of_rebalance: float
    communicator: str


@dataclass
class _Tally:
    """Sums of this rank."""

    without_s: list[float] = field(default_factory=list)
    during_s: list[float] = field(default_factory=list)
    balancer_s: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    exchanges: int = 0
    rebalances: int = 0
    layers: int = 0
    moves: int = 0
    steps_of_rebalances: int = 0


def measure_stall(spec: StallSpec, group: RankGroup, emit: Callable[[Stall], None]) -> None:
    """Step in lockstep, in blocks by turns with rebalances back to back and without.

    Args:
        spec: the same on every rank.
        group: its ranks, on the CPU.
        emit: called on rank 0.
    Collective: every rank of the group.
    Raises: TransferError or MembershipError if a rank fails.
    """
    # Ranks share the cores; threads of theirs would only wait for each other.
    torch.set_num_threads(1)
    serving = _Serving(spec, group)
    tally = _Tally()
    try:
        for block in range(2 * -(-spec.num_steps // BLOCK_STEPS)):
            serving.run_block(tally, with_rebalances=bool(block % 2))
        said = serving.merge(tally)
    finally:
        if serving.state.close():
            serving.communicator.close()
    if group.rank == 0:
        emit(said)


class _Serving:
    """A rank that computes something, and has experts under balance."""

    def __init__(self, spec: StallSpec, group: RankGroup) -> None:
        topology = Topology(spec.num_ranks, spec.slots_per_rank)
        self._num_experts = spec.num_ranks * (spec.slots_per_rank - 1)
        self._spec, self._group = spec, group
        self._random = np.random.default_rng(spec.seed)
        shape = (spec.slots_per_rank, spec.expert_bytes)
        weights = [[torch.zeros(shape, dtype=torch.uint8)] for _ in range(spec.num_layers)]
        placement = place_in_order(spec.num_layers, self._num_experts, topology)
        self._maps = PlacementMaps(placement, group.device)
        self._recorder = LoadRecorder(spec.num_layers, topology.num_slots, group.device)
        # It plans from nothing, so that every rebalance moves much.
        policy = get_policy("deepseek")
        never = 1 << 40
        config = EPLBConfig(window_size=1, step_interval=never, policy=policy.name)
        self.state = EplbState(config, group, policy)
        self.communicator = create_eplb_communicator(
            self.state.transfer_group, spec.communicator, weights
        )
        self.state.add_model("stall", weights, self._maps, self._recorder, self.communicator)
        self._matrix = torch.rand(256, 256)
        self._num_products = self._calibrate()

    def run_block(self, tally: _Tally, *, with_rebalances: bool) -> None:
        # What the block before has begun ends outside of what is measured.
        while self.state.is_rebalancing:
            self._step(tally, measured=False)
        into = tally.during_s if with_rebalances else tally.without_s
        for _ in range(BLOCK_STEPS):
            if with_rebalances and not self.state.is_rebalancing:
                self._draw_load()
                self.state.rearrange()
            started = time.perf_counter()
            tally.balancer_s[with_rebalances] += self._step(tally, measured=True)
            # In lockstep, as dispatch keeps the ranks.
            self._group.barrier()
            into.append(time.perf_counter() - started)

    def merge(self, tally: _Tally) -> Stall:
        """The figures of all ranks."""
        times = torch.tensor([tally.without_s, tally.during_s], dtype=torch.float64)
        beyond = torch.tensor(tally.balancer_s[True] - tally.balancer_s[False])
        exchanges = torch.tensor(tally.exchanges)
        self._group.all_reduce(times, "max")
        self._group.all_reduce(beyond, "max")
        self._group.all_reduce(exchanges)
        return Stall(
            without_s=tuple(times[0].tolist()),
            during_s=tuple(times[1].tolist()),
            exchanges=int(exchanges),
            rebalances=tally.rebalances,
            layers=tally.layers,
            moves=tally.moves,
            forward_s=float(beyond),
            steps_of_rebalance=tally.steps_of_rebalances / max(1, tally.rebalances),
            communicator=f"{self.communicator.name} ({self.communicator.reason})",
        )

    def _step(self, tally: _Tally, *, measured: bool) -> float:
        """One forward pass; seconds inside the balancer."""
        for _ in range(self._num_products):
            torch.mm(self._matrix, self._matrix)
        started = time.perf_counter()
        with self._count_exchanges(tally):
            outcomes = self.state.step()
        taken = time.perf_counter() - started
        if not measured:
            self._group.barrier()
        for outcome in outcomes:
            tally.rebalances += 1
            tally.layers += int(np.count_nonzero(outcome.moves_per_layer))
            tally.moves += outcome.moves
            tally.steps_of_rebalances += outcome.step - outcome.planned_step
        return taken

    def _draw_load(self) -> None:
        """Tokens of this step, other experts being busy than before; a step records them."""
        weights = self._random.permuted(1.0 / np.arange(1, self._num_experts + 1))
        for layer in range(self._spec.num_layers):
            chosen = self._random.choice(self._num_experts, size=_TOKENS, p=weights / weights.sum())
            slots = self._maps.placement.expert_to_slots[layer, chosen, 0]
            self._recorder.record(layer, torch.tensor(slots))
        self.state.step()

    def _calibrate(self) -> int:
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < 0.2:
            torch.mm(self._matrix, self._matrix)
            count += 1
        num_products = torch.tensor(round(count * self._spec.step_ms / 200.0))
        self._group.all_reduce(num_products, "max")
        return max(1, int(num_products))

    @contextmanager
    def _count_exchanges(self, tally: _Tally) -> Iterator[None]:
        """Count what this thread, and no other, calls on either group."""
        mine = threading.get_ident()
        groups: tuple[Any, ...] = (self._group, self.state.transfer_group)
        for group in groups:
            for name in _EXCHANGES:
                method = getattr(group, name)

                def call(*words: Any, _method: Any = method, **options: Any) -> Any:
                    tally.exchanges += threading.get_ident() == mine
                    return _method(*words, **options)

                setattr(group, name, call)
        try:
            yield
        finally:
            for group in groups:
                for name in _EXCHANGES:
                    delattr(group, name)
