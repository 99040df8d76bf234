"""`equipoise config`: what is in force, and who said so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from equipoise.config_sources import parse_flags, resolve_config


def config(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Option("--config", help="YAML or JSON file of options.")
    ] = None,
    eplb_config: Annotated[
        str | None,
        typer.Option(
            "--eplb-config", help="JSON object of options; or --eplb-config.OPTION VALUE."
        ),
    ] = None,
) -> None:
    """Print the balancing options in force, as a file that --config reads.

    Options come from --config, then from variables EQUIPOISE_<OPTION>, then from --eplb-config
    JSON and --eplb-config.OPTION VALUE; later ones win. `equipoise run` has other defaults for
    window_size and step_interval: 16.
    """
    flags = parse_flags(eplb_config, context.args, known=list_options(context))
    typer.echo(resolve_config(file=file, flags=flags).to_yaml(), nl=False)


def list_options(context: typer.Context) -> list[str]:
    """Options of the command that runs, as they are written."""
    return [name for option in context.command.params for name in option.opts]
