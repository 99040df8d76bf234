"""What rebalances in the background cost the steps beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equipoise.bench.outcome import BenchOutcome, with_goal
from equipoise.bench.stall_rank import Stall, StallSpec
from equipoise.launch.local import run_local
from equipoise.launch.seats import assign_local_seats

_JOB = "equipoise.bench.stall_rank:measure_stall"
_PERCENTILES = (50, 90, 99, 100)
_NOTES = (
    "Steps in alternating blocks, with rebalances back to back and without; each step's time is "
    "the slowest rank's, between two meetings of all ranks.",
    "On the CPU workers plan and copy on the cores that compute the steps, so the ratio of step "
    "times has no goal here. It has one on two GPUs (p99 at most 1.05 of p99 without), as has the "
    "forward thread's time per layer (under 100 us): both need GPUs, and were not measured.",
)


def measure_stalls(spec: StallSpec) -> BenchOutcome:
    """Step with and without rebalances, on processes of this machine.

    Args:
        spec: what to measure.
    Collective: none; starts the ranks, and leaves none.
    Raises: JobFailed, naming the rank, if one fails or dies.
    """
    heard: list[Stall] = []
    run_local(spec, assign_local_seats(spec.num_ranks, "cpu"), heard.append, job=_JOB)
    (stall,) = heard
    without, during = _find_percentiles(stall.without_s), _find_percentiles(stall.during_s)
    rows = [
        with_goal(
            {"what": "exchanges on the forward threads", "value": stall.exchanges},
            "value",
            0,
            at_most=True,
        ),
        {"what": "p99 step beside rebalances / without", "value": during["p99"] / without["p99"]},
        {
            "what": "median step beside rebalances / without",
            "value": during["p50"] / without["p50"],
        },
        {
            "what": "forward thread, us per committed layer",
            "value": stall.forward_s / max(1, stall.layers) * 1e6,
        },
        {"what": "steps from plan to last commit, mean", "value": stall.steps_of_rebalance},
        {"what": "rebalances", "value": stall.rebalances},
        {"what": "experts received", "value": stall.moves},
    ]
    return BenchOutcome(
        name="stall",
        setting={
            "ranks": spec.num_ranks,
            "layers": spec.num_layers,
            "slots_per_rank": spec.slots_per_rank,
            "expert_bytes": spec.expert_bytes,
            "step_ms": spec.step_ms,
            "steps": len(stall.without_s),
            "communicator": stall.communicator,
            "seed": spec.seed,
            "device": "cpu",
        },
        rows=tuple(rows),
        notes=(_say("without", without), _say("beside rebalances", during), *_NOTES),
        figures={
            "forward_thread_collectives": stall.exchanges,
            "step_s": {"without": without, "during": during},
        },
    )


def _find_percentiles(seconds: Sequence[float]) -> dict[str, float]:
    values = np.percentile(seconds, _PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(_PERCENTILES, values, strict=True)}


def _say(kind: str, percentiles: dict[str, float]) -> str:
    said = ", ".join(f"{name} {value * 1000:.1f} ms" for name, value in percentiles.items())
    return f"Step time {kind}: {said}."
