"""A replay as one HTML file that needs no network."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader

from equipoise.report.heat_map import NUM_COLOURS, HeatMap, draw_heat_map, mix_colour
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
from equipoise.topology import FloatArray

WIDTH, HEIGHT = 900.0, 220.0
MOST_POINTS = 180
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


class Phase(NamedTuple):
    """A time in which one kind of text was most of what was served."""

    name: str
    left: float
    width: float


def write_replay_html(replay: Replay, name: str) -> str:
    """Charts, heat maps and the table of a replay.

    Args:
        replay: what was played.
        name: of the trace.
    """
    environment = Environment(
        loader=PackageLoader("equipoise.report"), autoescape=True, trim_blocks=True
    )
    chosen, shown = replay.recommended(), _choose_lines(replay)
    low = min(float(_bin(one.per_step).min()) for one in shown)
    floor = np.floor(low * 10.0) / 10.0
    most = max(1, max(one.received for one in shown))
    return environment.get_template("replay.html").render(
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
        ticks=[(_height(value, floor), f"{value:.1f}") for value in np.arange(floor, 1.05, 0.1)],
        most=f"{most:,}",
        phases=_list_phases(replay),
        maps=_draw_maps(replay, chosen),
        scale=[mix_colour(at / (NUM_COLOURS - 1)) for at in range(NUM_COLOURS)],
        first=replay.setting.warm_up_steps,
        last=replay.trace.num_steps,
        width=WIDTH,
        height=HEIGHT,
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
    values = _bin(outcome.per_step)
    across = (np.arange(len(values)) + 0.5) / len(values) * WIDTH
    realised = " ".join(
        f"{x:.1f},{_height(value, floor):.1f}" for x, value in zip(across, values, strict=True)
    )
    first, last = replay.setting.warm_up_steps, replay.trace.num_steps
    so_far, points = 0, [f"0,{HEIGHT:.1f}"]
    for rebalance in outcome.rebalances:
        x = (rebalance.step - first) / (last - first) * WIDTH
        points.append(f"{x:.1f},{HEIGHT * (1 - so_far / most):.1f}")
        so_far += rebalance.received
        points.append(f"{x:.1f},{HEIGHT * (1 - so_far / most):.1f}")
    points.append(f"{WIDTH},{HEIGHT * (1 - so_far / most):.1f}")
    return Line(describe(outcome.configuration), COLOURS[at], realised, " ".join(points))


def _height(value: float, floor: float) -> float:
    return float(HEIGHT * (1.0 - value) / (1.0 - floor)) if floor < 1.0 else 0.0


def _bin(values: FloatArray) -> FloatArray:
    """Means of at most MOST_POINTS stretches of steps."""
    pieces = np.array_split(values, min(len(values), MOST_POINTS))
    return np.array([piece.mean() for piece in pieces])


def _list_phases(replay: Replay) -> list[Phase]:
    """Stretches of steps of one kind, merged where they alternate."""
    words = replay.trace.phases[replay.setting.warm_up_steps :]
    if not words:
        return []
    starts = [at for at in range(len(words)) if at == 0 or words[at] != words[at - 1]]
    if len(starts) > MOST_POINTS:
        return []
    ends = [*starts[1:], len(words)]
    return [
        Phase(words[start], start / len(words) * WIDTH, (end - start) / len(words) * WIDTH)
        for start, end in zip(starts, ends, strict=True)
    ]


def _draw_maps(replay: Replay, chosen: Outcome | None) -> list[HeatMap]:
    judged = replay.trace.counts[replay.setting.warm_up_steps :].sum(axis=0)
    maps = [
        draw_heat_map(
            _share(np.asarray(judged, dtype=np.float64)), "Tokens per expert", "layer", "expert"
        )
    ]
    for outcome in (replay.baseline, chosen):
        if outcome is not None:
            title = f"Tokens per rank: {describe(outcome.configuration)}"
            maps.append(draw_heat_map(_share(outcome.rank_load), title, "layer", "rank"))
    return maps


def _share(load: FloatArray) -> FloatArray:
    """Load over the mean of its layer."""
    share: FloatArray = load / load.mean(axis=1, keepdims=True)
    return share
