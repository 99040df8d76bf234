"""The all-to-all of tokens, and the maps from experts to slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from equipoise.errors import ConfigError
from equipoise.topology import Topology

if TYPE_CHECKING:
    from equipoise.comm.groups import RankGroup
    from equipoise.dispatch.base import TokenDispatcher
    from equipoise.dispatch.nixl_ep.dispatcher import NixlEPOptions

DISPATCHERS = ("reference", "torch", "nixl_ep")
"""Names that `create_dispatcher` knows."""


def create_dispatcher(
    choice: str | NixlEPOptions, group: RankGroup, topology: Topology
) -> TokenDispatcher:
    """Make a dispatcher by name; its module is imported only now.

    Args:
        choice: one of DISPATCHERS; for "nixl_ep" its options, which hold the process's buffer.
        group: the ranks that exchange tokens.
        topology: their slots; R is the group's size.
    Collective: every rank of the group.
    Raises: ConfigError if the name is unknown, or the topology is not the group's; what the
        backend raises if it cannot work here.
    """
    if topology.num_ranks != group.size:
        raise ConfigError(
            f"slots are spread over {topology.num_ranks} ranks, but {group.size} exchange tokens"
        )
    if not isinstance(choice, str):
        from equipoise.dispatch.nixl_ep.dispatcher import NixlEPDispatcher

        return NixlEPDispatcher(group, topology, choice)
    match choice:
        case "reference":
            from equipoise.dispatch.reference import ReferenceDispatcher

            return ReferenceDispatcher(topology)
        case "torch":
            from equipoise.dispatch.all_to_all import AllToAllDispatcher

            return AllToAllDispatcher(group, topology)
        case "nixl_ep":
            raise ConfigError(
                "nixl_ep sends tokens through the one buffer of the process: give NixlEPOptions"
            )
        case _:
            raise ConfigError(f"unknown dispatcher {choice!r}: there are {', '.join(DISPATCHERS)}")
