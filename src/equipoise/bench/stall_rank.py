"""What each rank does when step times are compared with rebalances beside them and without."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equipoise.balancer import EplbState
from equipoise.bench.stall_case import BLOCK_STEPS, Stall, StallSpec, StepParts, Tally
from equipoise.bench.stall_step import create_work
from equipoise.comm.groups import RankGroup
from equipoise.comm.registry import create_eplb_communicator
from equipoise.config import EPLBConfig
from equipoise.dispatch.maps import PlacementMaps
from equipoise.errors import TransferError
from equipoise.load.recorder import LoadRecorder
from equipoise.placement import place_in_order
from equipoise.policy import get_policy
from equipoise.topology import FloatArray, Topology

_TOKENS = 256
_EXCHANGES = ("all_gather", "all_reduce", "barrier", "send", "recv", "decide")
_NEVER = 1 << 40
_WARM_REBALANCES = 2


def measure_stall(spec: StallSpec, group: RankGroup, emit: Callable[[Stall], None]) -> None:
    """Step in lockstep, in blocks by turns with rebalances back to back and without.

    Args:
        spec: the same on every rank.
        group: its ranks.
        emit: called on rank 0.
    Collective: every rank of the group.
    Raises: TransferError or MembershipError if a rank fails; TransferError if a slot does not hold
        what its map says.
    """
    if spec.device == "cpu":
        # Ranks share the cores; threads of theirs would only wait for each other.
        torch.set_num_threads(1)
    serving = _Serving(spec, group)
    tally = Tally()
    try:
        serving.warm_up()
        for block in range(2 * -(-spec.num_steps // BLOCK_STEPS)):
            serving.run_block(tally, with_rebalances=bool(block % 2))
        serving.settle(tally)
        serving.check_slots()
        said = serving.merge(tally)
    finally:
        if serving.state.close():
            serving.communicator.close()
        serving.close()
    if group.rank == 0:
        emit(said)


class _Serving:
    """A rank that computes something, and has experts under balance."""

    def __init__(self, spec: StallSpec, group: RankGroup) -> None:
        topology = Topology(spec.num_ranks, spec.slots_per_rank)
        self._spec, self._group = spec, group
        self._random = np.random.default_rng(spec.seed)
        self._work = create_work(spec, group)
        placement = place_in_order(spec.num_layers, spec.num_experts, topology)
        self._maps = PlacementMaps(placement, group.device)
        self._recorder = LoadRecorder(spec.num_layers, topology.num_slots, group.device)
        self._worker_clock: Path | None = None
        policy = get_policy(spec.policy)
        config = EPLBConfig(
            window_size=1,
            step_interval=_NEVER,
            policy=policy.name,
            max_bytes_per_s=spec.max_bytes_per_s,
            max_bytes_per_step=spec.max_bytes_per_step,
            max_layers_per_step=spec.max_layers_per_step,
        )
        self.state = EplbState(config, group, policy)
        self.communicator = create_eplb_communicator(
            self.state.transfer_group, spec.communicator, self._work.weights
        )
        self.state.add_model(
            "stall", self._work.weights, self._maps, self._recorder, self.communicator
        )
        self._local = slice(
            group.rank * spec.slots_per_rank, (group.rank + 1) * spec.slots_per_rank
        )
        for layer, experts in enumerate(placement.slot_to_expert[:, self._local].tolist()):
            for slot, expert in enumerate(experts):
                self._work.mark(layer, slot, expert)

    def close(self) -> None:
        self._work.close()

    def warm_up(self) -> None:
        """A few rebalances, so that nothing is done for the first time where it is measured."""
        for _ in range(_WARM_REBALANCES):
            self._draw_load()
            self._step(Tally(), begins=True)
            self.settle(Tally())

    def run_block(self, tally: Tally, *, with_rebalances: bool) -> None:
        # What the block before has begun ends outside of what is measured.
        self.settle(tally)
        into = tally.during if with_rebalances else tally.without
        for _ in range(BLOCK_STEPS):
            begins = with_rebalances and not self.state.is_rebalancing
            if begins:
                self._draw_load()
                # One rank has drawn sooner than another.
                self._group.barrier()
            into.append(self._step(tally, begins=begins))

    def settle(self, tally: Tally) -> None:
        """Step until no rebalance is under way; every rank knows at the same step."""
        while self.state.is_rebalancing:
            self._step(tally, begins=False)

    def check_slots(self) -> None:
        """Compare what slots hold with what maps say. Raises: TransferError."""
        for layer, wanted in enumerate(self._maps.placement.slot_to_expert[:, self._local]):
            held = self._work.find_marked(layer)
            wrong = np.flatnonzero((wanted >= 0) & (wanted != held))
            if wrong.size:
                raise TransferError(
                    f"rank {self._group.rank}: layer {layer}, local slot {wrong[0]} holds expert "
                    f"{held[wrong[0]]}, its map says {wanted[wrong[0]]}",
                    rank=self._group.rank,
                    layer=layer,
                )

    def merge(self, tally: Tally) -> Stall:
        """The figures of all ranks."""
        exchanges = torch.tensor(tally.exchanges)
        self._group.all_reduce(exchanges)
        device = self._group.device
        return Stall(
            without=self._gather(tally.without),
            during=self._gather(tally.during),
            exchanges=int(exchanges),
            rebalances=tally.rebalances,
            layers=tally.layers,
            moves=tally.moves,
            moved_bytes=tally.moved_bytes,
            transfer_s=tally.transfer_s,
            plan_s=tally.plan_s,
            steps_of_rebalance=tally.steps_of_rebalances / max(1, tally.rebalances),
            communicator=f"{self.communicator.name} ({self.communicator.reason})",
            device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        )

    def _gather(self, parts: list[StepParts]) -> FloatArray:
        mine = torch.tensor(parts, dtype=torch.float64)
        return np.asarray(torch.stack(self._group.all_gather(mine)).numpy())

    def _step(self, tally: Tally, *, begins: bool) -> StepParts:
        """One forward pass, and what the balancer does behind it."""
        standing, worker = self._maps.placement, self._read_worker_s()
        started, started_cpu = time.perf_counter(), time.thread_time()
        self._work.launch()
        with self._count_exchanges(tally):
            launched, launched_cpu = time.perf_counter(), time.thread_time()
            outcomes = self.state.step()
            if begins:
                self.state.rearrange()
            balanced, balanced_cpu = time.perf_counter(), time.thread_time()
        device_s = self._work.finish()
        ended = time.perf_counter()
        for outcome in outcomes:
            tally.rebalances += 1
            tally.moves += outcome.moves
            tally.moved_bytes += outcome.bytes
            tally.transfer_s += outcome.transfer_s
            tally.plan_s += outcome.plan_s
            tally.steps_of_rebalances += outcome.step - outcome.planned_step
        differs = standing.slot_to_expert != self._maps.placement.slot_to_expert
        num_layers = int(np.count_nonzero(differs.any(axis=1)))
        tally.layers += num_layers
        return StepParts(
            step_s=ended - started,
            began_s=started,
            launch_s=launched - started,
            launch_cpu_s=launched_cpu - started_cpu,
            balancer_s=balanced - launched,
            balancer_cpu_s=balanced_cpu - launched_cpu,
            finish_s=ended - balanced,
            device_s=device_s,
            worker_cpu_s=self._read_worker_s() - worker,
            num_layers=num_layers,
        )

    def _read_worker_s(self) -> float:
        """Seconds that the worker was on a processor; 0 where the system does not tell."""
        if self._worker_clock is None:
            ids = [t.native_id for t in threading.enumerate() if t.name == "equipoise-worker"]
            if not ids:
                return 0.0
            self._worker_clock = Path(f"/proc/self/task/{ids[0]}/schedstat")
        try:
            return int(self._worker_clock.read_text().split()[0]) / 1e9
        except OSError:
            return 0.0

    def _draw_load(self) -> None:
        """Tokens of this step, other experts being busy than before; a step records them."""
        weights = self._random.permuted(1.0 / np.arange(1, self._spec.num_experts + 1))
        chosen = self._random.choice(
            self._spec.num_experts,
            size=(self._spec.num_layers, _TOKENS),
            p=weights / weights.sum(),
        )
        layers = np.arange(self._spec.num_layers)[:, None]
        slots = self._maps.placement.expert_to_slots[layers, chosen, 0]
        for layer, slot_ids in enumerate(torch.tensor(slots, device=self._group.device)):
            self._recorder.record(layer, slot_ids)
        self._work.finish()

    @contextmanager
    def _count_exchanges(self, tally: Tally) -> Iterator[None]:
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
