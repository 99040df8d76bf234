"""Balanced, movable, elastic experts for Mixture-of-Experts models.

Names are imported when they are first used, so that the package itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equipoise.balancer import (
        EplbModelState,
        EplbState,
        EplbStats,
        ModelStats,
        RebalanceOutcome,
    )
    from equipoise.comm import (
        EplbCommunicator,
        ExpertMoves,
        create_eplb_communicator,
        list_communicators,
    )
    from equipoise.comm.groups import RankGroup, create_rank_group
    from equipoise.comm.nixl.agent import has_nixl
    from equipoise.config import EPLBConfig, make_config
    from equipoise.dispatch import create_dispatcher
    from equipoise.dispatch.maps import PlacementMaps
    from equipoise.dispatch.nixl_ep.all_to_all import NixlEPAll2AllManager
    from equipoise.dispatch.nixl_ep.dispatcher import NixlEPOptions
    from equipoise.dispatch.replicas import choose_slots
    from equipoise.dispatch.rows import dequant_fp8, maybe_roundup_layer_hidden_size
    from equipoise.dispatch.turns import NearestReplicas, SharedReplicas, SpreadReplicas
    from equipoise.errors import (
        CommunicatorUnavailable,
        ConfigError,
        DependencyError,
        EquipoiseError,
        MembershipError,
        ModelError,
        PlacementError,
        TraceError,
        TransferError,
    )
    from equipoise.load.recorder import LoadRecorder
    from equipoise.models.parallel import ParallelModel, parallelize
    from equipoise.placement import Placement, place_in_order
    from equipoise.policy import PlacementPolicy, get_policy, list_policies
    from equipoise.topology import Topology, choose_num_redundant
    from equipoise.transfer import TransferStats, rearrange_expert_weights_inplace

__version__ = "0.1.0"

_NAMES = MappingProxyType(
    {
        "equipoise.balancer": "EplbModelState EplbState EplbStats ModelStats RebalanceOutcome",
        "equipoise.comm": (
            "EplbCommunicator ExpertMoves create_eplb_communicator list_communicators"
        ),
        "equipoise.comm.groups": "RankGroup create_rank_group",
        "equipoise.comm.nixl.agent": "has_nixl",
        "equipoise.config": "EPLBConfig make_config",
        "equipoise.dispatch": "create_dispatcher",
        "equipoise.dispatch.maps": "PlacementMaps",
        "equipoise.dispatch.nixl_ep.all_to_all": "NixlEPAll2AllManager",
        "equipoise.dispatch.nixl_ep.dispatcher": "NixlEPOptions",
        "equipoise.dispatch.replicas": "choose_slots",
        "equipoise.dispatch.rows": "dequant_fp8 maybe_roundup_layer_hidden_size",
        "equipoise.dispatch.turns": "NearestReplicas SharedReplicas SpreadReplicas",
        "equipoise.errors": (
            "CommunicatorUnavailable ConfigError DependencyError EquipoiseError MembershipError "
            "ModelError PlacementError TraceError TransferError"
        ),
        "equipoise.load.recorder": "LoadRecorder",
        "equipoise.models.parallel": "ParallelModel parallelize",
        "equipoise.placement": "Placement place_in_order",
        "equipoise.policy": "PlacementPolicy get_policy list_policies",
        "equipoise.topology": "Topology choose_num_redundant",
        "equipoise.transfer": "TransferStats rearrange_expert_weights_inplace",
    }
)
_HOMES = MappingProxyType({name: home for home, names in _NAMES.items() for name in names.split()})

__all__ = [
    "CommunicatorUnavailable",
    "ConfigError",
    "DependencyError",
    "EPLBConfig",
    "EplbCommunicator",
    "EplbModelState",
    "EplbState",
    "EplbStats",
    "EquipoiseError",
    "ExpertMoves",
    "LoadRecorder",
    "MembershipError",
    "ModelError",
    "ModelStats",
    "NearestReplicas",
    "NixlEPAll2AllManager",
    "NixlEPOptions",
    "ParallelModel",
    "Placement",
    "PlacementError",
    "PlacementMaps",
    "PlacementPolicy",
    "RankGroup",
    "RebalanceOutcome",
    "SharedReplicas",
    "SpreadReplicas",
    "Topology",
    "TraceError",
    "TransferError",
    "TransferStats",
    "choose_num_redundant",
    "choose_slots",
    "create_dispatcher",
    "create_eplb_communicator",
    "create_rank_group",
    "dequant_fp8",
    "get_policy",
    "has_nixl",
    "list_communicators",
    "list_policies",
    "make_config",
    "maybe_roundup_layer_hidden_size",
    "parallelize",
    "place_in_order",
    "rearrange_expert_weights_inplace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'equipoise' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
