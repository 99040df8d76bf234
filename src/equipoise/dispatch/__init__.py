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
    name: str, group: RankGroup, topology: Topology, nixl_ep: NixlEPOptions | None = None
) -> TokenDispatcher:
    """Make a dispatcher by name; its module is imported only now.

    Args:
        name: one of DISPATCHERS.
        group: the ranks that exchange tokens.
        topology: their slots; R is the group's size.
        nixl_ep: the buffer of this process and what it is to hold, for "nixl_ep" alone.
    Collective: every rank of the group.
    Raises: ConfigError if the name is unknown, or the topology is not the group's; what the
        backend raises if it cannot work here.
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
        case "nixl_ep":
            if nixl_ep is None:
                raise ConfigError(
                    "nixl_ep sends tokens through the one buffer of the process: give NixlEPOptions"
                )
            from equipoise.dispatch.nixl_ep.dispatcher import NixlEPDispatcher

            return NixlEPDispatcher(group, topology, nixl_ep)
        case _:
            raise ConfigError(f"unknown dispatcher {name!r}: there are {', '.join(DISPATCHERS)}")
