"""`equipoise plan`: a placement from a load file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

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


def plan(
    load: Annotated[Path, typer.Argument(help="Load file: trace, recorder dump or counts.")],
    ranks: Annotated[int | None, typer.Option(help="Expert-parallel ranks.")] = None,
    slots_per_rank: Annotated[int | None, typer.Option(help="Slots of each rank.")] = None,
    redundant_experts: Annotated[
        int | None,
        typer.Option(help="Slots beyond one per expert; by default the fewest that leave spares."),
    ] = None,
    nodes: NumNodes = 1,
    groups: NumGroups = 1,
    policy: Annotated[
        str, typer.Option(help="Who plans; `equipoise policies` lists them.")
    ] = "flow",
    previous: Annotated[
        Path | None, typer.Option(help="Placement that stands; plan from it.")
    ] = None,
    move_budget: Annotated[
        float | None, typer.Option(help="Most slots that flow may refill, as a fraction.")
    ] = None,
    hierarchy: Annotated[
        Literal["off", "strict", "relaxed"] | None,
        typer.Option(help="How flow keeps groups on nodes."),
    ] = None,
    survival: Annotated[
        Literal["off", "rank", "node"] | None,
        typer.Option(help="Whose death shall lose no expert, by flow."),
    ] = None,
    min_copies: Annotated[
        int | None, typer.Option(help="Ranks or nodes that must hold each expert then.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the placement.")] = None,
    format: Annotated[  # noqa: A002 - the word that users type
        Literal["equipoise", "sglang", "tensorrt-llm", "vllm-ascend"],
        typer.Option(help="Whose placement file to write."),
    ] = "equipoise",
    num_experts: NumExperts = None,
    first_layer: FirstLayer = 0,
    expert_bytes: ExpertBytes = None,
    link_gb_per_s: LinkGbPerS = 50.0,
    json_path: JsonPath = None,
) -> None:
    """Make a placement from a load file, and say what it would change."""
    import json

    from equipoise.load.trace_files import read_trace
    from equipoise.placement_files import write_placement
    from equipoise.report.files import check_writable, write_atomically
    from equipoise.report.proposal import make_proposal_result, render_proposal
    from equipoise.report.replay_tables import describe_trace
    from equipoise.sim.cost import CostModel
    from equipoise.sim.policies import FlowChoices, make_policy
    from equipoise.sim.proposal import propose

    for path, flag in ((output, "--output"), (json_path, "--json")):
        if path is not None:
            check_writable(path, flag)
    # Of a plan only the bytes are asked for: what a step takes is not known.
    cost = CostModel(
        layer_s=0.0,
        token_s=1.0,
        expert_bytes=DEEPSEEK_EXPERT_BYTES if expert_bytes is None else expert_bytes,
        link_gb_per_s=link_gb_per_s,
    )
    choices = FlowChoices(
        move_budget=move_budget, hierarchy=hierarchy, survival=survival, min_copies=min_copies
    )
    trace = read_trace(load, num_experts=num_experts, first_layer=first_layer)
    topology = _choose_topology(ranks, slots_per_rank, redundant_experts, nodes, trace.num_experts)
    standing = _read_standing(previous, topology, trace.num_experts, first_layer)
    if topology is None:
        assert standing is not None
        topology = standing.topology
    maker = make_policy(policy, groups, choices)
    proposal = propose(trace.total(), topology, maker, standing)

    console = Console()
    console.print(describe_trace(trace, str(load)), markup=False, highlight=False, soft_wrap=True)
    before = "in order" if previous is None else "previous"
    console.print(render_proposal(proposal, policy, before, cost))
    if output is not None:
        write_placement(proposal.plan.new, output, format, first_layer=first_layer)
        line = f"wrote {output} for {format}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if json_path is not None:
        result = make_proposal_result(proposal, policy, cost)
        write_atomically(json_path, json.dumps(result, indent=2, allow_nan=False) + "\n")


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
