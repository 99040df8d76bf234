"""`equipoise top`: a service's ranks and figures, redrawn."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.cli.service import SocketPath, Url, read_status
from equipoise.errors import ConfigError, MembershipError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SHORTEST_S = 0.1


def top(
    socket: SocketPath = None,
    url: Url = None,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
) -> None:
    """Watch a service: its ranks, what they have, and what it has done. Ctrl-C ends it."""
    from rich.console import Console

    from equipoise.report.service import render_service

    if not interval >= SHORTEST_S:
        raise ConfigError(f"--interval must be at least {SHORTEST_S} s, got {interval:g}")
    where, now = read_status(socket, url)
    at_s = time.monotonic()
    console = Console()
    if once or not console.is_terminal:
        console.print(render_service(where, now, None, 0.0))
        return
    # The one that was found, not whichever is the only one later.
    found = None if url is not None else Path(where)
    _watch(console, lambda: read_status(found, url), (where, now, at_s), interval)


def _watch(
    console: Console,
    read: Callable[[], tuple[str, dict[str, Any]]],
    first: tuple[str, dict[str, Any], float],
    interval: float,
) -> None:
    """Redraw until Ctrl-C; a service that does not answer may do so again."""
    from rich.live import Live

    from equipoise.report.service import render_service
    from equipoise.server.client import ServerRefused

    def show(picture: RenderableType) -> None:
        live.update(picture, refresh=True)

    where, now, at_s = first
    with Live(console=console, auto_refresh=False, screen=True) as live:
        show(render_service(where, now, None, 0.0))
        while True:
            time.sleep(interval)
            try:
                before, (_, now) = now, read()
            except (MembershipError, ServerRefused) as error:
                status = getattr(error, "status", None)
                if status not in (None, 503):
                    raise
                show(f"{error}\n\nlooking again every {interval:g} s")
                continue
            before_s, at_s = at_s, time.monotonic()
            show(render_service(where, now, before, at_s - before_s))
