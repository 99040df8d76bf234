"""`equipoise bench`: what a user can measure; one file per benchmark."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.errors import ConfigError

if TYPE_CHECKING:
    from equipoise.bench.outcome import BenchOutcome

JsonPath = Annotated[
    Path | None, typer.Option("--json", help="Write figures here; - for standard output.")
]


def check_json_path(path: Path | None) -> None:
    """Refuse a path that cannot be written, before the work.

    Args:
        path: what --json named, if anything.
    Raises: ConfigError.
    """
    from equipoise.report.files import check_writable

    if path is not None and str(path) != "-":
        check_writable(path, "--json")


def read_sizes(text: str) -> tuple[int, ...]:
    """Numbers of ranks, from `--sizes`.

    Raises: ConfigError if they are none.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--sizes {text}: must be numbers with commas between, like 2,4,2")
    return tuple(map(int, parts))


def show_outcome(
    outcome: BenchOutcome, columns: Sequence[tuple[str, str]], json_path: Path | None
) -> None:
    """Print the table and the notes, and write the JSON.

    Args:
        outcome: what was measured.
        columns: heading and name of the value, in order; a row that lacks one shows a dash.
        json_path: where the JSON goes, if anywhere.
    """
    from rich.console import Console
    from rich.table import Table

    from equipoise.report.files import write_atomically

    to_stdout = str(json_path) == "-"
    console = Console(stderr=to_stdout)
    table = Table(box=None, pad_edge=False)
    for heading, _ in columns:
        table.add_column(heading, justify="left" if heading == columns[0][0] else "right")
    for row in outcome.rows:
        table.add_row(*(_say(row.get(name)) for _, name in columns))
    console.print(table)
    for note in outcome.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if to_stdout:
        sys.stdout.write(outcome.to_json())
    elif json_path is not None:
        write_atomically(json_path, outcome.to_json())


def _say(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
        case int():
            return f"{value:,}"
        case _:
            return str(value)
