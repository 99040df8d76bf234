"""A job's report as one HTML file that needs no network."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.job.records import Pass
from equipoise.report.heat_map import HeatMap, draw_heat_map
from equipoise.report.page import (
    WIDTH,
    bin_means,
    divide_by_share,
    draw_line,
    find_height,
    list_phases,
    render_page,
)
from equipoise.report.plain import describe_job
from equipoise.report.result import list_versions
from equipoise.report.summary import JobSummary, write_sentence
from equipoise.report.tables import list_imbalance, list_losses, list_moves, list_passes
from equipoise.report.wording import name_model
from equipoise.topology import FloatArray

MIXED = "mixed"


class Line(NamedTuple):
    """One line of the chart; `points` are SVG's."""

    name: str
    colour: str
    points: str


def render_html(summary: JobSummary) -> str:
    """Charts, heat maps and tables of a job.

    Args:
        summary: of a job that has ended.
    """
    job, result = summary.job, summary.result
    assert job is not None
    assert result is not None
    points = summary.points["on"]
    balancedness = np.array([[p.balancedness.before, p.balancedness.after] for p in points])
    shown = bin_means(balancedness.reshape(-1, 2)) if points else np.ones((1, 2))
    low = min(0.9, float(np.floor(shown.min() * 10.0) / 10.0))
    check = result.check
    return render_page(
        "run.html",
        name=name_model(job.model),
        sentence=write_sentence(summary),
        job=describe_job(job),
        max_logit_diff=None if check is None else f"{check.max_logit_diff:.2g}",
        rounded_in=None if job.dtype == "float32" else job.dtype,
        tables=[list_imbalance(summary), list_passes(summary), list_losses(summary)],
        moves=list_moves(summary),
        lines=[
            Line("initial placement, same tokens", "#9a958a", draw_line(shown[:, 0], low, 1.0)),
            Line("as balanced", "#c2552b", draw_line(shown[:, 1], low, 1.0)),
        ],
        ticks=[
            (find_height(value, low, 1.0), f"{value:.1f}") for value in np.arange(low, 1.05, 0.1)
        ],
        rebalances=_place_rebalances(summary),
        phases=list_phases(point.kind or MIXED for point in points),
        num_steps=len(points),
        over_time=_draw_over_time(summary),
        maps=_draw_maps(summary),
        samples=result.samples,
        versions=[(name, version) for name, version in list_versions().items() if version],
    )


def _place_rebalances(summary: JobSummary) -> list[float]:
    """Where in the chart experts moved."""
    num_steps = max(1, len(summary.points["on"]))
    return [r.step / num_steps * WIDTH for r in summary.rebalances if r.moves or r.local_moves]


def _draw_over_time(summary: JobSummary) -> list[HeatMap]:
    titles: dict[Pass, str] = {"off": "Balancing off", "on": "Balancing on"}
    maps = []
    for in_pass, title in titles.items():
        points = summary.points[in_pass]
        if points:
            load = bin_means(np.array([point.rank_load for point in points]))
            maps.append(draw_heat_map(divide_by_share(load).T, title, "rank", "stretches of step"))
    return maps


def _draw_maps(summary: JobSummary) -> list[HeatMap]:
    maps = [
        draw_heat_map(divide_by_share(summary.expert_load), "Tokens per expert", "layer", "expert")
    ]
    loads: dict[str, FloatArray] = {
        "Tokens per rank, initial placement": summary.covered.before,
        "Tokens per rank, as balanced": summary.covered.after,
    }
    maps += [
        draw_heat_map(divide_by_share(load), title, "layer", "rank")
        for title, load in loads.items()
    ]
    return maps
