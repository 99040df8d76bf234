"""A plan from nothing."""

from __future__ import annotations

from equipoise.policy.flow.flat import place_flat
from equipoise.policy.flow.groups import place_in_groups
from equipoise.policy.flow.problem import Problem
from equipoise.topology import IntArray


def plan_fresh(problem: Problem) -> IntArray:
    """Place every layer without regard to what stands.

    Args:
        problem: load, ranks and options.
    Returns:
        slot_to_expert [L, P] int64.
    Collective: none.
    """
    return place_in_groups(problem) if problem.in_groups else place_flat(problem)
