"""How commands reach a running service: by its socket on this machine, or by its address."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from equipoise.errors import ConfigError

SocketPath = Annotated[
    Path | None, typer.Option("--socket", help="Of the service.  [the only one of this user]")
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url", help="Of a server, instead of a socket; key from EQ_ADMIN_KEY or EQ_API_KEY."
    ),
]
WaitS = Annotated[float, typer.Option("--timeout", help="Longest wait for it, in s.")]


def read_status(socket: Path | None, url: str | None) -> tuple[str, dict[str, Any]]:
    """Where the service is, for people, and how it is."""
    if url is not None:
        from equipoise.server.client import ServerClient

        client = ServerClient(url)
        return client.url, client.status()
    from equipoise.elastic.control import ask

    path = find_socket(socket)
    return str(path), ask(path, "status")


def find_socket(path: Path | None) -> Path:
    """The socket that was named, or the only one that there is.

    Raises: ConfigError if there is none, or more than one.
    """
    if path is not None:
        return path
    from equipoise.elastic.control import find_sockets

    found = find_sockets()
    if not found:
        raise ConfigError("no service of this user runs here: start one by `equipoise serve`")
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise ConfigError(f"{len(found)} services run here: name one by --socket: {names}")
    return found[0]
