"""`equipoise inspect`: what serving a checkpoint takes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from equipoise.models.inspection import Inspection

FORMAT_VERSION = 1


def inspect(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory; config.json suffices.")],
    ranks: Annotated[int, typer.Option(help="Ranks that share the experts.")] = 4,
    redundant_experts: Annotated[
        str, typer.Option(help="Redundant slots of each layer: auto, or a number.")
    ] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a model's experts are, what each rank would hold, and what would be refused.

    Weights are not read; if they are there, their headers are checked.
    """
    from equipoise.models.inspection import inspect_checkpoint

    if ranks < 1:
        raise ConfigError(f"--ranks must be at least 1, got {ranks}")
    if redundant_experts != "auto" and not redundant_experts.isdecimal():
        raise ConfigError(
            f"--redundant-experts must be auto or a number of 0 or more, got {redundant_experts}"
        )
    found = inspect_checkpoint(
        model, ranks, None if redundant_experts == "auto" else int(redundant_experts)
    )
    if json:
        import json as writer

        figures = asdict(found) | {
            "rank_bytes": found.rank_bytes,
            "format_version": FORMAT_VERSION,
        }
        typer.echo(writer.dumps(figures, indent=2))
    else:
        _print(found)


def _print(found: Inspection) -> None:
    from rich.console import Console

    from equipoise.report.wording import say_bytes

    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    quantised = "" if found.quantisation is None else f", quantised by {found.quantisation}"
    say(f"{found.architecture} ({found.model_type}) in {found.dtype}{quantised}")
    if found.adapter is not None:
        say(f"experts are taken over by: {found.adapter}")
        console.print(_tabulate(found))
        say(f"what every rank has: {say_bytes(found.shared_bytes)}")
    if found.sets and found.rank_bytes is not None:
        count = "rank" if found.num_ranks == 1 else f"of {found.num_ranks} ranks"
        say(f"weights of each {count}: {say_bytes(found.rank_bytes)}")
    for line in found.refused:
        say(f"refused: {line}")


def _tabulate(found: Inspection) -> Table:
    from rich.table import Table

    from equipoise.report.wording import say_bytes

    table = Table(box=None, pad_edge=False)
    for name in ("experts", "MoE layers", "each", "top-k", "bytes of one", "slots", "on a rank"):
        table.add_column(name, justify="left" if name == "experts" else "right", no_wrap=True)
    for one in found.sets:
        least, most = (say_bytes(size) for size in one.expert_bytes)
        table.add_row(
            one.experts,
            f"{one.num_layers:,}",
            f"{one.num_experts:,}",
            "?" if one.top_k is None else str(one.top_k),
            least if least == most else f"{least} to {most}",
            "-" if one.slots_per_rank is None else f"{one.slots_per_rank:,}",
            "-" if one.rank_bytes is None else say_bytes(one.rank_bytes),
        )
    return table
