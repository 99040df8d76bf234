"""Whether moving a layer's experts pays before the next plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.placement import Placement, spread_load
from equipoise.plan.transfer_plan import TransferPlan
from equipoise.topology import FloatArray, IntArray


@dataclass(frozen=True)
class MoveCosts:
    """What ranks have measured; the slowest rank's, so that all decide alike.

    Attributes:
        byte_s: seconds for each byte that a rank receives.
        layer_s: seconds of the forward thread for each layer committed.
    """

    byte_s: float
    layer_s: float


@dataclass(frozen=True)
class Verdict:
    """What each layer's moves are worth.

    Attributes:
        saved_s: [L] float64, seconds that they save until the next plan.
        cost_s: [L] float64, seconds that they cost.
    """

    saved_s: FloatArray
    cost_s: FloatArray

    @property
    def skipped(self) -> IntArray:
        """Layers whose moves cost more than they save."""
        return np.flatnonzero((self.cost_s > 0) & (self.saved_s < self.cost_s))

    def __str__(self) -> str:
        skipped = self.skipped
        saved, cost = self.saved_s[skipped].sum(), self.cost_s[skipped].sum()
        layers = f"{len(skipped)} layer" + ("" if len(skipped) == 1 else "s")
        return f"{layers} skipped: saves {saved * 1e3:.3g} ms, costs {cost * 1e3:.3g}"


def weigh_moves(
    plan: TransferPlan,
    load: IntArray,
    expert_bytes: IntArray,
    costs: MoveCosts,
    *,
    token_s: float,
    num_steps: float,
) -> Verdict:
    """Compare what a plan saves with what it costs, layer by layer.

    A step waits for the busiest rank in every layer, so a layer saves its tokens before less those
    after. Bytes travel beside the steps, and take from them what they take from the link.

    Args:
        plan: from the placement that stands to the one that may follow.
        load: [L, E] int64, tokens per expert over the window.
        expert_bytes: [L] int64, bytes of one expert.
        costs: as measured.
        token_s: seconds that a layer's step grows by with each token on the busiest rank.
        num_steps: steps until the next plan, over those of the window.
    Collective: none; the same on every rank for the same input.
    """
    before, after = (spread_load(load, one).max(axis=1) for one in (plan.old, plan.new))
    saved = (before - after) * token_s * num_steps
    ranks = plan.old.topology.num_ranks
    travels = ~plan.is_local
    cell = plan.layer[travels] * ranks + plan.dst_rank[travels]
    received = np.bincount(cell, minlength=plan.old.num_layers * ranks).reshape(-1, ranks)
    moved = np.zeros(plan.old.num_layers, dtype=bool)
    moved[plan.layer] = True
    cost = received.max(axis=1) * expert_bytes * costs.byte_s + moved * costs.layer_s
    return Verdict(saved, cost)


def keep_layers(standing: Placement, target: Placement, layers: IntArray) -> Placement:
    """The target, with these layers as they stand."""
    table = target.slot_to_expert.copy()
    table[layers] = standing.slot_to_expert[layers]
    return Placement(table, target.num_experts, target.topology)
