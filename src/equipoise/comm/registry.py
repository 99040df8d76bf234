"""Which wires there are, and how one is made."""

from __future__ import annotations

import difflib
import importlib
import logging
from types import MappingProxyType
from typing import Protocol

import torch.distributed as dist

from equipoise.comm.base import EplbCommunicator, ExpertWeights
from equipoise.comm.groups import RankGroup
from equipoise.errors import ConfigError

logger = logging.getLogger(__name__)

_CLASSES = MappingProxyType(
    {
        "nixl": "equipoise.comm.nixl:NixlEplbCommunicator",
        "torch_gloo": "equipoise.comm.torch_gloo:TorchDistGlooStagedEplbCommunicator",
    }
)
_DEFAULT_TIMEOUT_S = 60.0


class GroupCoordinator(Protocol):
    """Whatever has the two groups of the expert-parallel ranks; a RankGroup, for one."""

    @property
    def cpu_group(self) -> dist.ProcessGroup:
        """With a gloo backend."""

    @property
    def device_group(self) -> dist.ProcessGroup:
        """With the device's own backend, or the other group again."""


def list_communicators() -> tuple[str, ...]:
    """Names that a communicator may be asked for by, sorted."""
    return tuple(sorted(_CLASSES))


def create_eplb_communicator(
    group_coordinator: GroupCoordinator, backend: str | None, expert_weights: ExpertWeights
) -> EplbCommunicator:
    """Make the communicator of this name, and never another.

    Args:
        group_coordinator: its groups carry the weights; a RankGroup's timeout is the
            communicator's, others wait for a peer up to 60 s.
        backend: a name of `list_communicators`; None or "auto" chooses, and logs which and why.
        expert_weights: what moves are sent from.
    Returns:
        the communicator; its `name` says which.
    Collective: every rank of the group, with the same backend.
    Raises: ConfigError if there is none of this name; CommunicatorUnavailable if it cannot work
        here.
    """
    name = backend
    if name is None or name == "auto":
        name = "torch_gloo"
        logger.info("communicator auto: torch_gloo, which works on every device")
    if name not in _CLASSES:
        near = difflib.get_close_matches(name, _CLASSES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"unknown communicator {name!r}: {hint}there are auto, {', '.join(_CLASSES)}"
        )
    timeout_s = (
        group_coordinator.timeout.total_seconds()
        if isinstance(group_coordinator, RankGroup)
        else _DEFAULT_TIMEOUT_S
    )
    module, _, class_name = _CLASSES[name].partition(":")
    communicator: EplbCommunicator = getattr(importlib.import_module(module), class_name)(
        group_coordinator.cpu_group, expert_weights, timeout_s
    )
    return communicator
