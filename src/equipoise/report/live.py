"""What a job shows in a terminal while it runs."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from equipoise.engine.records import JobRecord, Record
from equipoise.placement import measure_balancedness
from equipoise.report.closing import render_closing
from equipoise.report.plain import describe_job
from equipoise.report.summary import JobSummary
from equipoise.report.wording import PHASES, say_rebalance

BAR_CELLS = 24
"""Cells of a bar for a rank that does exactly its share; the fullest bar has twice as many."""
LAST_REBALANCES = 4


class LiveDisplay:
    """Load of each rank, balancedness of each layer and the last moves, redrawn as they change."""

    def __init__(self, console: Console, summary: JobSummary) -> None:
        self._console = console
        self._summary = summary
        self._live = Live(console=console, refresh_per_second=8, transient=True)
        self._live.start()

    def show(self, record: Record) -> None:
        """Take a record that the summary has taken already."""
        if isinstance(record, JobRecord):
            self._console.print(describe_job(record), markup=False, highlight=False)
        self._live.update(render_progress(self._summary))

    def close(self) -> None:
        """Give the terminal back, with the closing tables if the job has ended."""
        self._live.stop()
        if self._summary.result is not None:
            self._console.print(render_closing(self._summary))


def render_progress(summary: JobSummary) -> RenderableType:
    """The picture of a job that runs.

    Args:
        summary: that has taken the job's first record at least.
    """
    parts: list[RenderableType] = [_render_heading(summary)]
    if summary.recent:
        before, now = summary.recent_loads()
        parts += [
            Text(f"tokens per rank, last {len(summary.recent)} steps (1.00 is its share)", "dim"),
            _render_ranks(now.sum(axis=0).tolist()),
            Text("balancedness per layer, same steps (1.00 is perfect)", "dim"),
            _render_layers(
                measure_balancedness(before).tolist(), measure_balancedness(now).tolist()
            ),
        ]
    for rebalance in summary.rebalances[-LAST_REBALANCES:]:
        parts.append(Text(say_rebalance(rebalance), "cyan"))
    return Group(*parts)


def _render_heading(summary: JobSummary) -> Text:
    phase = PHASES.get(summary.phase or "", "loading the model")
    heading = Text(phase, "bold")
    if summary.recent:
        last = summary.recent[-1]
        heading.append(f"   step {last.step}   text: {last.kind or 'mixed'}", "not bold")
    return heading


def _render_ranks(load: list[float]) -> Table:
    table = Table.grid(padding=(0, 1))
    mean = sum(load) / len(load) or 1.0
    for rank, tokens in enumerate(load):
        share = tokens / mean
        cells = min(round(share * BAR_CELLS), 2 * BAR_CELLS)
        bar = Text("█" * min(cells, BAR_CELLS), "green")
        bar.append("█" * (cells - BAR_CELLS), "red")
        table.add_row(f"rank {rank}", f"{share:.2f}", bar)
    return table


def _render_layers(before: list[float], now: list[float]) -> Table:
    """Layers side by side, as many as a terminal shows."""
    shown = 12
    table = Table.grid(padding=(0, 2))
    table.add_row("", *(f"layer {layer}" for layer in range(len(now))[:shown]))
    table.add_row("initial placement", *(f"{value:.2f}" for value in before[:shown]))
    table.add_row("now", *(Text(f"{value:.2f}", "bold") for value in now[:shown]))
    return table
