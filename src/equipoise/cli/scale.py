"""`equipoise scale`: change the ranks of a running service."""

from __future__ import annotations

import json as json_format
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.cli.service import SocketPath, Url, WaitS, find_socket
from equipoise.errors import ConfigError, MembershipError

if TYPE_CHECKING:
    from pathlib import Path

LONGEST_S = 86_400.0
"""A day."""


def scale(
    to: Annotated[int | None, typer.Option(help="Ranks that there shall be.")] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="Name of a rank that shall leave; may repeat.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would move and take.")
    ] = False,
    refuse: Annotated[
        bool, typer.Option("--refuse", help="Do not wait for a change that is under way.")
    ] = False,
    timeout: WaitS = 600.0,
    socket: SocketPath = None,
    url: Url = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Let ranks join a running service, or leave it, while it serves.

    It returns when the change is done, or, with the service as it was, has failed.
    """
    if (to is None) == (not remove):
        raise ConfigError("say either --to, how many ranks there shall be, or --remove, which go")
    # As whole seconds, which a server counts in.
    if not 1 <= timeout <= LONGEST_S:
        raise ConfigError(f"--timeout must be from 1 to {LONGEST_S:g} s, got {timeout:g}")
    report = _ask(socket, url, to, remove or [], dry_run, refuse, timeout)
    typer.echo(json_format.dumps(report, indent=2) if json else _describe(report))


def _ask(
    socket: Path | None,
    url: str | None,
    to: int | None,
    remove: list[str],
    dry_run: bool,
    refuse: bool,
    timeout_s: float,
) -> dict[str, Any]:
    if url is not None:
        from equipoise.server.client import ServerClient

        if refuse:
            raise ConfigError("--refuse is for a socket: a server lets changes wait")
        client = ServerClient(url)
        return client.scale(to, remove, dry_run=dry_run, timeout_s=int(timeout_s))
    from equipoise.elastic.control import ask

    try:
        report: dict[str, Any] = ask(
            find_socket(socket),
            "scale",
            takes_s=timeout_s,
            to=to,
            remove=remove,
            dry_run=dry_run,
            busy="refuse" if refuse else "queue",
            timeout_s=timeout_s,
        )
    except TimeoutError as error:
        raise MembershipError(str(error)) from error
    return report


def _describe(report: dict[str, Any]) -> str:
    lines = []
    for what, key in (("joining", "joining"), ("leaving", "leaving"), ("staying", "staying")):
        if report[key]:
            lines.append(f"{what}: {', '.join(report[key])}")
    lines.append(f"weights between ranks: {_say_bytes(report['bytes'])}")
    for name, most in (report["peak_bytes_per_rank"] or {}).items():
        lines.append(f"most held at once by {name}: {_say_bytes(most)}")
    if report["pause_s"] is not None:
        expected = "expected pause" if report["dry_run"] else "longest pause"
        lines.append(f"{expected} of a rank: {report['pause_s'] * 1000:.1f} ms")
    if report["total_s"] is not None:
        lines.append(
            f"took {report['total_s']:.2f} s, without the start of processes; "
            f"{report['prepare_s']:.2f} s of it beside serving"
        )
    lines += report["notes"]
    if report["dry_run"]:
        lines.append("nothing was changed")
    elif report["done"]:
        lines.append(f"generation {report['generation']} serves")
    return "\n".join(lines)


def _say_bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
