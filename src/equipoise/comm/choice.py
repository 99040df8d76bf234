"""Which wire a group of ranks gets: what they tell each other of themselves, and the rules."""

from __future__ import annotations

import hashlib
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.comm.base import ExpertWeights, GroupCoordinator
from equipoise.comm.exchange import Exchange, deadline_in, explain, name_ranks
from equipoise.comm.groups import RankGroup, find_device
from equipoise.comm.nixl.agent import has_nixl
from equipoise.comm.process_groups import has_nccl
from equipoise.comm.pynccl import has_nccl4py
from equipoise.errors import CommunicatorUnavailable, ConfigError, TransferError

_TAG_GREETING = 6
_DIGEST_BYTES = 8
_NO_GPU = bytes(_DIGEST_BYTES)


@dataclass(frozen=True)
class Greeting:
    """What ranks tell each other before a communicator is made.

    Attributes:
        asked: the backend, or "auto".
        has_nixl: whether it can be imported; False where it is not asked for.
        has_nccl4py: the same of nccl4py.
        has_nccl_group: whether the coordinator's device group has NCCL.
        is_beside_nccl: whether a thread of its own will use the wire while tokens travel over NCCL.
        host: [8] bytes, equal on equal hosts.
        gpu: [8] bytes, of the GPU that the weights are on; zeros on the CPU.
        max_ctas: most thread blocks of an NCCL kernel; 0 for NCCL's own choice.
    """

    asked: str
    has_nixl: bool
    has_nccl4py: bool
    has_nccl_group: bool
    is_beside_nccl: bool
    host: bytes
    gpu: bytes
    max_ctas: int = 0

    _LAYOUT: ClassVar[struct.Struct] = struct.Struct("<32s????8s8sH")

    @classmethod
    def of_this_rank(
        cls,
        asked: str,
        coordinator: GroupCoordinator,
        expert_weights: ExpertWeights,
        max_ctas: int | None = None,
    ) -> Greeting:
        """What is true here. Collective: none."""
        device = find_device(coordinator, expert_weights)
        on_cuda = device.type == "cuda"
        return cls(
            asked,
            asked in ("auto", "nixl") and has_nixl(),
            on_cuda and asked in ("auto", "pynccl") and has_nccl4py(),
            on_cuda and has_nccl(coordinator.device_group),
            isinstance(coordinator, RankGroup) and coordinator.is_beside_nccl,
            _digest(socket.gethostname()),
            _digest(str(torch.cuda.get_device_properties(device).uuid)) if on_cuda else _NO_GPU,
            max_ctas or 0,
        )

    def to_tensor(self) -> Tensor:
        """[54] uint8."""
        data = self._LAYOUT.pack(
            self.asked.encode(),
            self.has_nixl,
            self.has_nccl4py,
            self.has_nccl_group,
            self.is_beside_nccl,
            self.host,
            self.gpu,
            self.max_ctas,
        )
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> Greeting:
        """What `to_tensor` wrote."""
        asked, *rest = cls._LAYOUT.unpack(tensor.numpy().tobytes())
        return cls(asked.rstrip(b"\0").decode(), *rest)


def greet(group: dist.ProcessGroup, mine: Greeting, timeout_s: float) -> list[Greeting]:
    """Everybody's greeting, by rank.

    Collective: every rank of the group.
    Raises: TransferError if one does not come in time.
    """
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
    return [Greeting.from_tensor(tensor) for tensor in heard]


def choose(greetings: Sequence[Greeting]) -> tuple[str, str]:
    """The backend's name and why; the same on every rank.

    Collective: none.
    Raises: ConfigError if ranks ask for different ones; CommunicatorUnavailable if it cannot work.
    """
    asked, max_ctas = greetings[0].asked, greetings[0].max_ctas
    for rank, greeting in enumerate(greetings):
        if greeting.asked != asked:
            raise ConfigError(
                f"rank 0 asks for communicator {asked}, rank {rank} for {greeting.asked}: "
                "all ranks need the same"
            )
        if greeting.max_ctas != max_ctas:
            raise ConfigError(
                f"rank 0 asks for {max_ctas} thread blocks of NCCL (nccl_max_ctas, 0 where it is "
                f"not given), rank {rank} for {greeting.max_ctas}: all ranks need the same"
            )
    if asked != "auto":
        reason = _find_obstacle(asked, greetings)
        if reason is not None:
            raise CommunicatorUnavailable(reason)
        return asked, "as asked for"
    name, reason = _choose_best(greetings)
    if max_ctas and name != "pynccl":
        reason += "; nccl_max_ctas has no say there"
    return name, f"auto; {reason}"


def check_max_ctas(asked: str, max_ctas: int | None) -> None:
    """Refuse a bound on NCCL's thread blocks where the wire that is asked for cannot keep it.

    Args:
        asked: the backend, or "auto".
        max_ctas: the bound, or None.
    Collective: none.
    Raises: ConfigError that says what can.
    """
    if max_ctas is None or asked in ("auto", "pynccl"):
        return
    if asked == "torch_nccl":
        raise ConfigError(
            "nccl_max_ctas cannot bound torch_nccl, which works on the engine's own NCCL group: "
            "take pynccl, or set NCCL_MAX_CTAS in the environment before that group is made"
        )
    raise ConfigError(f"nccl_max_ctas is an option of pynccl, and {asked} is asked for")


def _choose_best(greetings: Sequence[Greeting]) -> tuple[str, str]:
    if len(greetings) == 1:
        return "torch_gloo", "a single rank sends nothing"
    without = [rank for rank, greeting in enumerate(greetings) if not greeting.has_nixl]
    if not without:
        return "nixl", "every rank has NIXL"
    # A group that is the engine's keeps to no bound of ours.
    over_nccl = ("pynccl",) if greetings[0].max_ctas else ("torch_nccl", "pynccl")
    for name in over_nccl:
        if _find_obstacle(name, greetings) is None:
            return name, f"{name_ranks(without)} cannot import NIXL"
    return "torch_gloo", f"{name_ranks(without)} cannot import NIXL"


def _find_obstacle(name: str, greetings: Sequence[Greeting]) -> str | None:
    """Why a wire cannot work between these ranks; None if it can, or is not ours."""
    if name == "nixl":
        return _find_missing(name, "NIXL", "nixl", [each.has_nixl for each in greetings])
    if name not in ("torch_nccl", "pynccl"):
        return None
    on_cpu = [rank for rank, each in enumerate(greetings) if each.gpu == _NO_GPU]
    if on_cpu:
        return (
            f"the communicator {name} moves weights between GPUs, and those of "
            f"{name_ranks(on_cpu)} are on the CPU: take nixl or torch_gloo"
        )
    if any(each.is_beside_nccl for each in greetings):
        return (
            f"the communicator {name} cannot work in the background while tokens travel over NCCL, "
            "whose operations of two threads may wait for each other forever: take nixl, or "
            "balance in the foreground (use_async: false)"
        )
    seats = [(each.host, each.gpu) for each in greetings]
    sharing = [rank for rank, seat in enumerate(seats) if seats.count(seat) > 1]
    if sharing:
        return (
            f"the communicator {name} needs a GPU for each rank, as NCCL does, and "
            f"{name_ranks(sharing)} share one: take nixl or torch_gloo"
        )
    if name == "pynccl":
        return _find_missing(name, "nccl4py", "nccl", [each.has_nccl4py for each in greetings])
    without = [rank for rank, each in enumerate(greetings) if not each.has_nccl_group]
    if without:
        return (
            f"the communicator torch_nccl needs a device_group with NCCL, which "
            f"{name_ranks(without)} do not have: take pynccl, which makes its own, or nixl"
        )
    return None


def _find_missing(name: str, package: str, extra: str, has: Sequence[bool]) -> str | None:
    without = [rank for rank, there in enumerate(has) if not there]
    if not without:
        return None
    return (
        f"the communicator {name} needs {package}, which {name_ranks(without)} cannot import: "
        f"pip install 'equipoise[{extra}]'"
    )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()
