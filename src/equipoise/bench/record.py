"""The kernel that chooses replicas and counts tokens, beside PyTorch's index and bincount."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import numpy as np
import torch

from equipoise.bench.outcome import BenchOutcome, Row, with_goal
from equipoise.dispatch.maps import PlacementMaps
from equipoise.dispatch.replicas import choose_slots
from equipoise.errors import ConfigError, TransferError
from equipoise.load.recorder import LoadRecorder
from equipoise.placement import Placement
from equipoise.topology import Topology

GOAL_US = 10.0
"""The most that a launch should take on the device."""
GOAL_FASTER = 5.0
"""How often faster than PyTorch it should be at least."""

_NUM_WARM_UPS = 5
_NOTES = (
    "device_us: sum of the times of all kernels of one call, by torch's profiler, median of the "
    "rounds; call_us: from one call to the next with the device kept busy, host included. ratio: "
    "device_us of PyTorch over that of the kernel, in this run.",
    "Both gave the same slots and the same counts, for tokens of which a tenth is padding.",
)
_NO_GPU = (
    "Not measured here: every case needs a GPU, and torch sees none. On the CPU the same is done "
    "by PyTorch, with the same results."
)


@dataclass(frozen=True)
class RecordSpec:
    """What is measured.

    Attributes:
        num_tokens: T.
        top_k: K.
        num_experts: E.
        num_slots: P.
        num_rounds: how often each side is measured.
        seed: of routes and placement.
    """

    num_tokens: int = 4096
    top_k: int = 8
    num_experts: int = 256
    num_slots: int = 288
    num_rounds: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (
            ("tokens", self.num_tokens),
            ("top-k", self.top_k),
            ("experts", self.num_experts),
            ("rounds", self.num_rounds),
        ):
            if value < 1:
                raise ConfigError(f"--{name} must be at least 1, got {value}")
        if self.top_k > self.num_experts:
            raise ConfigError(f"a token cannot choose {self.top_k} of {self.num_experts} experts")
        if self.num_slots < self.num_experts:
            raise ConfigError(
                f"{self.num_slots} slots cannot hold {self.num_experts} experts: ask for as many"
            )


def measure_record(spec: RecordSpec) -> BenchOutcome:
    """Choose and count the same tokens both ways, on this machine's first GPU.

    Args:
        spec: how many.
    Collective: none.
    Raises: TransferError if the two differ.
    """
    has_gpu = torch.cuda.is_available()
    return BenchOutcome(
        name="record",
        setting={
            "device": torch.cuda.get_device_name() if has_gpu else "none",
            "tokens": spec.num_tokens,
            "top_k": spec.top_k,
            "experts": spec.num_experts,
            "slots": spec.num_slots,
            "rounds": spec.num_rounds,
            "seed": spec.seed,
        },
        rows=_compare(spec) if has_gpu else (),
        notes=_NOTES if has_gpu else (_NO_GPU,),
        versions={name: _find_version(name) for name in ("torch", "triton")},
    )


def _compare(spec: RecordSpec) -> tuple[Row, ...]:
    device = torch.device("cuda")
    random = np.random.default_rng(spec.seed)
    spare = random.integers(0, spec.num_experts, spec.num_slots - spec.num_experts)
    table = random.permutation(np.concatenate((np.arange(spec.num_experts), spare)))
    placement = Placement(table[None], spec.num_experts, Topology(1, spec.num_slots))
    maps, recorder = PlacementMaps(placement, device), LoadRecorder(1, spec.num_slots, device)
    generator = torch.Generator().manual_seed(spec.seed)
    scores = torch.rand(spec.num_tokens, spec.num_experts, generator=generator)
    experts = scores.topk(spec.top_k).indices.to(device)
    valid = (torch.rand(spec.num_tokens, generator=generator) >= 0.1).to(device)
    counts = torch.zeros(spec.num_slots, dtype=torch.int64, device=device)

    def kernel() -> torch.Tensor:
        return recorder.choose_and_record(0, experts, maps.turns[0], maps.num_turns[0], 7, valid)

    def pytorch() -> torch.Tensor:
        slots = choose_slots(maps, 0, experts, 7, valid)
        counts.add_(torch.bincount(slots.flatten() + 1, minlength=spec.num_slots + 1)[1:])
        return slots

    if not torch.equal(kernel(), pytorch()) or not torch.equal(recorder.counts[0], counts):
        raise TransferError("the kernel chooses or counts otherwise than PyTorch does")
    kernel_us, plain_us = _time_both(kernel, pytorch, spec.num_rounds, _sum_kernels)
    kernel_call_us, plain_call_us = _time_both(kernel, pytorch, spec.num_rounds, _time_calls)
    case = f"{spec.num_tokens} x top-{spec.top_k}, {spec.num_slots} slots"
    row: Row = {
        "case": case,
        "way": "one launch",
        "device_us": kernel_us,
        "call_us": kernel_call_us,
        "ratio": plain_us / kernel_us,
    }
    plain: Row = {
        "case": case,
        "way": "index + bincount",
        "device_us": plain_us,
        "call_us": plain_call_us,
    }
    return (
        with_goal(row, "device_us", GOAL_US, at_most=True),
        with_goal(row, "ratio", GOAL_FASTER),
        plain,
    )


Work = Callable[[], torch.Tensor]


def _time_both(
    first: Work, second: Work, num_rounds: int, measure: Callable[[Work], float]
) -> tuple[float, float]:
    """Medians; they take turns in who goes first."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(_NUM_WARM_UPS):
        first()
        second()
    for number in range(num_rounds):
        order = [(first, taken[0]), (second, taken[1])]
        for work, into in order if number % 2 else reversed(order):
            into.append(measure(work))
    return median(taken[0]), median(taken[1])


def _sum_kernels(work: Work) -> float:
    """Microseconds of a call's kernels on the device."""
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    ) as profile:
        work()
        torch.cuda.synchronize()
    return sum(float(event.self_device_time_total) for event in profile.key_averages())


def _time_calls(work: Work, num_calls: int = 50) -> float:
    """Microseconds from one call to the next."""
    start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(num_calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1000 / num_calls


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
