"""Where experts go: pure functions from load to placement.

Policies are found by name: ours, and those that installed packages bring as entry points of the
group `equipoise.policies`. None is imported before it is asked for.
"""

from __future__ import annotations

import difflib
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from equipoise.errors import ConfigError
from equipoise.policy.base import PlacementPolicy

__all__ = ["PlacementPolicy", "find_policy", "get_policy", "list_policies"]

GROUP = "equipoise.policies"


def list_policies() -> tuple[str, ...]:
    """Names that `get_policy` knows, sorted. Collective: none."""
    return tuple(sorted(_find_entries()))


def get_policy(name: str) -> PlacementPolicy:
    """Make the policy that is registered under a name, with its defaults.

    Args:
        name: one of `list_policies()`.
    Collective: none.
    Raises: ConfigError if there is none of that name, or it cannot be imported or is no policy.
    """
    return find_policy(name)()


def find_policy(name: str) -> type[PlacementPolicy]:
    """The class that is registered under a name, which is not made.

    Args:
        name: one of `list_policies()`.
    Collective: none.
    Raises: ConfigError as `get_policy`.
    """
    entries = _find_entries()
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no policy {name!r}: {hint}there are {', '.join(sorted(entries))}")
    entry = entries[name]
    try:
        policy = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"policy {name!r} cannot be loaded from {entry.value}: {error}"
        ) from error
    if not (isinstance(policy, type) and issubclass(policy, PlacementPolicy)):
        raise ConfigError(f"policy {name!r}: {entry.value} is not a subclass of PlacementPolicy")
    return policy


def _find_entries() -> dict[str, EntryPoint]:
    # Ours are listed here too, so that a tree works that was never installed; and they win.
    ours = (
        EntryPoint("deepseek", "equipoise.policy.deepseek:DeepSeekPolicy", GROUP),
        EntryPoint("flow", "equipoise.policy.flow:FlowPolicy", GROUP),
    )
    return {entry.name: entry for entry in (*_find_installed(*sys.path), *ours)}


@cache
def _find_installed(*path: str) -> tuple[EntryPoint, ...]:
    """Of packages on a path; once, as each generation asks and reading them takes its time."""
    del path  # what is found depends on it
    return tuple(entry_points(group=GROUP))
