"""What benchmarks of a service under a constant stream of requests are asked alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from equipoise.bench.option_checks import check_least, check_positive
from equipoise.cli.devices import find_device

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


def check(
    requests: int,
    in_flight: int,
    new_tokens: int,
    timeout: float,
    size_gb: float | None,
    model: Path | None,
    device: str,
) -> None:
    """Refuse what no stream can be of, before a rank starts.

    Raises: ConfigError, naming the option or the checkpoint.
    """
    check_least(
        ("--requests", requests, 1), ("--in-flight", in_flight, 1), ("--new-tokens", new_tokens, 1)
    )
    check_positive(("--timeout", timeout))
    if size_gb is not None:
        check_positive(("--size-gb", size_gb))
    if model is not None:
        from equipoise.models.families import check_weights, read_model_shape

        read_model_shape(model)
        check_weights(model)
    find_device(device)
