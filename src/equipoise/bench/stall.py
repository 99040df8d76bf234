"""What rebalances in the background cost the steps beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from equipoise.bench.outcome import BenchOutcome, Row, with_goal
from equipoise.bench.stall_case import Stall, StallSpec, StepParts, find_slowest, find_times
from equipoise.errors import ConfigError
from equipoise.launch.local import run_local
from equipoise.launch.seats import assign_local_seats
from equipoise.topology import FloatArray

_JOB = "equipoise.bench.stall_rank:measure_stall"
_PERCENTILES = (50, 90, 99, 100)
_MOST_P99, _MOST_LAYER_US = 1.05, 100.0
_NUM_SLOWEST = 12
_FEW_BYTES = 64 << 20
_NOTE = (
    "Steps in alternating blocks, with rebalances back to back and without, ranks in lockstep: a "
    "step is from when the last rank began until the last one was done."
)
_CPU_NOTE = (
    "On the CPU workers plan and copy on the cores that compute the steps, so the ratio of step "
    "times has no goal here. It has one on two GPUs (p99 at most 1.05 of p99 without), as has the "
    "forward thread's time per layer (under 100 us): both need GPUs, and were not measured."
)


def measure_stalls(spec: StallSpec) -> BenchOutcome:
    """Step with and without rebalances, on processes of this machine.

    Args:
        spec: what to measure.
    Collective: none; starts the ranks, and leaves none.
    Raises: JobFailed, naming the rank, if one fails or dies; ConfigError if there is no GPU for a
        rank where GPUs are asked for.
    """
    if spec.device == "cuda" and torch.cuda.device_count() < spec.num_ranks:
        raise ConfigError(
            f"--device cuda: {spec.num_ranks} ranks need a GPU each, torch sees "
            f"{torch.cuda.device_count()}"
        )
    heard: list[Stall] = []
    run_local(spec, assign_local_seats(spec.num_ranks, spec.device), heard.append, job=_JOB)
    (stall,) = heard
    without, during = _find_percentiles(stall.without), _find_percentiles(stall.during)
    notes = (_say("without", without), _say("beside rebalances", during), _NOTE)
    return BenchOutcome(
        name="stall",
        setting={
            "ranks": spec.num_ranks,
            "layers": spec.num_layers,
            "slots_per_rank": spec.slots_per_rank,
            "expert_bytes": spec.expert_bytes,
            "step_ms": spec.step_ms,
            "launch": spec.launch if spec.device == "cuda" else None,
            "steps": stall.without.shape[1],
            "communicator": stall.communicator,
            "policy": spec.policy,
            "max_bytes_per_s": spec.max_bytes_per_s,
            "max_bytes_per_step": spec.max_bytes_per_step,
            "max_layers_per_step": spec.max_layers_per_step,
            "seed": spec.seed,
            "device": stall.device,
        },
        rows=tuple(_make_rows(stall, spec, without, during)),
        notes=notes if spec.device == "cuda" else (*notes, _CPU_NOTE),
        figures={
            "forward_thread_collectives": stall.exchanges,
            "step_s": {"without": without, "during": during},
            "mean_parts": {
                "without": _average(stall.without),
                "during": _average(stall.during),
            },
            "slowest_percent_parts": {
                "without": _average(_keep_slowest(stall.without)),
                "during": _average(_keep_slowest(stall.during)),
            },
            "slowest": {
                "without": _list_slowest(stall.without),
                "during": _list_slowest(stall.during),
            },
        },
    )


def _make_rows(
    stall: Stall, spec: StallSpec, without: dict[str, float], during: dict[str, float]
) -> list[Row]:
    p99: Row = {"what": "p99 step beside rebalances / without"}
    p99["value"] = during["p99"] / without["p99"]
    layer_us: Row = {"what": "forward thread, us per committed layer"}
    layer_us["value"] = _find_layer_us(stall, "balancer_s")
    if spec.device == "cuda":
        p99 = with_goal(p99, "value", _MOST_P99, at_most=True)
        layer_us = with_goal(layer_us, "value", _MOST_LAYER_US, at_most=True)
    steps: Row = {"what": "steps from plan to last commit, mean"}
    steps["value"] = stall.steps_of_rebalance
    if spec.slots_per_rank * spec.expert_bytes * spec.num_layers <= _FEW_BYTES:
        # Bytes ask for few chunks, whatever the number of layers.
        steps = with_goal(steps, "value", spec.num_layers - 1, at_most=True)
    exchanges: Row = {"what": "exchanges on the forward threads", "value": stall.exchanges}
    rebalances = max(1, stall.rebalances)
    return [
        with_goal(exchanges, "value", 0, at_most=True),
        p99,
        {
            "what": "median step beside rebalances / without",
            "value": during["p50"] / without["p50"],
        },
        layer_us,
        {
            "what": "of these on a processor, not waiting",
            "value": _find_layer_us(stall, "balancer_cpu_s"),
        },
        steps,
        {"what": "rebalances", "value": stall.rebalances},
        {"what": "experts received", "value": stall.moves},
        {"what": "MB received by a rank in a rebalance, mean", "value": stall.moved_bytes
            / rebalances / len(stall.during) / 1e6},
        {"what": "s of moving in a rebalance, mean", "value": stall.transfer_s / rebalances},
        {"what": "s of planning in a rebalance, mean", "value": stall.plan_s / rebalances},
    ]  # fmt: skip


def _find_layer_us(stall: Stall, part: str) -> float:
    """The forward thread's time inside the balancer beyond that without rebalances."""
    place, layers = StepParts._fields.index(part), StepParts._fields.index("num_layers")
    beyond = stall.during[:, :, place].sum(axis=1) - stall.without[:, :, place].sum(axis=1)
    return float((beyond / np.maximum(1, stall.during[:, :, layers].sum(axis=1))).max() * 1e6)


def _find_percentiles(parts: FloatArray) -> dict[str, float]:
    values = np.percentile(find_times(parts), _PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(_PERCENTILES, values, strict=True)}


def _keep_slowest(parts: FloatArray) -> FloatArray:
    """The slowest percent of steps."""
    count = max(1, parts.shape[1] // 100)
    return parts[:, np.argsort(find_times(parts))[-count:]]


def _average(parts: FloatArray) -> dict[str, float]:
    return StepParts(*parts.mean(axis=(0, 1)).tolist())._asdict()


def _list_slowest(parts: FloatArray) -> list[list[dict[str, Any]]]:
    return [[rank._asdict() for rank in step] for step in find_slowest(parts, _NUM_SLOWEST)]


def _say(kind: str, percentiles: dict[str, float]) -> str:
    said = ", ".join(f"{name} {value * 1000:.1f} ms" for name, value in percentiles.items())
    return f"Step time {kind}: {said}."
