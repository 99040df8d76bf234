"""`equipoise rebalance`: have a running service balance its experts now."""

from __future__ import annotations

import typer

from equipoise.cli.service import SocketPath, Url, find_socket


def rebalance(socket: SocketPath = None, url: Url = None) -> None:
    """Have a rebalance begin at the next occasion; it does not wait for its end."""
    if url is not None:
        from equipoise.server.client import ServerClient

        ServerClient(url).rebalance()
    else:
        from equipoise.elastic.control import ask

        ask(find_socket(socket), "rebalance")
    typer.echo("a rebalance begins, if there is load to plan from")
