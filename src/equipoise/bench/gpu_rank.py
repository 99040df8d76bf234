"""What each rank does when wires between GPUs are compared: whole rearrangements, and limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal

import torch

from equipoise.bench.gpu_case import GpuCase, GpuWeights, count_received
from equipoise.bench.gpu_limits import BareReads, send_one_message
from equipoise.comm.groups import RankGroup
from equipoise.comm.nixl.agent import has_nixl
from equipoise.comm.process_groups import has_nccl
from equipoise.comm.registry import create_eplb_communicator
from equipoise.comm.weight_table import WeightTable
from equipoise.errors import CommunicatorUnavailable
from equipoise.placement import Placement
from equipoise.plan.transfer_plan import TransferPlan, make_plan
from equipoise.transfer.budget import StagingBudget, choose_budget, find_spare
from equipoise.transfer.executor import rearrange_expert_weights_inplace
from equipoise.transfer.staging import PlanShares, share_plan

Staging = Literal["as is free", "one buffer", "two of a layer"]
Limit = Literal["one NCCL message", "one READ in place", "bare READs of the same chunks"]


@dataclass(frozen=True)
class GpuSpec:
    """What is measured; the same on every rank.

    Attributes:
        cases: which weights move.
        backends: names of communicators.
        stagings: how much memory is staged in; all but the first for nixl alone.
        num_rounds: how often each is measured; gloo a third as often.
        seed: of the placement that is moved to.
        num_ranks: R.
        timeout_s: longest wait for another rank.
    """

    cases: tuple[GpuCase, ...]
    backends: tuple[str, ...]
    stagings: tuple[Staging, ...] = ("as is free", "one buffer", "two of a layer")
    num_rounds: int = 6
    seed: int = 0
    num_ranks: int = 2
    timeout_s: float = 60.0


@dataclass(frozen=True)
class LimitFound:
    """What the link gives to something that does nothing else."""

    case: str
    limit: Limit
    staging: Staging | None
    received_bytes: int
    seconds: float


@dataclass(frozen=True)
class WireMeasured:
    """One wire on one case: figures of the slowest rank.

    Attributes:
        case: its name.
        backend: the wire's.
        staging: how much memory it had.
        received_bytes: of the rank that receives most.
        seconds: median of the rounds, from the call until the last slot is filled.
        extra_bytes: most memory beside the weights, on any rank: staging, and the wire's own.
        staging_bytes: of the buffers.
        num_chunks: how many chunks were agreed on.
    """

    case: str
    backend: str
    staging: Staging
    received_bytes: int
    seconds: float
    extra_bytes: int
    staging_bytes: int
    num_chunks: int


@dataclass(frozen=True)
class WireLeftOut:
    """A wire that does not work here, and why."""

    backend: str
    reason: str


GpuSaid = LimitFound | WireMeasured | WireLeftOut


def measure_on_gpus(spec: GpuSpec, group: RankGroup, emit: Callable[[GpuSaid], None]) -> None:
    """Measure every case over every wire, each beside its limits.

    Args:
        spec: the same on every rank.
        group: its ranks, each on a GPU.
        emit: called on rank 0 with what was found.
    Collective: every rank of the group.
    Raises: TransferError if a word is wrong or a rank does not come in time.
    """
    for case in spec.cases:
        course = _Course(spec, case, group)
        for said in course.run():
            if group.rank == 0:
                emit(said)
        del course
        torch.cuda.empty_cache()


class _Course:
    """One case on one rank, each run of it started and ended together with the others."""

    def __init__(self, spec: GpuSpec, case: GpuCase, group: RankGroup) -> None:
        self._spec = spec
        self._case = case
        self._group = group
        self._old, self._new = case.make_placements(spec.num_ranks, spec.seed)
        self._plan = make_plan(self._old, self._new)
        # There and back; slots that were filled are emptied instead.
        self._plans = [self._plan]
        if case.kind != "fill":
            self._plans.append(make_plan(self._new, self._old))
        self._weights = GpuWeights(case, self._old, group.rank, group.device)
        self._sizes = WeightTable(self._weights.tensors).expert_bytes
        received = count_received(self._plan, group.rank) * case.expert_bytes
        most = torch.tensor(received)
        group.all_reduce(most, "max")
        spare = torch.tensor(find_spare(group.device))
        group.all_reduce(spare, "min")
        self._spare_bytes = int(spare)
        self._received_bytes, self._most_bytes = received, int(most)

    def run(self) -> Iterator[GpuSaid]:
        yield from self._find_limits()
        for backend in self._spec.backends:
            stagings = self._spec.stagings if backend == "nixl" else self._spec.stagings[:1]
            for staging in stagings:
                try:
                    yield self._measure(backend, staging)
                except CommunicatorUnavailable as error:
                    yield WireLeftOut(backend, str(error))
                    break

    def _find_limits(self) -> Iterator[LimitFound]:
        landing = torch.empty(self._received_bytes, dtype=torch.uint8, device=self._group.device)
        if has_nccl(self._group.device_group):

            def send() -> None:
                send_one_message(
                    self._group,
                    self._weights.memory,
                    landing,
                    self._plan,
                    self._case.expert_bytes,
                )

            yield self._limit("one NCCL message", None, send)
        everywhere = torch.tensor(has_nixl())
        self._group.all_reduce(everywhere, "min")
        if not bool(everywhere):
            return
        weights = self._weights
        reads = BareReads(self._group, weights.memory, weights.tensors, landing)
        in_place = [partial(reads.read_all, plan) for plan in self._plans]
        yield self._limit("one READ in place", None, *in_place)
        for staging in self._spec.stagings:
            runs = [
                partial(reads.read_chunks, plan, self._share(plan, staging)) for plan in self._plans
            ]
            yield self._limit("bare READs of the same chunks", staging, *runs)
        self._group.barrier()
        reads.close()

    def _limit(
        self, limit: Limit, staging: Staging | None, *runs: Callable[[], None]
    ) -> LimitFound:
        """By turns, each as often as `_measure` has it."""
        rounds = range(_count_rounds(self._spec.num_rounds))
        seconds = [self._time(runs[number % len(runs)]) for number in rounds][1:]
        return LimitFound(self._case.name, limit, staging, self._most_bytes, median(seconds))

    def _measure(self, backend: str, staging: Staging) -> WireMeasured:
        device = self._group.device
        torch.cuda.empty_cache()
        before = _MemoryInUse.of(device)
        communicator = create_eplb_communicator(self._group, backend, self._weights.tensors)
        seconds, peaks, num_chunks = [], [0], 0
        wanted = self._spec.num_rounds // (3 if backend == "torch_gloo" else 1)
        try:
            for number in range(_count_rounds(wanted)):
                plan = self._plans[number % len(self._plans)]
                old, new = plan.old, plan.new
                torch.cuda.reset_peak_memory_stats(device)

                def move(
                    old: Placement = old, new: Placement = new, plan: TransferPlan = plan
                ) -> None:
                    nonlocal num_chunks
                    stats = rearrange_expert_weights_inplace(
                        old,
                        new,
                        self._weights.tensors,
                        communicator,
                        self._group,
                        staging_bytes=self._staging_bytes(staging),
                        plan=plan,
                    )
                    num_chunks = stats.num_chunks
                    torch.cuda.current_stream(device).synchronize()

                seconds.append(self._time(move))
                peaks.append(_MemoryInUse.of(device).peak - before.allocated)
                self._weights.check(new, backend)
                if self._case.kind == "fill":
                    self._empty()
            others = _MemoryInUse.of(device).others - before.others
        finally:
            communicator.close()
        peak = torch.tensor(max(peaks) + max(0, others))
        self._group.all_reduce(peak, "max")
        most = int(self._share(self._plan, staging).num_bytes.max())
        return WireMeasured(
            self._case.name,
            backend,
            staging,
            self._most_bytes,
            median(seconds[1:]),
            int(peak),
            most * min(num_chunks, self._budget(staging).num_buffers),
            num_chunks,
        )

    def _empty(self) -> None:
        """Wipe the slots that were filled, so that the next round has to fill them."""
        half = self._case.slots_per_rank // 2
        for layer in self._weights.tensors:
            for tensor in layer:
                tensor[half:].zero_()

    def _staging_bytes(self, staging: Staging) -> int | None:
        largest = int(self._plan.staged_bytes(self._sizes).max())
        match staging:
            case "as is free":
                return None
            case "one buffer":
                # Less than twice a layer, so that there is no second.
                return 2 * largest - 1
            case "two of a layer":
                return 2 * largest

    def _budget(self, staging: Staging) -> StagingBudget:
        return choose_budget(
            self._plan,
            self._sizes,
            self._staging_bytes(staging),
            self._spare_bytes,
            self._group.device,
        )

    def _share(self, plan: TransferPlan, staging: Staging) -> PlanShares:
        budget = self._budget(staging)
        return share_plan(
            plan,
            self._group.rank,
            self._sizes,
            budget.buffer_bytes,
            ends_small=budget.num_buffers > 1,
        )

    def _time(self, run: Callable[[], None]) -> float:
        """Seconds of the slowest rank."""
        torch.cuda.synchronize(self._group.device)
        self._group.barrier()
        started = time.perf_counter()
        run()
        taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
        self._group.all_reduce(taken, "max")
        return float(taken)


def _count_rounds(wanted: int) -> int:
    """The first warms up; an even number, so that every wire begins with the same placement."""
    return wanted + 2 - wanted % 2


@dataclass(frozen=True)
class _MemoryInUse:
    """Of a GPU, in bytes.

    Attributes:
        allocated: by torch.
        peak: most of it since the peak was reset.
        others: by what is not torch: contexts, NCCL, other processes.
    """

    allocated: int
    peak: int
    others: int

    @classmethod
    def of(cls, device: torch.device) -> _MemoryInUse:
        free, total = torch.cuda.mem_get_info(device)
        return cls(
            torch.cuda.memory_allocated(device),
            torch.cuda.max_memory_allocated(device),
            total - free - torch.cuda.memory_reserved(device),
        )
