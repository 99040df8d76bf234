"""What a terminal shows when a job is over."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from equipoise.report.summary import JobSummary, write_sentence
from equipoise.report.tables import TextTable, list_imbalance, list_losses, list_passes


def render_closing(summary: JobSummary) -> RenderableType:
    """Tables of the job's figures, and one sentence that sums them up.

    Args:
        summary: of a job that has ended.
    """
    losses = list_losses(summary)
    tables = [list_imbalance(summary), list_passes(summary), *([losses] if losses.rows else [])]
    return Group(
        *(part for table in tables for part in (Text(table.title, "dim"), _render(table), "")),
        Text(write_sentence(summary), style="bold"),
    )


def _render(text: TextTable) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in text.columns:
        table.add_column(column, justify="left" if column == text.columns[0] else "right")
    for row in text.rows:
        table.add_row(*row)
    return table
