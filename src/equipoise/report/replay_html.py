"""A replay as one HTML file that needs no network."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.report.heat_map import HeatMap, draw_heat_map
from equipoise.report.page import (
    HEIGHT,
    WIDTH,
    bin_means,
    divide_by_share,
    draw_line,
    find_height,
    list_phases,
    render_page,
)
from equipoise.report.replay_tables import (
    COLUMNS,
    LEGEND,
    OF_SUMS,
    describe_cost,
    describe_trace,
    list_cells,
)
from equipoise.sim.recommend import Replay, describe
from equipoise.sim.replay import Outcome

COLOURS = ("#8a8a86", "#b2471d", "#2b6777", "#6d5a96", "#8f7a1f")


class Line(NamedTuple):
    """One configuration in the charts.

    Attributes:
        name: in words.
        colour: CSS.
        realised: SVG points, balancedness over steps.
        received: SVG points, experts received so far, over steps.
    """

    name: str
    colour: str
    realised: str
    received: str


def write_replay_html(replay: Replay, name: str) -> str:
    """Charts, heat maps and the table of a replay.

    Args:
        replay: what was played.
        name: of the trace.
    """
    chosen, shown = replay.recommended(), _choose_lines(replay)
    low = min(float(bin_means(one.per_step).min()) for one in shown)
    floor = np.floor(low * 10.0) / 10.0
    most = max(1, max(one.received for one in shown))
    judged = replay.trace.phases[replay.setting.warm_up_steps :]
    return render_page(
        "replay.html",
        name=name,
        trace=describe_trace(replay.trace, name),
        cost=describe_cost(replay),
        reason=replay.reason(),
        chosen=chosen,
        columns=COLUMNS,
        rows=[(one is chosen, list_cells(replay, one)) for one in _list_outcomes(replay)],
        legend=LEGEND,
        of_sums=OF_SUMS if replay.trace.is_sum else "",
        lines=[_draw(one, floor, most, at, replay) for at, one in enumerate(shown)],
        ticks=[
            (find_height(value, floor, 1.0), f"{value:.1f}")
            for value in np.arange(floor, 1.05, 0.1)
        ],
        most=f"{most:,}",
        phases=list_phases(judged),
        maps=_draw_maps(replay, chosen),
        first=replay.setting.warm_up_steps,
        last=replay.trace.num_steps,
    )


def _list_outcomes(replay: Replay) -> tuple[Outcome, ...]:
    return (replay.baseline, *replay.outcomes)


def _choose_lines(replay: Replay) -> list[Outcome]:
    """Experts in order, what is recommended, and the best of each policy beside it."""
    best = sorted(replay.outcomes, key=replay.net_gain, reverse=True)
    by_policy = {one.configuration.policy: one for one in reversed(best)}
    chosen = replay.recommended()
    lines = [replay.baseline, *([chosen] if chosen else [])]
    taken = {one.configuration.policy for one in lines}
    lines += [one for policy, one in by_policy.items() if policy not in taken]
    return lines[: len(COLOURS)]


def _draw(outcome: Outcome, floor: float, most: int, at: int, replay: Replay) -> Line:
    realised = draw_line(bin_means(outcome.per_step), floor, 1.0)
    first, last = replay.setting.warm_up_steps, replay.trace.num_steps
    so_far, points = 0, [f"0,{HEIGHT:.1f}"]
    for rebalance in outcome.rebalances:
        x = (rebalance.step - first) / (last - first) * WIDTH
        points.append(f"{x:.1f},{HEIGHT * (1 - so_far / most):.1f}")
        so_far += rebalance.received
        points.append(f"{x:.1f},{HEIGHT * (1 - so_far / most):.1f}")
    points.append(f"{WIDTH},{HEIGHT * (1 - so_far / most):.1f}")
    return Line(describe(outcome.configuration), COLOURS[at], realised, " ".join(points))


def _draw_maps(replay: Replay, chosen: Outcome | None) -> list[HeatMap]:
    judged = replay.trace.counts[replay.setting.warm_up_steps :].sum(axis=0)
    maps = [
        draw_heat_map(
            divide_by_share(np.asarray(judged, dtype=np.float64)),
            "Tokens per expert",
            "layer",
            "expert",
        )
    ]
    for outcome in (replay.baseline, chosen):
        if outcome is not None:
            title = f"Tokens per rank: {describe(outcome.configuration)}"
            maps.append(draw_heat_map(divide_by_share(outcome.rank_load), title, "layer", "rank"))
    return maps
