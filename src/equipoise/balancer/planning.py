"""From a window's load to a plan: the policy's choice, less what does not pay."""

from __future__ import annotations

import logging

from equipoise.config import EPLBConfig
from equipoise.placement import Placement, measure_balancedness, spread_load
from equipoise.plan.gate import MoveCosts, keep_layers, weigh_moves
from equipoise.plan.slot_order import keep_slots
from equipoise.plan.transfer_plan import TransferPlan, make_plan
from equipoise.policy.base import PlacementPolicy
from equipoise.topology import IntArray

logger = logging.getLogger(__name__)


def plan_moves(
    policy: PlacementPolicy,
    load: IntArray,
    standing: Placement,
    expert_bytes: IntArray,
    config: EPLBConfig,
    costs: MoveCosts | None,
    *,
    says: bool,
) -> TransferPlan:
    """Plan what moves now.

    Args:
        policy: makes placements.
        load: [L, E] int64, tokens per expert over the window, over all ranks.
        standing: the placement in force.
        expert_bytes: [L] int64, bytes of one expert.
        config: has the threshold, and what a token costs.
        costs: the slowest rank's, as measured; None where nothing was yet: then all pays.
        says: whether to log what was skipped, and why.
    Returns:
        A plan, which may move nothing.
    Collective: none; the same on every rank for the same input.
    """
    threshold = config.balancedness_threshold
    balancedness = float(measure_balancedness(spread_load(load, standing)).mean())
    if threshold is not None and balancedness >= threshold:
        if says:
            logger.info(
                "nothing planned: balancedness %.3f is %.3f or more", balancedness, threshold
            )
        return make_plan(standing, standing)
    target = policy.place(load, standing.topology, standing=standing)
    plan = make_plan(standing, keep_slots(standing, target))
    if config.token_us is None or costs is None:
        return plan
    verdict = weigh_moves(
        plan,
        load,
        expert_bytes,
        costs,
        token_s=config.token_us * 1e-6,
        num_steps=config.step_interval / config.window_size,
    )
    if not verdict.skipped.size:
        return plan
    if says:
        logger.info("%s", verdict)
    return make_plan(standing, keep_layers(standing, plan.new, verdict.skipped))
