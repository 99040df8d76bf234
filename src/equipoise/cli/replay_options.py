"""The options of `equipoise replay`, as typer reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

OrderName = Literal["by-domain", "interleaved"]
_PLAYED, _SERVED, _COST = "What is played", "How routes were served", "Cost"

Traces = Annotated[list[Path] | None, typer.Argument(help="Load files, played one after another.")]
Demo = Annotated[bool, typer.Option("--demo", help="Play a bundled trace of gpt-oss.")]
Ranks = Annotated[int, typer.Option(help="Expert-parallel ranks.")]
Policies = Annotated[str, typer.Option(help="Names with commas, or all.", rich_help_panel=_PLAYED)]
Intervals = Annotated[
    str | None,
    typer.Option(
        help="Steps between plans, with commas; `once` plans at the start alone.",
        rich_help_panel=_PLAYED,
    ),
]
RedundantExperts = Annotated[
    str, typer.Option(help="Numbers with commas, or auto.", rich_help_panel=_PLAYED)
]
Budgets = Annotated[
    str,
    typer.Option(
        help="Fractions of slots that a plan of flow may refill.", rich_help_panel=_PLAYED
    ),
]
WarmUp = Annotated[
    int | None,
    typer.Option(help="Steps that the first plan sees, not judged.", rich_help_panel=_PLAYED),
]
Window = Annotated[
    int | None,
    typer.Option(
        help="Steps that a plan sees; by default since the last.", rich_help_panel=_PLAYED
    ),
]
InFlight = Annotated[
    int | None,
    typer.Option(help="Sequences side by side; 64.", rich_help_panel=_SERVED),
]
TokensPerStep = Annotated[
    int | None,
    typer.Option(help="Tokens of each in a step; 1.", rich_help_panel=_SERVED),
]
Order = Annotated[
    OrderName,
    typer.Option(help="Domains in turn, or mixed.", rich_help_panel=_SERVED),
]
StepMs = Annotated[float, typer.Option(help="Time of a balanced step.", rich_help_panel=_COST)]
ExpertShare = Annotated[
    float,
    typer.Option(help="Of it, what grows with the slowest rank's tokens.", rich_help_panel=_COST),
]
Measurements = Annotated[
    Path | None,
    typer.Option(
        help="Tokens and seconds of a layer's experts (CSV, JSON), instead.",
        rich_help_panel=_COST,
    ),
]
StallMs = Annotated[
    float, typer.Option(help="Of each rebalance, beside moves.", rich_help_panel=_COST)
]
Report = Annotated[Path | None, typer.Option(help="Write one HTML file.")]
