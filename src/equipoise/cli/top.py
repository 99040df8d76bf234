"""`equipoise top`: a server's ranks and figures, redrawn."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

DEFAULT_URL = "http://127.0.0.1:8000"
SHORTEST_S = 0.1


def top(
    url: Annotated[str, typer.Argument(help="Of the server.")] = DEFAULT_URL,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
) -> None:
    """Watch a server: its ranks, what they have, and what it has done.

    A key is read from EQ_ADMIN_KEY or EQ_API_KEY. Ctrl-C ends it.
    """
    from rich.console import Console
    from rich.live import Live

    from equipoise.errors import ConfigError
    from equipoise.report.service import render_service
    from equipoise.server.client import ServerClient, ServerRefused

    if not interval >= SHORTEST_S:
        raise ConfigError(f"--interval must be at least {SHORTEST_S} s, got {interval:g}")
    client = ServerClient(url)
    before: dict[str, Any] | None = None
    now, at_s = client.status(), time.monotonic()
    console = Console()
    if once or not console.is_terminal:
        console.print(render_service(client.url, now, None, 0.0))
        return

    def show(picture: RenderableType) -> None:
        live.update(picture, refresh=True)

    with Live(console=console, auto_refresh=False, screen=True) as live:
        show(render_service(client.url, now, None, 0.0))
        while True:
            time.sleep(interval)
            try:
                before, now = now, client.status()
            except ServerRefused as error:
                if error.status is not None and error.status not in (503,):
                    raise
                show(f"{error}\n\nlooking again every {interval:g} s")
                continue
            before_s, at_s = at_s, time.monotonic()
            show(render_service(client.url, now, before, at_s - before_s))
