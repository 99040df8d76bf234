"""The all-to-all of tokens, and the maps from experts to slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from equipoise.errors import ConfigError
from equipoise.topology import Topology

if TYPE_CHECKING:
    from equipoise.comm.groups import RankGroup
    from equipoise.dispatch.base import TokenDispatcher

DISPATCHERS = ("reference", "torch")
"""Names that `create_dispatcher` knows."""


def create_dispatcher(name: str, group: RankGroup, topology: Topology) -> TokenDispatcher:
    """Make a dispatcher by name; its module is imported only now.

    Args:
        name: one of DISPATCHERS.
        group: the ranks that exchange tokens.
        topology: their slots; R is the group's size.
    Collective: every rank of the group.
    Raises: ConfigError if the name is unknown, or the topology is not the group's.
    """
    if topology.num_ranks != group.size:
        raise ConfigError(
            f"slots are spread over {topology.num_ranks} ranks, but {group.size} exchange tokens"
        )
    match name:
        case "reference":
            from equipoise.dispatch.reference import ReferenceDispatcher

            return ReferenceDispatcher(topology)
        case "torch":
            from equipoise.dispatch.all_to_all import AllToAllDispatcher

            return AllToAllDispatcher(group, topology)
        case _:
            raise ConfigError(f"unknown dispatcher {name!r}: there are {', '.join(DISPATCHERS)}")
