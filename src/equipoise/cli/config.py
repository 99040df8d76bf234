"""`equipoise config`: what is in force, and who said so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from equipoise.config_sources import add_flag, parse_flags, resolve_config
from equipoise.errors import ConfigError

NEVER_STEPS = 1 << 40
"""More steps than any run has: no plan falls due."""


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


def list_given(context: typer.Context) -> list[Any]:
    """Options, as click has them, that somebody wrote."""

    def is_written(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    return [option for option in context.command.params if is_written(option.name or "")]


def add_switches(flags: dict[str, tuple[str, Any]], *, sync: bool, no_balance: bool) -> None:
    """Add what --sync and --no-balance stand for to options given otherwise.

    Raises: ConfigError if they contradict each other.
    """
    if no_balance and "step_interval" in flags:
        flag, _ = flags["step_interval"]
        raise ConfigError(
            f"--no-balance makes no plans, and {flag} says how often: give one of them"
        )
    if no_balance:
        add_flag(flags, "step_interval", "--no-balance", NEVER_STEPS)
    if sync:
        add_flag(flags, "use_async", "--sync", False)


def parse_redundant(text: str | None) -> int | str | None:
    """A number as one; other words as they are."""
    return int(text) if text is not None and text.lstrip("-").isdecimal() else text
