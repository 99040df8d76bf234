"""What benchmarks of a service under a constant stream of requests are asked alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Requests = Annotated[int, typer.Option(help="At least so many.")]
InFlight = Annotated[int, typer.Option(help="Requests at any time.")]
NewTokens = Annotated[int, typer.Option(help="Of each request.")]
Model = Annotated[Path | None, typer.Option(help="Checkpoint directory.  [the bundled model]")]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Of the ranks.")]
Timeout = Annotated[float, typer.Option(help="Longest wait for another rank, in s.")]
SizeGb = Annotated[
    float | None,
    typer.Option(help="Serve random weights, so many GB of experts; written to TMPDIR."),
]
