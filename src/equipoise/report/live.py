"""What a job shows in a terminal while it runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from equipoise.job.records import JobRecord, RebalanceRecord, Record
from equipoise.placement import measure_balancedness
from equipoise.report.closing import render_closing
from equipoise.report.plain import describe_job
from equipoise.report.summary import JobSummary
from equipoise.report.wording import PHASES, say_bytes, say_count, say_loading, say_seconds
from equipoise.topology import FloatArray

BAR_CELLS = 24
"""Cells of a bar for a rank that does exactly its share; the fullest bar has twice as many."""
MOST_RANKS = 12
"""So that the picture fits on 24 lines."""
LAST_REBALANCES = 4
_WIDE = 72
"""Columns from which all of a rebalance fits in one line."""


class LiveDisplay:
    """Load of each rank, balancedness of each layer and the last moves, redrawn as they change."""

    def __init__(self, console: Console, summary: JobSummary) -> None:
        self._console = console
        self._summary = summary
        picture = render_progress(summary, console.width)
        self._live = Live(picture, console=console, refresh_per_second=8, transient=True)
        self._live.start()

    def show(self, record: Record) -> None:
        """Take a record that the summary has taken already."""
        if isinstance(record, JobRecord):
            self._console.print(describe_job(record), markup=False, highlight=False)
        self._live.update(render_progress(self._summary, self._console.width))

    def close(self) -> None:
        """Give the terminal back, with the closing tables if the job has ended."""
        self._live.stop()
        if self._summary.result is not None:
            self._console.print(render_closing(self._summary))


def render_progress(summary: JobSummary, width: int) -> RenderableType:
    """The picture of a job that runs, or is about to.

    Args:
        summary: of the job so far.
        width: columns of the terminal; from 40 up nothing is wrapped.
    """
    parts: list[RenderableType] = [_render_heading(summary)]
    if summary.recent:
        before, now = summary.recent_loads()
        steps = say_count(len(summary.recent), "step")
        parts += [
            _render_title(f"tokens per rank, last {steps} (1.00 is its share)"),
            _render_ranks(now.sum(axis=0), width),
            _render_title("balancedness per layer, same steps (1.00 is perfect)"),
            _render_layers(
                None if summary.phase == "off" else measure_balancedness(before),
                measure_balancedness(now),
                width,
            ),
        ]
    if summary.rebalances:
        parts += [
            _render_title("last moves of experts, balancedness of the window"),
            _render_rebalances(summary.rebalances[-LAST_REBALANCES:], width),
        ]
    return Group(*parts)


def _render_title(text: str) -> Text:
    return Text(text, "dim", no_wrap=True, overflow="ellipsis")


def _render_heading(summary: JobSummary) -> Text:
    start = "starting ranks and loading the model" if summary.job is None else "getting ready"
    if summary.job is None and summary.loading is not None:
        start = say_loading(summary.loading)
    heading = Text(
        PHASES.get(summary.phase or "", start), "bold", no_wrap=True, overflow="ellipsis"
    )
    if summary.recent:
        last = summary.recent[-1]
        heading.append(f"   step {last.step}   text: {last.kind or 'mixed'}", "not bold")
    return heading


def _render_ranks(load: FloatArray, width: int) -> RenderableType:
    """A bar for each rank; where there are many, for the heaviest."""
    shown = np.sort(np.argsort(-load, kind="stable")[:MOST_RANKS])
    share = load / (load.mean() or 1.0)
    table = Table.grid(padding=(0, 1))
    label_width = len(f"rank {len(load)} 1.00 ")
    cells_per_share = max(1, min(BAR_CELLS, (width - label_width) // 2))
    for rank in shown:
        cells = min(round(share[rank] * cells_per_share), 2 * cells_per_share)
        bar = Text("█" * min(cells, cells_per_share), "green", no_wrap=True)
        bar.append("█" * (cells - cells_per_share), "red")
        table.add_row(f"rank {rank}", f"{share[rank]:.2f}", bar)
    if len(shown) == len(load):
        return table
    return Group(table, Text(f"the heaviest {len(shown)} of {len(load)} ranks", "dim"))


def _render_layers(before: FloatArray | None, now: FloatArray, width: int) -> Table:
    """Layers side by side, as many as fit."""
    table = Table.grid(padding=(0, 2))
    shown = max(1, min(len(now), (width - len("initial placement")) // len("  layer 10")))
    more = [] if shown == len(now) else [f"of {len(now)}"]
    if more:
        shown = max(1, shown - 1)
    table.add_row("", *(f"layer {layer}" for layer in range(shown)), *more)
    if before is not None:
        table.add_row("initial placement", *(f"{value:.2f}" for value in before[:shown]))
    table.add_row("now", *(Text(f"{value:.2f}", "bold") for value in now[:shown]))
    return table


def _render_rebalances(rebalances: Sequence[RebalanceRecord], width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    for _ in range(5):
        table.add_column(justify="right")
    for record in rebalances:
        better = (
            f"{record.balancedness_before.mean():.2f} -> {record.balancedness_after.mean():.2f}"
        )
        cells = [f"step {record.step}", f"{record.moves:,} moved", better]
        if width >= _WIDE:
            within = f"{record.local_moves:,} within ranks"
            cells[2:2] = [within, say_bytes(record.bytes), say_seconds(record.transfer_s)]
        table.add_row(*(Text(cell, "cyan", no_wrap=True) for cell in cells))
    return table
