"""`equipoise replay`: what other placements would have been worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from equipoise.cli.load_options import (
    DEEPSEEK_EXPERT_BYTES,
    ExpertBytes,
    FirstLayer,
    JsonPath,
    LinkGbPerS,
    NumExperts,
    NumGroups,
    NumNodes,
    parse_list,
    read_measurements,
)
from equipoise.errors import ConfigError

if TYPE_CHECKING:
    from equipoise.load.trace import LoadTrace
    from equipoise.load.trace_routes import Serving
    from equipoise.sim.recommend import Replay
    from equipoise.sim.replay import Configuration, Setting

GPTOSS_EXPERT_BYTES = 13_219_200
_PLAYED, _SERVED, _COST = "What is played", "How routes were served", "Cost"


def replay(
    traces: Annotated[
        list[Path] | None, typer.Argument(help="Load files, played one after another.")
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Play a bundled trace of gpt-oss.")] = False,
    ranks: Annotated[int, typer.Option(help="Expert-parallel ranks.")] = 8,
    nodes: NumNodes = 1,
    groups: NumGroups = 1,
    policies: Annotated[
        str, typer.Option(help="Names with commas, or all.", rich_help_panel=_PLAYED)
    ] = "all",
    intervals: Annotated[
        str | None,
        typer.Option(
            help="Steps between plans, with commas; `once` plans at the start alone.",
            rich_help_panel=_PLAYED,
        ),
    ] = None,
    redundant_experts: Annotated[
        str, typer.Option(help="Numbers with commas, or auto.", rich_help_panel=_PLAYED)
    ] = "auto",
    budgets: Annotated[
        str,
        typer.Option(
            help="Fractions of slots that a plan of flow may refill.", rich_help_panel=_PLAYED
        ),
    ] = "0.05",
    warm_up: Annotated[
        int | None,
        typer.Option(help="Steps that the first plan sees, not judged.", rich_help_panel=_PLAYED),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Steps that a plan sees; by default since the last.", rich_help_panel=_PLAYED
        ),
    ] = None,
    in_flight: Annotated[
        int | None,
        typer.Option(help="Sequences side by side; 64.", rich_help_panel=_SERVED),
    ] = None,
    tokens_per_step: Annotated[
        int | None,
        typer.Option(help="Tokens of each in a step; 1.", rich_help_panel=_SERVED),
    ] = None,
    order: Annotated[
        Literal["by-domain", "interleaved"],
        typer.Option(help="Domains in turn, or mixed.", rich_help_panel=_SERVED),
    ] = "by-domain",
    num_experts: NumExperts = None,
    first_layer: FirstLayer = 0,
    step_ms: Annotated[
        float, typer.Option(help="Time of a balanced step.", rich_help_panel=_COST)
    ] = 20.0,
    expert_share: Annotated[
        float,
        typer.Option(
            help="Of it, what grows with the slowest rank's tokens.", rich_help_panel=_COST
        ),
    ] = 0.4,
    measurements: Annotated[
        Path | None,
        typer.Option(
            help="Tokens and seconds of a layer's experts (CSV, JSON), instead.",
            rich_help_panel=_COST,
        ),
    ] = None,
    stall_ms: Annotated[
        float, typer.Option(help="Of each rebalance, beside moves.", rich_help_panel=_COST)
    ] = 0.0,
    expert_bytes: ExpertBytes = None,
    link_gb_per_s: LinkGbPerS = 50.0,
    json_path: JsonPath = None,
    report: Annotated[Path | None, typer.Option(help="Write one HTML file.")] = None,
) -> None:
    """Play recorded load against policies, and say what each would have gained."""
    from equipoise.load.trace_routes import Serving
    from equipoise.report.files import check_writable
    from equipoise.sim.cost import CostModel, fit_times, share_times
    from equipoise.sim.replay import Setting

    for path, flag in ((json_path, "--json"), (report, "--report")):
        if path is not None:
            check_writable(path, flag)
    # The excerpt has too few sequences to keep many places taken.
    usual_in_flight, usual_tokens = (24, 4) if demo else (64, 1)
    serving = Serving(
        num_in_flight=usual_in_flight if in_flight is None else in_flight,
        tokens_per_step=usual_tokens if tokens_per_step is None else tokens_per_step,
        order=order,
    )
    paths = _choose_paths(traces or [], demo)
    trace, name = _read(paths, num_experts, first_layer, serving)
    usual_bytes = GPTOSS_EXPERT_BYTES if demo else DEEPSEEK_EXPERT_BYTES
    layer_s, token_s = (
        fit_times(*read_measurements(measurements))
        if measurements
        else share_times(trace, ranks, step_ms / 1e3, expert_share)
    )
    cost = CostModel(
        layer_s=layer_s,
        token_s=token_s,
        expert_bytes=usual_bytes if expert_bytes is None else expert_bytes,
        link_gb_per_s=link_gb_per_s,
        stall_s=stall_ms / 1e3,
    )
    played = _choose_intervals(intervals, trace, demo)
    longest = max((steps for steps in played if steps), default=1)
    warm_up_steps = max(1, min(trace.num_steps // 4, longest)) if warm_up is None else warm_up
    setting = Setting(
        cost=cost, warm_up_steps=warm_up_steps, window_steps=window, num_groups=groups
    )
    configurations = _combine(
        policies, played, redundant_experts, budgets, trace.num_experts, ranks, nodes
    )
    _show(_play(trace, configurations, setting), name, json_path, report, demo)


def _choose_paths(traces: list[Path], demo: bool) -> list[Path]:
    from equipoise.bundled.traces import gptoss_routes

    if demo == bool(traces):
        raise ConfigError("give load files to play, or --demo for a bundled one")
    return [gptoss_routes()] if demo else traces


def _read(
    paths: list[Path], num_experts: int | None, first_layer: int, serving: Serving
) -> tuple[LoadTrace, str]:
    from equipoise.load.trace import join_traces
    from equipoise.load.trace_files import read_trace

    read = [
        read_trace(path, num_experts=num_experts, first_layer=first_layer, serving=serving)
        for path in paths
    ]
    names = [path.name for path in paths]
    return join_traces(read, names), names[0] if len(names) == 1 else f"{len(names)} files"


def _choose_intervals(text: str | None, trace: LoadTrace, demo: bool) -> list[int | None]:
    """Steps between plans, None for a single plan."""
    if text is not None:
        return [
            None if steps == 0 else steps
            for steps in parse_list(text, "--intervals", _parse_interval)
        ]
    if demo:
        return [10, 50, None]
    return list(dict.fromkeys([max(1, trace.num_steps // 50), max(1, trace.num_steps // 10), None]))


def _parse_interval(word: str) -> int:
    """Steps, and 0 for `once`."""
    steps = 0 if word == "once" else int(word)
    if steps < (word != "once"):
        raise ValueError(word)
    return steps


def _combine(
    policies: str,
    intervals: list[int | None],
    redundant: str,
    budgets: str,
    num_experts: int,
    num_ranks: int,
    num_nodes: int,
) -> tuple[Configuration, ...]:
    from equipoise.policy import find_policy, list_policies
    from equipoise.sim.recommend import make_configurations
    from equipoise.topology import Topology, choose_num_redundant

    names = list_policies() if policies == "all" else parse_list(policies, "--policies", str)
    for name in names:
        find_policy(name)
    spares = parse_list(
        redundant, "--redundant-experts", lambda word: None if word == "auto" else int(word)
    )
    if num_ranks < 1:
        raise ConfigError(f"--ranks must be at least 1, got {num_ranks}")
    topologies = [
        Topology(
            num_ranks,
            (num_experts + choose_num_redundant(num_experts, num_ranks, spare)) // num_ranks,
            num_nodes,
        )
        for spare in spares
    ]
    return make_configurations(
        names, intervals, topologies, parse_list(budgets, "--budgets", float)
    )


def _play(trace: LoadTrace, configurations: tuple[Configuration, ...], setting: Setting) -> Replay:
    from rich.console import Console
    from rich.progress import Progress

    from equipoise.sim.recommend import Replay, describe
    from equipoise.sim.replay import IN_ORDER, Configuration, play
    from equipoise.topology import Topology

    given = configurations[0].topology
    # As engines start without balancing: no more slots than it takes to hold all experts.
    least = Topology(given.num_ranks, -(-trace.num_experts // given.num_ranks), given.num_nodes)
    baseline = Configuration(policy=IN_ORDER, topology=least)
    judged = trace.num_steps - setting.warm_up_steps
    outcomes = []
    # On the terminal alone, so that what is printed can be piped.
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=judged * (1 + len(configurations)))
        for one in (baseline, *configurations):
            progress.update(task, description=describe(one))
            outcomes.append(play(trace, one, setting, lambda steps: progress.advance(task, steps)))
    return Replay(trace, setting, outcomes[0], tuple(outcomes[1:]))


def _show(
    result: Replay, name: str, json_path: Path | None, report: Path | None, demo: bool
) -> None:
    import json

    from rich.console import Console

    from equipoise.report.files import write_atomically
    from equipoise.report.replay_html import write_replay_html
    from equipoise.report.replay_tables import (
        describe_cost,
        describe_trace,
        make_replay_result,
        render_replay,
        write_demo_sentence,
    )

    console = Console()
    for line in (describe_trace(result.trace, name), f"taken: {describe_cost(result)}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(render_replay(result))
    sentence = write_demo_sentence(result) if demo else None
    if sentence is not None:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    if json_path is not None:
        text = json.dumps(make_replay_result(result), indent=2, allow_nan=False)
        write_atomically(json_path, text + "\n")
    if report is not None:
        write_atomically(report, write_replay_html(result, name))
