"""What `flow` reaches, against bounds and against `deepseek`, in one run on one thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numba
import numpy as np

from equipoise.bench.outcome import BenchOutcome, Row
from equipoise.bench.plan_drift import (
    DRIFT,
    DRIFT_GOALS,
    NEXT_BUDGETS,
    measure_drift,
    measure_next_window,
)
from equipoise.bench.plan_fresh import FRESH_GOALS, measure_fresh, measure_packing
from equipoise.bench.plan_loads import (
    SHAPES,
    LoadKind,
    draw_load,
    resample_trace,
    walk_load,
)
from equipoise.errors import ConfigError
from equipoise.load.trace import LoadTrace
from equipoise.policy.flow import FlowPolicy
from equipoise.topology import IntArray

NUM_WINDOWS = 6
"""Windows of a load that drifts: one to begin with, four planned from, one that follows."""
LOAD_KINDS: tuple[LoadKind, ...] = ("zipf", "lognormal", "dirichlet")


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """What is compared.

    Attributes:
        shapes: names of them.
        load_kinds: drawn loads.
        traces: real loads by name; each is resampled to every shape.
        seed: of all that is drawn.
        drift: whether plans from a standing placement are compared too.
    Raises: ConfigError if a shape does not exist, or there is no load.
    """

    shapes: tuple[str, ...] = tuple(SHAPES)
    load_kinds: tuple[LoadKind, ...] = LOAD_KINDS
    traces: Mapping[str, LoadTrace] = field(default_factory=dict)
    seed: int = 0
    drift: bool = True

    def __post_init__(self) -> None:
        for name in self.shapes:
            if name not in SHAPES:
                raise ConfigError(f"there is no shape {name!r}: there are {', '.join(SHAPES)}")
        if not self.load_kinds and not self.traces:
            raise ConfigError("no load to plan for: name a kind of load or a trace")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")


def compare_plans(
    spec: PlanSpec, progress: Callable[[str, int, int], None] = lambda *_: None
) -> BenchOutcome:
    """Measure every case.

    Args:
        spec: what is compared.
        progress: is told what comes next, how many cases are done, and how many there are.
    Collective: none.
    """
    FlowPolicy()  # compiled before anything is timed
    cases = _list_cases(spec)
    rows: list[Row] = []
    for done, (name, measure) in enumerate(cases):
        progress(name, done, len(cases))
        rows += measure()
    return BenchOutcome(
        name="plan",
        setting={
            "shapes": list(spec.shapes),
            "loads": [*spec.load_kinds, *spec.traces],
            "seed": spec.seed,
            "drift": spec.drift,
            "threads": 1,
        },
        rows=tuple(rows),
        notes=_notes(spec),
        versions={"numpy": np.__version__, "numba": numba.__version__},
    )


def _list_cases(spec: PlanSpec) -> list[tuple[str, Callable[[], list[Row]]]]:
    cases: list[tuple[str, Callable[[], list[Row]]]] = []
    for name in spec.shapes:
        shape = SHAPES[name]
        loads: dict[str, IntArray] = {
            kind: draw_load(kind, shape, spec.seed) for kind in spec.load_kinds
        }
        for trace_name, trace in spec.traces.items():
            loads[trace_name] = resample_trace(trace, shape, 1, spec.seed)[0]
        for load_name, load in loads.items():
            cases += [
                (goal.case, partial(measure_fresh, goal, load, load_name))
                for goal in FRESH_GOALS
                if goal.shape is shape
            ]
            cases.append((f"{name} packing", partial(measure_packing, shape, load, load_name)))
        if spec.drift:
            cases += _list_drifts(spec, name)
    return cases


def _list_drifts(spec: PlanSpec, name: str) -> list[tuple[str, Callable[[], list[Row]]]]:
    cases: list[tuple[str, Callable[[], list[Row]]]] = []
    shape = SHAPES[name]
    for goal in DRIFT_GOALS:
        if goal.shape is shape:
            windows = walk_load(shape, goal.step, NUM_WINDOWS, spec.seed)
            case = partial(measure_drift, goal, windows)
            cases.append((f"{name} drift", case))
    if name in NEXT_BUDGETS:
        walk = walk_load(shape, DRIFT, NUM_WINDOWS, spec.seed)
        drifting = {f"walk {DRIFT}": walk}
        for trace_name, trace in spec.traces.items():
            if trace.num_steps >= NUM_WINDOWS:
                drifting[trace_name] = resample_trace(trace, shape, NUM_WINDOWS, spec.seed)
        for load_name, windows in drifting.items():
            next_window = partial(measure_next_window, shape, windows, load_name)
            cases.append((f"{name} next window", next_window))
    return cases


def _notes(spec: PlanSpec) -> tuple[str, ...]:
    notes = [
        "balance: mean over busiest rank's tokens, mean over layers. bound: largest of mean load, "
        "least possible largest slot and, for two slots per rank, the pairing bound; strict: over "
        "all ways to give nodes their groups.",
        "time: the fastest of several runs in turns, one thread. received: experts that ranks "
        "receive per plan, as a fraction of slots; matched: if ranks are renamed after what stood "
        "first. Ours as received is compared with deepseek's matched.",
        "No case needs a GPU.",
    ]
    short = [name for name, trace in spec.traces.items() if trace.num_steps < NUM_WINDOWS]
    if short and spec.drift:
        notes.append(
            f"no next window for {', '.join(short)}: fewer than {NUM_WINDOWS} steps to part"
        )
    if spec.drift and "R1000" in spec.shapes:
        notes.append("R1000 is planned from nothing only: no goal is set for its drift")
    return tuple(notes)
