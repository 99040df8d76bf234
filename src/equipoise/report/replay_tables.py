"""What a replay found, for a terminal and for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from equipoise.load.trace import LoadTrace
from equipoise.report.wording import say_bytes, say_count, say_seconds
from equipoise.sim.recommend import Replay, describe, say_change, say_share
from equipoise.sim.replay import Outcome, Rebalance

FORMAT_VERSION = 1
COLUMNS = (
    "policy",
    "every",
    "slots",
    "plan",
    "next",
    "real",
    "moved",
    "match",
    "bytes",
    "lost",
    "gain",
    "net",
)
LEGEND = (
    "every: steps between plans. Balancedness: plan, of the load that a plan saw; next, of the "
    "sum of the steps after it; real, step by step, as time follows it. Experts received per "
    "plan, of all slots: moved, as the policy names ranks; match, had ranks been matched to what "
    "stood. bytes and lost time are of all plans but the first, which is where one begins. gain: "
    "step time saved against experts in order; net: less the time lost."
)
OF_SUMS = (
    "These are sums of unknown numbers of steps, each played as one step: what moves cost is not "
    "set against what they gain."
)


def describe_trace(trace: LoadTrace, name: str) -> str:
    """One line on a load."""
    what = say_count(trace.num_steps, "sum" if trace.is_sum else "step")
    what += " of unknown numbers of steps, each" if trace.is_sum else ""
    return (
        f"{name}: {what} of {trace.num_layers} layers x {trace.num_experts} "
        f"experts, {int(trace.counts.sum()):,} assignments of tokens"
    )


def describe_cost(replay: Replay) -> str:
    """One line on what time and moves are taken to cost."""
    cost = replay.setting.cost
    return (
        f"a layer takes {cost.layer_s * 1e6:,.4g} us and {cost.token_s * 1e6:,.4g} us for each "
        f"token of its slowest rank; an expert has {say_bytes(cost.expert_bytes)}, a rank's link "
        f"{cost.link_gb_per_s:g} GB/s; a rebalance stalls for {say_seconds(cost.stall_s)} beside "
        "the transfer"
    )


def render_replay(replay: Replay) -> RenderableType:
    """The table, what its columns are, and what is recommended."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "policy" else "right")
    chosen = replay.recommended()
    for outcome in (replay.baseline, *replay.outcomes):
        table.add_row(
            *list_cells(replay, outcome).values(), style="bold" if outcome is chosen else None
        )
    parts: list[RenderableType] = [table, Text(LEGEND, style="dim")]
    if replay.trace.is_sum:
        parts.append(Text(OF_SUMS))
    parts.append(Text(f"Recommended: {replay.reason()}" if chosen else replay.reason(), "bold"))
    return Group(*parts)


def list_cells(replay: Replay, outcome: Outcome) -> dict[str, str]:
    """A configuration's figures by column, as text."""
    made, slots = outcome.configuration, outcome.configuration.topology.num_slots
    plans, cells = len(outcome.rebalances), outcome.rank_load.shape[0] * slots
    planned = outcome.start is not None
    interval = "once" if made.interval_steps is None else f"{made.interval_steps:,}"
    budget = "" if made.move_budget is None else f" {made.move_budget * 100:.3g}%"
    matched = outcome.received_matched / (plans * cells) if plans else 0.0
    values = (
        f"{made.policy}{budget}",
        interval if planned else "never",
        str(slots),
        "" if outcome.planned is None else f"{outcome.planned:.3f}",
        "" if outcome.following is None else f"{outcome.following:.3f}",
        f"{outcome.realised:.3f}",
        f"{outcome.received_share:.1%}" if plans else "",
        f"{matched:.1%}" if plans else "",
        say_bytes(outcome.bytes) if plans else "",
        say_seconds(outcome.lost_s) if plans else "",
        say_share(replay.gain(outcome)) if planned else "",
        say_change(replay.net_gain(outcome)) if planned else "",
    )
    return dict(zip(COLUMNS, values, strict=True))


def write_demo_sentence(replay: Replay) -> str | None:
    """What planning anew moves and gains, and what `flow` does, each at its best interval.

    Args:
        replay: what was played.
    Returns:
        None if `deepseek` or `flow` was not played with a plan after the first.
    """
    best = {
        policy: replay.choose(outcomes)
        for policy in ("deepseek", "flow")
        if (
            outcomes := [
                one
                for one in replay.outcomes
                if one.configuration.policy == policy and one.rebalances
            ]
        )
    }
    if len(best) < 2:
        return None
    anew, flow = best.values()
    return (
        f"Planning anew every {anew.configuration.interval_steps} steps moves "
        f"{anew.received:,} experts ({say_bytes(anew.bytes)}) and gains "
        f"{say_share(replay.net_gain(anew))} of the step time; flow every "
        f"{flow.configuration.interval_steps} steps moves {flow.received:,} "
        f"({say_bytes(flow.bytes)}) and gains {say_share(replay.net_gain(flow))}."
    )


def make_replay_result(replay: Replay) -> dict[str, Any]:
    """The object that `equipoise replay --json` writes: plain values alone."""
    trace, setting, chosen = replay.trace, replay.setting, replay.recommended()
    return {
        "format_version": FORMAT_VERSION,
        "trace": {
            "steps": trace.num_steps,
            "layers": trace.num_layers,
            "experts": trace.num_experts,
            "assignments": int(trace.counts.sum()),
            "is_sum": trace.is_sum,
            "phases": list(dict.fromkeys(trace.phases)),
        },
        "setting": {
            "warm_up_steps": setting.warm_up_steps,
            "window_steps": setting.window_steps,
            "groups": setting.num_groups,
            "layer_s": setting.cost.layer_s,
            "token_s": setting.cost.token_s,
            "expert_bytes": setting.cost.expert_bytes,
            "link_gb_per_s": setting.cost.link_gb_per_s,
            "stall_s": setting.cost.stall_s,
        },
        "baseline": _make_row(replay, replay.baseline),
        "rows": [_make_row(replay, outcome) for outcome in replay.outcomes],
        "recommended": None if chosen is None else replay.outcomes.index(chosen),
        "reason": replay.reason(),
    }


def _make_row(replay: Replay, outcome: Outcome) -> dict[str, Any]:
    made = outcome.configuration
    return {
        "name": describe(made),
        "policy": made.policy,
        "interval_steps": made.interval_steps,
        "move_budget": made.move_budget,
        "ranks": made.topology.num_ranks,
        "nodes": made.topology.num_nodes,
        "slots": made.topology.num_slots,
        "redundant_experts": made.topology.num_slots - replay.trace.num_experts,
        "balancedness": {
            "planned": outcome.planned,
            "next": outcome.following,
            "realised": outcome.realised,
        },
        "received": outcome.received,
        "received_matched": outcome.received_matched,
        "received_share": outcome.received_share,
        "bytes": outcome.bytes,
        "lost_s": outcome.lost_s,
        "compute_s": outcome.compute_s,
        "gain": replay.gain(outcome),
        "net_gain": replay.net_gain(outcome),
        "start": None if outcome.start is None else _make_plan(outcome.start),
        "rebalances": [_make_plan(one) for one in outcome.rebalances],
    }


def _make_plan(rebalance: Rebalance) -> dict[str, Any]:
    return {
        "step": rebalance.step,
        "num_steps": rebalance.num_steps,
        "received": rebalance.received,
        "received_matched": rebalance.received_matched,
        "bytes": rebalance.bytes,
        "lost_s": rebalance.lost_s,
        "balancedness_planned": rebalance.planned,
        "balancedness_next": rebalance.following,
    }
