"""Which wires there are, and how one is made.

Wires are found by name: ours, and those that installed packages bring as entry points of the group
`equipoise.communicators`. Such a class takes what ours take: a process group, the expert weights,
and the seconds to wait for a peer. None is imported before it is asked for.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import socket
import struct
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.comm.base import EplbCommunicator, ExpertWeights
from equipoise.comm.exchange import Exchange, deadline_in, explain, name_ranks
from equipoise.comm.groups import RankGroup
from equipoise.comm.nixl.agent import has_nixl
from equipoise.errors import CommunicatorUnavailable, ConfigError, TransferError

logger = logging.getLogger(__name__)

GROUP = "equipoise.communicators"
_OURS = (
    EntryPoint("nixl", "equipoise.comm.nixl:NixlEplbCommunicator", GROUP),
    EntryPoint(
        "torch_gloo", "equipoise.comm.torch_gloo:TorchDistGlooStagedEplbCommunicator", GROUP
    ),
)
_NOT_YET = ("pynccl", "torch_nccl")
"""Names that vLLM has, and this version has not."""

_DEFAULT_TIMEOUT_S = 60.0
_TAG_GREETING = 6


class GroupCoordinator(Protocol):
    """Whatever has the two groups of the expert-parallel ranks; a RankGroup, for one."""

    @property
    def cpu_group(self) -> dist.ProcessGroup:
        """With a gloo backend."""

    @property
    def device_group(self) -> dist.ProcessGroup:
        """With the device's own backend, or the other group again."""


def list_communicators() -> tuple[str, ...]:
    """Names that a communicator may be asked for by, sorted. Collective: none."""
    return tuple(sorted(_find_entries()))


def check_name(name: str) -> None:
    """Refuse a name that no communicator has, before anything is made.

    Args:
        name: of `list_communicators`, or "auto".
    Collective: none.
    Raises: ConfigError if there is none of this name; CommunicatorUnavailable if it is not in this
        version.
    """
    entries = _find_entries()
    if name != "auto" and name not in entries:
        raise _refuse_name(name, sorted(entries))


def create_eplb_communicator(
    group_coordinator: GroupCoordinator, backend: str | None, expert_weights: ExpertWeights
) -> EplbCommunicator:
    """Make the communicator of this name, and never another.

    Args:
        group_coordinator: its groups carry the weights; a RankGroup's timeout is the
            communicator's, others wait for a peer up to 60 s.
        backend: a name of `list_communicators`; None or "auto" takes nixl where every rank has it,
            else torch_gloo. The first rank of each host logs which it is and why.
        expert_weights: what moves are sent from.
    Returns:
        the communicator; its `name` says which, and its `reason` why.
    Collective: every rank of the group, with the same backend.
    Raises: ConfigError if there is none of this name, or ranks ask for different ones;
        CommunicatorUnavailable if it cannot work on every rank, or is not in this version;
        TransferError if a rank does not come in time.
    """
    asked = backend or "auto"
    check_name(asked)
    entries = _find_entries()
    timeout_s = (
        group_coordinator.timeout.total_seconds()
        if isinstance(group_coordinator, RankGroup)
        else _DEFAULT_TIMEOUT_S
    )
    group = group_coordinator.cpu_group
    greetings = _greet(group, _Greeting.of_this_rank(asked), timeout_s)
    name, reason = _choose(asked, greetings)
    rank = group.rank()
    if all(greetings[other].host != greetings[rank].host for other in range(rank)):
        logger.info("communicator %s: %s", name, reason)
    communicator: EplbCommunicator = _load(entries[name])(group, expert_weights, timeout_s)
    communicator.reason = reason
    return communicator


def _find_entries() -> dict[str, EntryPoint]:
    # Ours are listed here, so that a tree works that was never installed; and they win.
    return {entry.name: entry for entry in (*entry_points(group=GROUP), *_OURS)}


def _refuse_name(name: str, there: list[str]) -> Exception:
    choice = f"there are auto, {', '.join(there)}"
    if name in _NOT_YET:
        return CommunicatorUnavailable(f"communicator {name!r} is not in this version: {choice}")
    near = difflib.get_close_matches(name, there, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ConfigError(f"unknown communicator {name!r}: {hint}{choice}")


def _load(entry: EntryPoint) -> Any:
    """The class, whose constructor is no part of the contract of its instances."""
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise CommunicatorUnavailable(
            f"communicator {entry.name!r} cannot be loaded from {entry.value}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, EplbCommunicator)):
        raise ConfigError(
            f"communicator {entry.name!r}: {entry.value} is not a subclass of EplbCommunicator"
        )
    return found


@dataclass(frozen=True)
class _Greeting:
    """What ranks tell each other before a communicator is made.

    Attributes:
        asked: the backend.
        has_nixl: whether it can be imported; False where it is not asked for.
        host: [8] bytes, equal on equal hosts.
    """

    asked: str
    has_nixl: bool
    host: bytes

    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("<32s?8s")

    @classmethod
    def of_this_rank(cls, asked: str) -> _Greeting:
        host = hashlib.blake2b(socket.gethostname().encode(), digest_size=8).digest()
        return cls(asked, asked in ("auto", "nixl") and has_nixl(), host)

    def to_tensor(self) -> Tensor:
        data = self._LAYOUT.pack(self.asked.encode(), self.has_nixl, self.host)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> _Greeting:
        asked, found, host = cls._LAYOUT.unpack(tensor.numpy().tobytes())
        return cls(asked.rstrip(b"\0").decode(), found, host)


def _greet(group: dist.ProcessGroup, mine: _Greeting, timeout_s: float) -> list[_Greeting]:
    """Everybody's greeting, by rank."""
    own = mine.to_tensor()
    heard = [torch.empty_like(own) for _ in range(group.size())]
    heard[group.rank()] = own
    peers = [peer for peer in range(group.size()) if peer != group.rank()]
    exchange = Exchange(group, _TAG_GREETING)
    for peer in peers:
        exchange.recv(heard[peer], peer)
    for peer in peers:
        exchange.send(own, peer)
    failures = exchange.wait(deadline_in(timeout_s))
    if failures:
        what, peer, cause = explain(failures, timeout_s)
        raise TransferError(
            f"rank {group.rank()}: no communicator: {what}", rank=group.rank(), peer=peer
        ) from cause
    return [_Greeting.from_tensor(tensor) for tensor in heard]


def _choose(asked: str, greetings: list[_Greeting]) -> tuple[str, str]:
    """The backend's name and why; the same on every rank."""
    for rank, greeting in enumerate(greetings):
        if greeting.asked != greetings[0].asked:
            raise ConfigError(
                f"rank 0 asks for communicator {greetings[0].asked}, rank {rank} for "
                f"{greeting.asked}: all ranks need the same"
            )
    without = [rank for rank, greeting in enumerate(greetings) if not greeting.has_nixl]
    if asked == "nixl" and without:
        raise CommunicatorUnavailable(
            f"the communicator nixl needs NIXL, which {name_ranks(without)} cannot import: "
            "pip install 'equipoise[nixl]'"
        )
    if asked != "auto":
        return asked, "as asked for"
    if without:
        return "torch_gloo", f"auto; {name_ranks(without)} cannot import NIXL"
    if len(greetings) == 1:
        return "torch_gloo", "auto; a single rank sends nothing"
    return "nixl", "auto; every rank has NIXL"
