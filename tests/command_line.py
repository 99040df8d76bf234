"""Running a command of the command line within the test's process."""

from __future__ import annotations

from typing import NamedTuple

import typer
from typer.testing import CliRunner

from equipoise.cli.plan import plan
from equipoise.cli.policies import policies
from equipoise.cli.replay import replay
from equipoise.errors import EquipoiseError


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run_command(*words: object) -> Done:
    """Run `equipoise` with these words, 200 columns wide."""
    app = typer.Typer()
    for command in (plan, policies, replay):
        app.command()(command)
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if isinstance(result.exception, EquipoiseError):
        return Done(2, result.stdout, f"{result.exception}\n")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout, result.stderr)
