"""Plans from nothing: balance against its bound, and time against `deepseek` in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from equipoise.bench.outcome import Row, with_goal
from equipoise.bench.plan_bounds import bound_peak, bound_peak_in_groups
from equipoise.bench.plan_loads import SHAPES, Shape
from equipoise.placement import Placement, measure_balancedness, spread_load
from equipoise.policy.base import check_load
from equipoise.policy.deepseek import DeepSeekPolicy
from equipoise.policy.flow import FlowOptions, FlowPolicy, measure_leaving
from equipoise.policy.flow.flat import pack_alone
from equipoise.policy.flow.problem import pose
from equipoise.topology import FloatArray, IntArray

ROUNDS = 7
"""Each policy is timed so often, in turns; the fastest counts."""
MOST_LEAVING = 0.07
"""Fraction of tokens that a relaxed hierarchy may serve off their node."""
PACKING_SPEEDUP = 3.0
EQUAL_QUALITY = 0.999
"""Of `deepseek`'s balance: packing alone is compared at that, for its ties are other ones."""


@dataclass(frozen=True)
class FreshGoal:
    """What a plan from nothing shall reach.

    Attributes:
        shape: of ranks and experts.
        of_bound: fraction of the bound; None for what `deepseek` reaches.
        times: most time, as a multiple of `deepseek`'s.
        target: what the policy is told to reach.
        hierarchy: how groups are kept on nodes.
        of_bound_hard: the same as `of_bound` for zipf and dirichlet, where it is less.
        max_looks: changes that the policy may look at.
    """

    shape: Shape
    of_bound: float | None
    times: float
    target: float
    hierarchy: Literal["off", "strict", "relaxed"] = "off"
    of_bound_hard: float | None = None
    max_looks: int = FlowOptions.max_looks

    @property
    def case(self) -> str:
        """As tables call it."""
        if self.hierarchy != "off":
            return f"{self.shape.name} {self.hierarchy}"
        return f"{self.shape.name} global" if self.shape.num_groups > 1 else self.shape.name

    def of_bound_for(self, load_name: str) -> float | None:
        """Fraction of the bound for a load."""
        hard = load_name in ("zipf", "dirichlet") and self.of_bound_hard is not None
        return self.of_bound_hard if hard else self.of_bound

    @property
    def num_groups(self) -> int:
        """Groups that the plan is told of."""
        return 1 if self.hierarchy == "off" else self.shape.num_groups


FRESH_GOALS = (
    FreshGoal(SHAPES["EP32"], 0.995, 1.0, 0.996),
    FreshGoal(SHAPES["EP32"], 0.99, 1.0, 0.992, "strict"),
    FreshGoal(SHAPES["EP32"], 0.95, 5.0, 0.952, "relaxed"),
    FreshGoal(SHAPES["Qwen"], 0.995, 1.0, 0.995),
    FreshGoal(SHAPES["EP64"], 0.99, 2.0, 0.991),
    FreshGoal(SHAPES["EP64"], 0.995, 4.0, 0.996),
    FreshGoal(SHAPES["Kimi"], 0.99, 1.0, 0.991),
    FreshGoal(SHAPES["Kimi"], 0.995, 3.0, 0.996),
    FreshGoal(SHAPES["EP144"], 0.985, 20.0, 0.998),
    FreshGoal(SHAPES["EP256"], 0.98, 10.0, 0.985, of_bound_hard=0.94, max_looks=1_000_000),
    FreshGoal(SHAPES["R1000"], None, 1.0, 0.93),
)


def measure_fresh(goal: FreshGoal, load: IntArray, load_name: str) -> list[Row]:
    """Plan a load from nothing, by `flow` and `deepseek` in turns.

    Args:
        goal: shape, options and what shall be reached.
        load: [L, E] int64.
        load_name: as tables call it.
    Returns:
        A row each for balance, time, and in a relaxed hierarchy the tokens that leave.
    Collective: none.
    """
    topology, groups = goal.shape.topology, goal.num_groups
    options = FlowOptions(
        target=goal.target,
        num_groups=groups,
        hierarchy=goal.hierarchy,
        max_looks=goal.max_looks,
    )
    flow, deepseek = FlowPolicy(options), DeepSeekPolicy(groups)
    (planned, seconds), (published, deepseek_s) = _time_in_turns(
        lambda: flow.place(load, topology), lambda: deepseek.place(load, topology)
    )
    if goal.hierarchy == "strict":
        peak = bound_peak_in_groups(load, topology, groups)
    else:
        peak = bound_peak(load, topology)
    bound = _mean_balance(load, topology.num_ranks, peak)
    balance, deepseek_balance = balance_of(load, planned), balance_of(load, published)
    facts: Row = {
        "part": "from nothing",
        "case": goal.case,
        "load": load_name,
        "target": goal.target,
        "max_looks": goal.max_looks,
        "bound": bound,
        "balance": balance,
        "deepseek_balance": deepseek_balance,
        "seconds": seconds,
        "deepseek_seconds": deepseek_s,
    }
    of_bound = goal.of_bound_for(load_name)
    if of_bound is None:
        said = {"what": "balance / deepseek's", "value": balance / deepseek_balance}
        rows = [with_goal(facts | said, "value", 1.0)]
    else:
        said = {"what": "balance / bound", "value": balance / bound}
        said["deepseek"] = deepseek_balance / bound
        rows = [with_goal(facts | said, "value", of_bound)]
    said = {"what": "time / deepseek's", "value": seconds / deepseek_s}
    rows.append(with_goal(facts | said, "value", goal.times, at_most=True))
    if goal.hierarchy == "relaxed":
        said = {"what": "tokens leaving node", "value": measure_leaving(load, planned, groups)}
        rows.append(with_goal(facts | said, "value", MOST_LEAVING, at_most=True))
    return rows


def measure_packing(shape: Shape, load: IntArray, load_name: str) -> list[Row]:
    """Count and pack without any search, against `deepseek`, which does the same.

    Args:
        shape: of ranks and experts.
        load: [L, E] int64.
        load_name: as tables call it.
    Returns:
        A row for balance and one for time.
    Collective: none.
    """
    topology, options, deepseek = shape.topology, FlowOptions(), DeepSeekPolicy()

    def pack() -> Placement:
        table = pack_alone(pose(check_load(load, topology), topology, options))
        return Placement(table, shape.num_experts, topology)

    (packed, seconds), (published, deepseek_s) = _time_in_turns(
        pack, lambda: deepseek.place(load, topology)
    )
    balance, deepseek_balance = balance_of(load, packed), balance_of(load, published)
    facts: Row = {
        "part": "packing alone",
        "case": f"{shape.name} packing",
        "load": load_name,
        "balance": balance,
        "deepseek_balance": deepseek_balance,
        "seconds": seconds,
        "deepseek_seconds": deepseek_s,
    }
    quality = {"what": "balance / deepseek's", "value": balance / deepseek_balance}
    faster = {"what": "times faster", "value": deepseek_s / seconds}
    return [
        with_goal(facts | quality, "value", EQUAL_QUALITY),
        with_goal(facts | faster, "value", PACKING_SPEEDUP),
    ]


def balance_of(load: IntArray, placement: Placement) -> float:
    """Balancedness, mean over layers.

    Args:
        load: [L, E] int64.
        placement: of the same layers and experts.
    Collective: none.
    """
    return float(measure_balancedness(spread_load(load, placement)).mean())


def _mean_balance(load: IntArray, num_ranks: int, peak: FloatArray) -> float:
    return float((load.sum(axis=1) / num_ranks / peak).mean())


def _time_in_turns(*plans: Callable[[], Placement]) -> list[tuple[Placement, float]]:
    """What each gives, and the shortest time it took, in s."""
    results = [plan() for plan in plans]
    shortest = [float("inf")] * len(plans)
    for _ in range(ROUNDS):
        for at, plan in enumerate(plans):
            begin = time.perf_counter()
            plan()
            shortest[at] = min(shortest[at], time.perf_counter() - begin)
    return list(zip(results, shortest, strict=True))
