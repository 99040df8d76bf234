"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from equipoise import __version__
from equipoise.cli.bench_dispatch import bench_dispatch
from equipoise.cli.bench_elastic import bench_elastic
from equipoise.cli.bench_layer import bench_layer
from equipoise.cli.bench_load import bench_load
from equipoise.cli.bench_plan import bench_plan
from equipoise.cli.bench_record import bench_record
from equipoise.cli.bench_recovery import bench_recovery
from equipoise.cli.bench_serve import bench_serve
from equipoise.cli.bench_stall import bench_stall
from equipoise.cli.bench_step import bench_step
from equipoise.cli.bench_transfer import bench_transfer
from equipoise.cli.config import config
from equipoise.cli.doctor import doctor
from equipoise.cli.inspect import inspect
from equipoise.cli.plan import plan
from equipoise.cli.policies import policies
from equipoise.cli.rebalance import rebalance
from equipoise.cli.replay import replay
from equipoise.cli.run import run
from equipoise.cli.scale import scale
from equipoise.cli.serve import serve
from equipoise.cli.status import status
from equipoise.cli.top import top

EPLB_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""So that `--eplb-config.FIELD VALUE` gets through; the command refuses whatever else is left."""

app = typer.Typer(
    name="equipoise",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Any command takes --debug, which adds the traceback to an error.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"equipoise {__version__}")
        raise typer.Exit


@app.callback()
def equipoise(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Balanced, movable, elastic experts for Mixture-of-Experts models."""


app.command(
    context_settings=EPLB_ARGUMENTS,
    short_help="Serve a model on several ranks, balancing its experts.",
)(run)
app.command(
    context_settings=EPLB_ARGUMENTS,
    short_help="Print the balancing options in force, and from where.",
)(config)
app.command(
    context_settings=EPLB_ARGUMENTS,
    short_help="Serve a model over HTTP, as OpenAI's clients expect it.",
)(serve)
for command in (status, scale, rebalance, top, inspect, plan, replay, policies, doctor):
    app.command()(command)
bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench", help="Measure what this machine does, beside what limits it.")
bench.command("dispatch")(bench_dispatch)
bench.command("elastic")(bench_elastic)
bench.command("layer")(bench_layer)
bench.command("load")(bench_load)
bench.command("plan")(bench_plan)
bench.command("record")(bench_record)
bench.command("serve")(bench_serve)
bench.command("recovery")(bench_recovery)
bench.command("stall")(bench_stall)
bench.command("step")(bench_step)
bench.command("transfer")(bench_transfer)
