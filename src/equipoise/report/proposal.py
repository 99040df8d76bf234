"""What a proposed placement would change, for a terminal and for programs."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from equipoise.report.wording import say_bytes, say_count, say_seconds
from equipoise.sim.cost import CostModel
from equipoise.sim.proposal import Proposal
from equipoise.topology import FloatArray

FORMAT_VERSION = 1
MOST_RANKS = 16
"""Ranks that a table shows; of more, those that are heaviest before."""


def render_proposal(
    proposal: Proposal, policy: str, before: str, cost: CostModel
) -> RenderableType:
    """Tables of what changes.

    Args:
        proposal: the plan.
        policy: who made it.
        before: what stands, in words.
        cost: what moves cost.
    """
    num_ranks = proposal.plan.new.topology.num_ranks
    ranks = "Load of each rank over its share, all layers"
    if num_ranks > MOST_RANKS:
        ranks += f": the {MOST_RANKS} of {num_ranks} that are heaviest {before}"
    return Group(
        Text("Balancedness, mean over largest rank load; 1 is perfect", "dim"),
        _render_balance(proposal, policy, before),
        Text("Slots and moves", "dim"),
        _render_moves(proposal, cost),
        Text(ranks, "dim"),
        _render_ranks(proposal, policy, before),
    )


def make_proposal_result(proposal: Proposal, policy: str, cost: CostModel) -> dict[str, Any]:
    """The object that `equipoise plan --json` writes: plain values alone."""
    new, plan = proposal.plan.new, proposal.plan
    return {
        "format_version": FORMAT_VERSION,
        "policy": policy,
        "layers": new.num_layers,
        "experts": new.num_experts,
        "ranks": new.topology.num_ranks,
        "nodes": new.topology.num_nodes,
        "slots_per_rank": new.topology.slots_per_rank,
        "slots": new.num_slots,
        "redundant_experts": new.num_slots - new.num_experts,
        "most_replicas": int(new.replica_counts.max()),
        "fingerprint": new.fingerprint(),
        "balancedness": {
            when: {"mean": float(of.mean()), "worst": float(of.min()), "per_layer": of.tolist()}
            for when, of in (
                ("before", proposal.balancedness_before),
                ("after", proposal.balancedness_after),
            )
        },
        "rank_load": {
            when: _share(of).tolist()
            for when, of in (
                ("before", proposal.rank_load_before),
                ("after", proposal.rank_load_after),
            )
        },
        "moves": plan.num_moves,
        "moves_per_layer": plan.moves_per_layer.tolist(),
        "local_moves": int(plan.is_local.sum()),
        "bytes": plan.num_moves * cost.expert_bytes,
        "transfer_s": cost.transfer_s(plan),
        "expert_bytes": cost.expert_bytes,
        "link_gb_per_s": cost.link_gb_per_s,
    }


def _render_balance(proposal: Proposal, policy: str, before: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", before, f"by {policy}"):
        table.add_column(name, justify="right" if name else "left")
    was, now = proposal.balancedness_before, proposal.balancedness_after
    table.add_row("mean of layers", f"{was.mean():.3f}", f"{now.mean():.3f}")
    table.add_row("worst layer", *(f"{of.min():.3f} (layer {of.argmin()})" for of in (was, now)))
    return table


def _render_moves(proposal: Proposal, cost: CostModel) -> Table:
    plan = proposal.plan
    new = plan.new
    redundant = new.num_slots - new.num_experts
    received = np.bincount(plan.dst_rank[~plan.is_local], minlength=new.topology.num_ranks)
    share = plan.num_moves / (new.num_layers * new.num_slots)
    table = Table.grid("", "", padding=(0, 2))
    table.add_row(
        "slots",
        f"{new.num_slots} per layer, {new.topology.slots_per_rank} on each of "
        f"{new.topology.num_ranks} ranks; {redundant} redundant, an expert has up to "
        f"{new.replica_counts.max()}",
    )
    table.add_row(
        "moves",
        f"{say_count(plan.num_moves, 'expert')} received ({share:.1%} of all slots), "
        f"up to {received.max():,} by one rank; {int(plan.is_local.sum()):,} copied within ranks",
    )
    table.add_row(
        "cost",
        f"{say_bytes(plan.num_moves * cost.expert_bytes)}, {say_seconds(cost.transfer_s(plan))} "
        f"at {say_bytes(cost.expert_bytes)} an expert and {cost.link_gb_per_s:g} GB/s a rank",
    )
    return table


def _render_ranks(proposal: Proposal, policy: str, before: str) -> Table:
    was, now = _share(proposal.rank_load_before), _share(proposal.rank_load_after)
    shown = np.sort(np.argsort(-was, kind="stable")[:MOST_RANKS])
    table = Table(box=None, pad_edge=False)
    for name in ("rank", before, f"by {policy}"):
        table.add_column(name, justify="right")
    for rank in shown:
        table.add_row(str(rank), f"{was[rank]:.2f}", f"{now[rank]:.2f}")
    return table


def _share(rank_load: FloatArray) -> FloatArray:
    """[R] load over all layers, over what each rank would have if all had the same."""
    total = rank_load.sum(axis=0)
    return np.asarray(total / total.mean(), dtype=np.float64)
