"""Plans from a standing placement: what few moves keep of the balance, now and in the next window.

`deepseek` plans the same windows anew, each time from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from equipoise.bench.outcome import Row, with_goal
from equipoise.bench.plan_bounds import bound_peak
from equipoise.bench.plan_fresh import balance_of
from equipoise.bench.plan_loads import SHAPES, Shape
from equipoise.placement import Placement
from equipoise.plan.transfer_plan import make_plan
from equipoise.policy.base import PlacementPolicy
from equipoise.policy.deepseek import DeepSeekPolicy
from equipoise.policy.flow import FlowOptions, FlowPolicy
from equipoise.sim.proposal import count_matched
from equipoise.topology import IntArray

STEADY, DRIFT = 0.03, 0.1
"""Steps of the random walk."""
NEXT_WINDOW = -0.005
"""Balance that may be lost against planning anew, in the window that follows."""
NEXT_RECEIVED, NEXT_RECEIVED_PAIRS = 1 / 7, 1 / 4
"""Experts received, as a fraction of what planning anew receives."""


@dataclass(frozen=True)
class DriftGoal:
    """Balance that a move budget shall keep while the load drifts.

    Attributes:
        shape: of ranks and experts.
        step: of the random walk of log-loads, per window.
        budget: fraction of slots that may be received per plan.
        of_bound: fraction of the bound that plans shall have.
    """

    shape: Shape
    step: float
    budget: float
    of_bound: float


DRIFT_GOALS = (
    *(
        DriftGoal(SHAPES[name], *numbers)
        for name in ("EP32", "Qwen")
        for numbers in ((STEADY, 0.02, 0.985), (DRIFT, 0.05, 0.98), (DRIFT, 0.10, 0.99))
    ),
    DriftGoal(SHAPES["EP64"], STEADY, 0.05, 0.98),
    DriftGoal(SHAPES["EP64"], DRIFT, 0.10, 0.975),
    DriftGoal(SHAPES["Kimi"], STEADY, 0.05, 0.99),
    DriftGoal(SHAPES["Kimi"], DRIFT, 0.10, 0.985),
)
NEXT_BUDGETS = {"EP32": 0.1, "Qwen": 0.1, "EP64": 0.1, "Kimi": 0.1, "EP144": 0.12, "EP256": 0.13}
"""Fraction of slots received per plan where the next window is looked at."""


@dataclass(frozen=True)
class Course:
    """How plans of one policy fared, one window after the other; means over plans.

    Attributes:
        planned: balancedness of the window that was planned from.
        following: of the next one.
        received: experts received, as a fraction of slots.
        matched: the same if ranks had been renamed after what stood.
    """

    planned: float
    following: float
    received: float
    matched: float

    @property
    def said(self) -> str:
        """Both counts of what was received."""
        return f"{self.received:.1%} ({self.matched:.1%})"


def follow(policy: PlacementPolicy, windows: IntArray, shape: Shape) -> Course:
    """Plan every window from the placement before it; the first from nothing, and not counted.

    Args:
        policy: who plans.
        windows: [W, L, E] int64, W of 3 or more; the last is only looked at.
        shape: of ranks and experts.
    Collective: none.
    """
    standing = policy.place(windows[0], shape.topology)
    figures = []
    for now, following in pairwise(windows[1:]):
        new = policy.place(now, shape.topology, standing=standing)
        figures.append(
            (
                balance_of(now, new),
                balance_of(following, new),
                make_plan(standing, new).num_moves / _num_slots(new),
                count_matched(standing, new, within_nodes=False) / _num_slots(new),
            )
        )
        standing = new
    planned, after, received, matched = np.mean(figures, axis=0)
    return Course(float(planned), float(after), float(received), float(matched))


def measure_drift(goal: DriftGoal, windows: IntArray) -> list[Row]:
    """Follow a drifting load on a budget.

    Args:
        goal: shape, budget, and the balance to be kept.
        windows: [W, L, E] int64.
    Collective: none.
    """
    shape = goal.shape
    course = follow(FlowPolicy(FlowOptions(move_budget=goal.budget)), windows, shape)
    bound = _bound(windows, shape)
    row: Row = {
        "part": "drift",
        "case": f"{shape.name} at {goal.budget:.0%}",
        "load": f"walk {goal.step}",
        "what": "balance planned / bound",
        "value": course.planned / bound,
        "bound": bound,
        "balance": course.planned,
        "budget": goal.budget,
        "received": course.received,
        "received_matched": course.matched,
        "received_said": course.said,
    }
    return [with_goal(row, "value", goal.of_bound)]


def measure_next_window(shape: Shape, windows: IntArray, load_name: str) -> list[Row]:
    """Compare with planning anew, in the window that follows and, for pairs, in that planned.

    Args:
        shape: of ranks and experts.
        windows: [W, L, E] int64.
        load_name: as tables call it.
    Collective: none.
    """
    budget = NEXT_BUDGETS[shape.name]
    ours = follow(FlowPolicy(FlowOptions(move_budget=budget)), windows, shape)
    anew = follow(DeepSeekPolicy(), windows, shape)
    facts: Row = {
        "part": "next window",
        "case": f"{shape.name} at {budget:.0%}",
        "load": load_name,
        "budget": budget,
        "balance": ours.planned,
        "deepseek_balance": anew.planned,
        "following": ours.following,
        "deepseek_following": anew.following,
        "received": ours.received,
        "received_matched": ours.matched,
        "received_said": ours.said,
        "deepseek_received": anew.received,
        "deepseek_received_matched": anew.matched,
        "deepseek_received_said": anew.said,
    }
    gained: Row = {"what": "next window - deepseek's", "value": ours.following - anew.following}
    moved: Row = {"what": "received / deepseek's", "value": ours.received / anew.matched}
    fewer = NEXT_RECEIVED_PAIRS if shape.in_pairs else NEXT_RECEIVED
    rows = [
        with_goal(facts | gained, "value", NEXT_WINDOW),
        with_goal(facts | moved, "value", fewer, at_most=True),
    ]
    if shape.in_pairs:
        said: Row = {"what": "planned / deepseek's", "value": ours.planned / anew.planned}
        rows.append(with_goal(facts | said, "value", 1.0))
    return rows


def _bound(windows: IntArray, shape: Shape) -> float:
    """Balancedness that no plan of these windows exceeds, mean over plans and layers."""
    planned = windows[1:-1].reshape(-1, windows.shape[2])
    peak = bound_peak(planned, shape.topology)
    return float((planned.sum(axis=1) / shape.topology.num_ranks / peak).mean())


def _num_slots(placement: Placement) -> int:
    return placement.num_layers * placement.num_slots
