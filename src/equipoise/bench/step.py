"""Steps of the engine: what balance is worth, and what balancing costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from equipoise.bench.outcome import BenchOutcome, Row, with_goal
from equipoise.bench.step_case import (
    SCALED,
    Compared,
    LeftOut,
    Setting,
    StepSaid,
    StepSpec,
    Timed,
)
from equipoise.bench.step_loads import read_shares
from equipoise.bench.step_prediction import (
    find_centre,
    find_p99_ratio_error,
    predict_experts,
    sum_slowest,
)
from equipoise.launch.local import run_local
from equipoise.launch.seats import assign_local_seats

_JOB = "equipoise.bench.step_rank:measure_steps"
_PACKAGES = ("torch", "transformers", "nixl-cu13")
_PERCENTILES = (50, 90, 99)
_LIMITS = ("max_bytes_per_s", "max_bytes_per_step", "max_layers_per_step")

_PREFILL_TOKENS, _STALL_STEPS = 4096, 2000
"""What the goals are for."""

_NOTES = (
    "A model of the bundled one's architecture with random weights; its tokens go to experts as "
    "often as those of gpt-oss-20b went in text of one kind, whose experts each stand for as many "
    "neighbours as are needed, and experts begin in order. Each step's time is the slowest rank's.",
    "gain: seconds that a step is shorter on the balanced placement, the median of the means of "
    "all two pairs of steps by turns, over what planes through each rank's measured times of "
    "experts by rows and occupied slots, computed as layers compute what came, predict from the "
    "measured loads, the slowest rank of each layer counting.",
    "stall: decode steps with rebalances in the background back to back, experts' loads changing "
    "names between them, and without, in blocks by turns. Decode leaves out steps that take "
    "prompts.",
)


def compare_steps(
    spec: StepSpec, on_said: Callable[[StepSaid], None] = lambda _: None
) -> BenchOutcome:
    """Measure steps of the engine, on processes of this machine.

    Args:
        spec: what to measure.
        on_said: called with each case as it is done.
    Collective: none; starts the ranks, and leaves none.
    Raises: JobFailed, naming the rank, if one fails or dies; ConfigError if there is no GPU where
        one is asked for, or the trace has no such text.
    """
    # What it refuses is said before a rank starts.
    read_shares(spec.size, spec.kind)
    heard: list[StepSaid] = []

    def hear(said: StepSaid) -> None:
        heard.append(said)
        on_said(said)

    seats = assign_local_seats(spec.num_ranks, spec.device)
    num_devices = len({seat.device for seat in seats}) if spec.device == "cuda" else len(seats)
    run_local(spec, seats, hear, job=_JOB)
    (setting,) = (said for said in heard if isinstance(said, Setting))
    compared = [said for said in heard if isinstance(said, Compared)]
    left_out = [said for said in heard if isinstance(said, LeftOut)]
    rows = [row for said in compared for row in _make_rows(said, spec, num_devices)]
    notes = [f"{said.case}: not measured, it needs {said.reason}." for said in left_out]
    notes += [_say_gain(row) for row in rows if "predicted_s" in row]
    notes += [_say_parts(row) for row in rows if "parts" in row]
    notes += [
        f"{row['case']}: the ratio of p99 has a standard error of {row['value_error']:.2g}."
        for row in rows
        if "value_error" in row
    ]
    return BenchOutcome(
        name="step",
        setting=_tell_setting(spec, setting, num_devices),
        rows=tuple(rows),
        notes=(*notes, *_advise(spec), *_NOTES),
        versions={name: _find_version(name) for name in _PACKAGES},
        figures={
            "left_out": {said.case: said.reason for said in left_out},
            "step_s": {
                said.case: [_list_times(said.off), _list_times(said.on)] for said in compared
            },
        },
    )


def _advise(spec: StepSpec) -> list[str]:
    """What goals are for, where that is not what was measured."""
    if spec.device == "cpu":
        return [
            "Goals are for GPUs: gain at least 0.9 at 4,096 tokens a rank of a model of 24 layers "
            "and 128 experts, p99 beside rebalances at most 1.05 of p99 without over 2,000 steps "
            "each, a recorder under 1 percent of a decode step, graphs 1.5 times as fast. On the "
            "CPU ranks share cores: a slow rank does not keep the others waiting, and workers take "
            "time from steps."
        ]
    if spec.dispatcher == "torch" and "prefill" in spec.cases:
        return [
            "prefill: over torch the host waits for counts in every layer, and ranks wait for the "
            "one whose host is late. --case prefill --dispatcher nixl_ep measures it without."
        ]
    return []


def _tell_setting(spec: StepSpec, setting: Setting, num_devices: int) -> dict[str, object]:
    return {
        "ranks": spec.num_ranks,
        "devices": num_devices,
        "device": setting.device,
        "dtype": setting.dtype,
        "layers": spec.size.num_layers,
        "experts": spec.size.num_experts,
        "top_k": spec.size.top_k,
        "hidden_size": spec.size.hidden_size,
        "expert_size": spec.size.expert_size,
        "prefill_tokens": spec.prefill_tokens,
        "sequences": spec.decode_size,
        "steps": spec.num_steps,
        "stall_steps": spec.num_stall_steps,
        "kind": spec.kind,
        "policy": spec.balancing.policy,
        **spec.balancing.model_dump(include=set(_LIMITS)),
        "dispatcher": spec.dispatcher,
        "communicator": setting.communicator,
        "seed": spec.seed,
    }


def _make_rows(said: Compared, spec: StepSpec, num_devices: int) -> list[Row]:
    labels = {
        "prefill": ("as it came", "balanced"),
        "decode": ("as it came", "balanced"),
        "recorder": ("not counting", "counting"),
        "stall": ("no rebalance", "back to back"),
        "graphs": ("eager", "graphs"),
    }[said.case]
    rows = [
        _describe(said, label, timed)
        for label, timed in zip(labels, (said.off, said.on), strict=True)
    ]
    for row, parts in zip(rows, said.parts or (), strict=False):
        row["parts"] = asdict(parts)
    judged = _judge(said, rows[0], rows[1], spec, num_devices)
    return [*rows, judged]


def _describe(said: Compared, label: str, timed: Timed) -> Row:
    values = np.percentile(timed.step_s, _PERCENTILES)
    row: Row = {
        "case": said.case,
        "what": label,
        "tokens_per_s": timed.num_tokens / float(timed.step_s.sum()),
        "num_steps": len(timed.step_s),
        **{f"p{p}_s": float(v) for p, v in zip(_PERCENTILES, values, strict=True)},
        "mean_s": float(timed.step_s.mean()),
        "balance_mean_s": float(timed.balance_s.mean()),
        "balance_p99_s": float(np.percentile(timed.balance_s, 99)),
    }
    most, mean = timed.rank_tokens.max(axis=2).sum(), timed.rank_tokens.mean(axis=2).sum()
    if mean > 0:
        row["imbalance"] = float(most / mean)
    return row


def _list_times(timed: Timed) -> list[float]:
    """In order, to the microsecond: off and on took turns, as each case has it."""
    return [round(float(step_s), 6) for step_s in timed.step_s]


def _judge(said: Compared, off: Row, on: Row, spec: StepSpec, num_devices: int) -> Row:
    row: Row = {"case": said.case, "moves": said.moves, "rebalances": said.rebalances}
    match said.case:
        case "prefill" | "decode":
            return _judge_gain(said, spec, num_devices, row)
        case "recorder":
            row |= {"what": "cost of counting, share of a step"}
            row["value"] = on["p50_s"] / off["p50_s"] - 1
            return with_goal(row, "value", 0.01, at_most=True)
        case "stall":
            row |= {"what": "p99 beside rebalances / without", "value": on["p99_s"] / off["p99_s"]}
            row["p50_ratio"] = on["p50_s"] / off["p50_s"]
            if spec.device != "cuda" or spec.num_stall_steps < _STALL_STEPS:
                return row
            times = said.off.step_s, said.on.step_s
            row["value_error"] = find_p99_ratio_error(*times, spec.block_steps)
            return with_goal(row, "value", 1.05, at_most=True)
        case "graphs":
            row |= {"what": "as fast as eager", "value": off["p50_s"] / on["p50_s"]}
            return with_goal(row, "value", 1.5)


def _judge_gain(said: Compared, spec: StepSpec, num_devices: int, row: Row) -> Row:
    experts = said.experts
    assert experts is not None
    before_s, after_s = (
        predict_experts(experts.planes, one.rank_tokens, one.occupied, num_devices)
        for one in (said.off, said.on)
    )
    predicted = before_s - after_s
    gained, error = find_centre(said.off.step_s - said.on.step_s)
    # On a CPU ranks wait for cores, not for each other; in decoding the weights are what is read.
    has_value = said.case == "prefill" and spec.device == "cuda" and predicted > 0
    row |= {
        "what": "gain over the predicted one",
        "value": gained / predicted if has_value else None,
        "gained_s": gained,
        "gained_error_s": error,
        "predicted_s": predicted,
        "timed_loads_s": sum_slowest(experts.off_s, num_devices)
        - sum_slowest(experts.on_s, num_devices),
        "alone_s": [one.sum(axis=1).mean(axis=0).tolist() for one in (experts.off_s, experts.on_s)],
        "expert_times": [asdict(one) for one in experts.planes],
    }
    is_full = spec.size == SCALED and spec.prefill_tokens == _PREFILL_TOKENS
    is_full = is_full and num_devices == spec.num_ranks
    if has_value and is_full:
        return with_goal(row, "value", 0.9)
    return row


def _say_gain(row: Row) -> str:
    planes = "; ".join(
        f"on rank {rank} {one['fixed_s'] * 1e6:.3g} us and {one['token_s'] * 1e9:.3g} ns a row "
        f"and {one['slot_s'] * 1e6:.3g} us an occupied slot, measured times up to "
        f"{one['worst']:.0%} off"
        for rank, one in enumerate(row["expert_times"])
    )
    off, on = (", ".join(f"{one * 1e3:.3g}" for one in by_rank) for by_rank in row["alone_s"])
    return (
        f"{row['case']}: balanced steps are {row['gained_s'] * 1e3:.3g} "
        f"+- {row['gained_error_s'] * 1e3:.2g} ms shorter, predicted "
        f"{row['predicted_s'] * 1e3:.3g} ms, {row['timed_loads_s'] * 1e3:.3g} ms by the times of "
        f"the very loads of a step, which alone take {off} ms by rank as it came and {on} ms "
        f"balanced: a layer's experts take {planes}."
    )


def _say_parts(row: Row) -> str:
    parts = row["parts"]
    by_rank = ", ".join(f"{seconds * 1e3:.3g}" for seconds in parts["experts_s"])
    others = {name: f"{parts[name] * 1e3:.3g}" for name in parts if name != "experts_s"}
    return (
        f"{row['case']}, {row['what']}, by parts of a step, in ms: experts {by_rank} by rank, "
        f"{others['slowest_experts_s']} on each layer's slowest; dispatch {others['dispatch_s']} "
        f"and combine {others['combine_s']}, waits for others included; between layers "
        f"{others['between_s']}. From step to step a layer's experts differ by "
        f"{parts['experts_scatter_s'] * 1e6:.3g} us on a rank, what is between by "
        f"{parts['between_scatter_s'] * 1e6:.3g} us."
    )


def _find_version(package: str) -> Any:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
