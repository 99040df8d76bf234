"""`equipoise policies`: who can plan."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from equipoise.errors import ConfigError
from equipoise.policy import find_policy, get_policy, list_policies


def policies(
    compile: Annotated[  # noqa: A002 - the option's name
        bool, typer.Option("--compile", help="Compile what they compile, so that no start has to.")
    ] = False,
) -> None:
    """List the placement policies that are installed."""
    if compile:
        for name in list_policies():
            # Making one compiles its loops, which the cache on disk keeps.
            get_policy(name)
    table = Table(box=None, pad_edge=False)
    for name in ("policy", "from", "what it does"):
        table.add_column(name, no_wrap=name != "what it does")
    for name in list_policies():
        table.add_row(name, *_describe(name))
    Console().print(table)


def _describe(name: str) -> tuple[str, str]:
    """Module and first line; of a package that is broken, why."""
    try:
        policy = find_policy(name)
    except ConfigError as error:
        return "-", str(error)
    return policy.__module__, (inspect.getdoc(policy) or "-").partition("\n")[0]
