"""`equipoise replay`: what other placements would have been worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.cli import replay_options as options
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


def replay(
    traces: options.Traces = None,
    demo: options.Demo = False,
    ranks: options.Ranks = 8,
    nodes: NumNodes = 1,
    groups: NumGroups = 1,
    policies: options.Policies = "all",
    intervals: options.Intervals = None,
    redundant_experts: options.RedundantExperts = "auto",
    budgets: options.Budgets = "0.05",
    warm_up: options.WarmUp = None,
    window: options.Window = None,
    in_flight: options.InFlight = None,
    tokens_per_step: options.TokensPerStep = None,
    order: options.Order = "by-domain",
    num_experts: NumExperts = None,
    first_layer: FirstLayer = 0,
    step_ms: options.StepMs = 20.0,
    expert_share: options.ExpertShare = 0.4,
    measurements: options.Measurements = None,
    stall_ms: options.StallMs = 0.0,
    expert_bytes: ExpertBytes = None,
    link_gb_per_s: LinkGbPerS = 50.0,
    json_path: JsonPath = None,
    report: options.Report = None,
) -> None:
    """Play recorded load against policies, and say what each would have gained."""
    from equipoise.report.files import check_writable
    from equipoise.sim.cost import CostModel
    from equipoise.sim.replay import Setting

    if ranks < 1:
        raise ConfigError(f"--ranks must be at least 1, got {ranks}")
    for path, flag in ((json_path, "--json"), (report, "--report")):
        if path is not None:
            check_writable(path, flag)
    paths = _choose_paths(traces or [], demo)
    serving = _choose_serving(in_flight, tokens_per_step, order, demo)
    trace, name = _read(paths, num_experts, first_layer, serving)
    usual_bytes = GPTOSS_EXPERT_BYTES if demo else DEEPSEEK_EXPERT_BYTES
    layer_s, token_s = _time_layer(trace, measurements, ranks, step_ms, expert_share)
    cost = CostModel(
        layer_s=layer_s,
        token_s=token_s,
        expert_bytes=usual_bytes if expert_bytes is None else expert_bytes,
        link_gb_per_s=link_gb_per_s,
        stall_s=stall_ms / 1e3,
    )
    played = _choose_intervals(intervals, trace, demo)
    warm_up_steps = _choose_warm_up(trace, played) if warm_up is None else warm_up
    setting = Setting(
        cost=cost, warm_up_steps=warm_up_steps, window_steps=window, num_groups=groups
    )
    configurations = _combine(
        policies, played, redundant_experts, budgets, trace.num_experts, ranks, nodes
    )
    _show(_play(trace, configurations, setting), name, json_path, report, demo)


def _choose_serving(
    in_flight: int | None, tokens_per_step: int | None, order: options.OrderName, demo: bool
) -> Serving:
    from equipoise.load.trace_routes import Serving

    # The excerpt has too few sequences to keep many places taken.
    usual_in_flight, usual_tokens = (24, 4) if demo else (64, 1)
    return Serving(
        num_in_flight=usual_in_flight if in_flight is None else in_flight,
        tokens_per_step=usual_tokens if tokens_per_step is None else tokens_per_step,
        order=order,
    )


def _time_layer(
    trace: LoadTrace,
    measurements: Path | None,
    num_ranks: int,
    step_ms: float,
    expert_share: float,
) -> tuple[float, float]:
    """Seconds of a layer, and of each token of its slowest rank."""
    from equipoise.sim.cost import fit_times, share_times

    if measurements is not None:
        return fit_times(*read_measurements(measurements))
    return share_times(trace, num_ranks, step_ms / 1e3, expert_share)


def _choose_warm_up(trace: LoadTrace, intervals: list[int | None]) -> int:
    longest = max((steps for steps in intervals if steps), default=1)
    return max(1, min(trace.num_steps // 4, longest))


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
