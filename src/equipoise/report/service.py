"""A service at one moment, as a table."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

PER_ROW = 4
"""Figures side by side, so that 80 columns are enough."""
_COLORS = {"serving": "green", "dead": "red", "leaving": "yellow"}


def render_service(
    url: str, now: dict[str, Any], before: dict[str, Any] | None, elapsed_s: float
) -> RenderableType:
    """The picture of a service.

    Args:
        url: where it was asked.
        now: as `ServiceStatus.to_json`.
        before: the same, from an earlier look; None shows no rates.
        elapsed_s: seconds between the two.
    """
    details = [
        Text(f"{rank['name']}: {rank['detail']}", "dim", no_wrap=True, overflow="ellipsis")
        for rank in now["ranks"]
        if rank["detail"]
    ]
    figures = _render_figures(now, before, elapsed_s)
    return Group(_render_heading(url, now), figures, _render_ranks(now), *details)


def _render_heading(url: str, now: dict[str, Any]) -> Text:
    heading = Text(now["model"]["name"], "bold", no_wrap=True, overflow="ellipsis")
    heading.append(f"  {url}  generation {now['generation']}  ", "not bold")
    heading.append("ready" if now["ready"] else "not ready", "green" if now["ready"] else "red")
    phase, reason = now["phase"], now["reason"]
    if phase != "idle":
        heading.append(f"  {phase}" + (f": {reason}" if reason else ""), "yellow not bold")
    if now["changes_waiting"]:
        heading.append(f"  {now['changes_waiting']} changes wait", "yellow not bold")
    return heading


def _render_figures(
    now: dict[str, Any], before: dict[str, Any] | None, elapsed_s: float
) -> RenderableType:
    totals = now["totals"]
    balancedness = now["balancedness"]
    lines = (
        ("running", f"{now['running']:,}"),
        ("waiting", f"{now['queue_length']:,} of {now['queue_limit']:,}"),
        ("finished", f"{totals['finished']:,}"),
        ("cancelled", f"{totals['cancelled']:,}"),
        ("failed", f"{totals['failed']:,}"),
        ("run again", f"{totals['rerun']:,}"),
        ("tokens/s", _rate("generated_tokens", now, before, elapsed_s)),
        ("steps/s", _rate("steps", now, before, elapsed_s)),
        ("scalings", f"{totals['scalings']:,}"),
        ("deaths", f"{totals['deaths']:,}"),
        ("rebalances", f"{totals['rebalances']:,}"),
        ("balancedness", "-" if balancedness is None else f"{balancedness:.3f}"),
    )
    table = Table.grid(padding=(0, 2))
    for first in range(0, len(lines), PER_ROW):
        row = lines[first : first + PER_ROW]
        table.add_row(*(Text(f"{name} {value}", no_wrap=True) for name, value in row))
    return table


def _rate(name: str, now: dict[str, Any], before: dict[str, Any] | None, elapsed_s: float) -> str:
    if before is None or elapsed_s <= 0:
        return "-"
    return f"{(now['totals'][name] - before['totals'][name]) / elapsed_s:,.0f}"


def _render_ranks(now: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("rank", "state", "where"):
        table.add_column(heading, no_wrap=True)
    for heading in ("pid", "running", "steps", "pause", "silence"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rank in now["ranks"]:
        table.add_row(
            rank["name"],
            Text(rank["state"], _COLORS.get(rank["state"], "")),
            _say_where(rank),
            "-" if rank["pid"] is None else str(rank["pid"]),
            f"{rank['running']} of {rank['running'] + rank['room']}",
            f"{rank['steps']:,}",
            f"{rank['pause_s'] * 1e3:,.0f} ms",
            f"{rank['near_deadline']:.0%}",
        )
    return table


def _say_where(rank: dict[str, Any]) -> str:
    """Host and device; and the node, where that is not the host."""
    host, node = rank["host"], rank["node"]
    return f"{host if node in ('', host) else f'{host}/{node[:8]}'} {rank['device']}"
