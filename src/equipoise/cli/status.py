"""`equipoise status`: a running service at this moment."""

from __future__ import annotations

import json as json_format
from typing import Annotated

import typer

from equipoise.cli.service import SocketPath, Url, read_status


def status(
    socket: SocketPath = None,
    url: Url = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say who serves, what they have, and what a change of the ranks is at."""
    where, now = read_status(socket, url)
    if json:
        typer.echo(json_format.dumps(now, indent=2))
        return
    from rich.console import Console

    from equipoise.report.service import render_service

    Console().print(render_service(where, now, None, 0.0))
