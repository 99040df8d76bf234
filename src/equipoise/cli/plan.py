"""`equipoise plan`: a placement from a load file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from equipoise.cli import plan_options as options
from equipoise.cli.load_options import (
    DEEPSEEK_EXPERT_BYTES,
    ExpertBytes,
    FirstLayer,
    JsonPath,
    LinkGbPerS,
    NumExperts,
    NumGroups,
    NumNodes,
)
from equipoise.errors import ConfigError
from equipoise.placement import Placement
from equipoise.topology import Topology, choose_num_redundant

if TYPE_CHECKING:
    from equipoise.sim.cost import CostModel
    from equipoise.sim.proposal import Proposal


def plan(
    load: options.Load,
    ranks: options.Ranks = None,
    slots_per_rank: options.SlotsPerRank = None,
    redundant_experts: options.RedundantExperts = None,
    nodes: NumNodes = 1,
    groups: NumGroups = 1,
    policy: options.Policy = "flow",
    previous: options.Previous = None,
    move_budget: options.MoveBudget = None,
    hierarchy: options.Hierarchy = None,
    survival: options.Survival = None,
    min_copies: options.MinCopies = None,
    output: options.Output = None,
    format: options.Format = "equipoise",  # noqa: A002 - the word that users type
    num_experts: NumExperts = None,
    first_layer: FirstLayer = 0,
    expert_bytes: ExpertBytes = None,
    link_gb_per_s: LinkGbPerS = 50.0,
    json_path: JsonPath = None,
) -> None:
    """Make a placement from a load file, and say what it would change."""
    from equipoise.load.trace_files import read_trace
    from equipoise.placement_files import write_placement
    from equipoise.report.files import check_writable
    from equipoise.report.replay_tables import describe_trace
    from equipoise.sim.policies import FlowChoices, make_policy
    from equipoise.sim.proposal import propose

    for path, flag in ((output, "--output"), (json_path, "--json")):
        if path is not None:
            check_writable(path, flag)
    choices = FlowChoices(
        move_budget=move_budget, hierarchy=hierarchy, survival=survival, min_copies=min_copies
    )
    trace = read_trace(load, num_experts=num_experts, first_layer=first_layer)
    topology = _choose_topology(ranks, slots_per_rank, redundant_experts, nodes, trace.num_experts)
    standing = _read_standing(previous, topology, trace.num_experts, first_layer)
    if topology is None:
        assert standing is not None
        topology = standing.topology
    proposal = propose(trace.total(), topology, make_policy(policy, groups, choices), standing)
    _say(describe_trace(trace, str(load)))
    _show(proposal, policy, standing, _price(expert_bytes, link_gb_per_s), json_path)
    if output is not None:
        write_placement(proposal.plan.new, output, format, first_layer=first_layer)
        _say(f"wrote {output} for {format}")


def _price(expert_bytes: int | None, link_gb_per_s: float) -> CostModel:
    """Of a plan only the bytes are asked for: what a step takes is not known."""
    from equipoise.sim.cost import CostModel

    return CostModel(
        layer_s=0.0,
        token_s=1.0,
        expert_bytes=DEEPSEEK_EXPERT_BYTES if expert_bytes is None else expert_bytes,
        link_gb_per_s=link_gb_per_s,
    )


def _show(
    proposal: Proposal,
    policy: str,
    standing: Placement | None,
    cost: CostModel,
    json_path: Path | None,
) -> None:
    import json

    from equipoise.report.files import write_atomically
    from equipoise.report.proposal import make_proposal_result, render_proposal

    before = "in order" if standing is None else "previous"
    Console().print(render_proposal(proposal, policy, before, cost))
    if json_path is not None:
        result = make_proposal_result(proposal, policy, cost)
        write_atomically(json_path, json.dumps(result, indent=2, allow_nan=False) + "\n")


def _say(line: str) -> None:
    Console().print(line, markup=False, highlight=False, soft_wrap=True)


def _choose_topology(
    num_ranks: int | None,
    slots_per_rank: int | None,
    redundant: int | None,
    num_nodes: int,
    num_experts: int,
) -> Topology | None:
    """What the options say, or None where only the previous placement can."""
    if slots_per_rank is not None and redundant is not None:
        raise ConfigError("--slots-per-rank and --redundant-experts say the same: give one of them")
    if num_ranks is None:
        if slots_per_rank is not None or redundant is not None or num_nodes > 1:
            raise ConfigError("--slots-per-rank, --redundant-experts and --nodes need --ranks")
        return None
    if num_ranks < 1:
        raise ConfigError(f"--ranks must be at least 1, got {num_ranks}")
    if slots_per_rank is None:
        spare = choose_num_redundant(num_experts, num_ranks, redundant)
        slots_per_rank = (num_experts + spare) // num_ranks
    return Topology(num_ranks, slots_per_rank, num_nodes)


def _read_standing(
    path: Path | None, topology: Topology | None, num_experts: int, first_layer: int
) -> Placement | None:
    from equipoise.placement_files import read_placement

    if path is not None:
        return read_placement(
            path, num_experts=num_experts, topology=topology, first_layer=first_layer
        )
    if topology is None:
        raise ConfigError("say how many ranks there are by --ranks, or what stands by --previous")
    return None
