"""Which wires there are, and how one is made.

Wires are found by name: ours, and those that installed packages bring as entry points of the group
`equipoise.communicators`. Such a class takes what ours take: the group coordinator, the expert
weights, and the seconds to wait for a peer. None is imported before it is asked for.
"""

from __future__ import annotations

import difflib
import logging
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from equipoise.comm.base import EplbCommunicator, ExpertWeights, GroupCoordinator
from equipoise.comm.choice import Greeting, check_max_ctas, choose, greet
from equipoise.comm.groups import RankGroup
from equipoise.errors import CommunicatorUnavailable, ConfigError

logger = logging.getLogger(__name__)

GROUP = "equipoise.communicators"
_OURS = (
    EntryPoint("nixl", "equipoise.comm.nixl:NixlEplbCommunicator", GROUP),
    EntryPoint("pynccl", "equipoise.comm.pynccl:PyNcclEplbCommunicator", GROUP),
    EntryPoint(
        "torch_gloo", "equipoise.comm.torch_gloo:TorchDistGlooStagedEplbCommunicator", GROUP
    ),
    EntryPoint("torch_nccl", "equipoise.comm.torch_nccl:TorchDistNcclEplbCommunicator", GROUP),
)
_DEFAULT_TIMEOUT_S = 60.0


def list_communicators() -> tuple[str, ...]:
    """Names that a communicator may be asked for by, sorted. Collective: none."""
    return tuple(sorted(_find_entries()))


def check_name(name: str) -> None:
    """Refuse a name that no communicator has, before anything is made.

    Args:
        name: of `list_communicators`, or "auto".
    Collective: none.
    Raises: ConfigError if there is none of this name.
    """
    entries = _find_entries()
    if name != "auto" and name not in entries:
        raise _refuse_name(name, sorted(entries))


def create_eplb_communicator(
    group_coordinator: GroupCoordinator,
    backend: str | None,
    expert_weights: ExpertWeights,
    *,
    nccl_max_ctas: int | None = None,
) -> EplbCommunicator:
    """Make the communicator of this name, and never another.

    Args:
        group_coordinator: its groups carry the weights; a RankGroup's timeout is the
            communicator's, others wait for a peer up to 60 s.
        backend: a name of `list_communicators`; None or "auto" takes nixl where every rank has it,
            else over NCCL where that can work, else torch_gloo. The first rank of each host logs
            which it is and why.
        expert_weights: what moves are sent from.
        nccl_max_ctas: most thread blocks that a kernel of NCCL's takes from the forward pass; None
            for NCCL's own choice. `pynccl` keeps it; "auto" then takes no other wire over NCCL.
    Returns:
        the communicator; its `name` says which, and its `reason` why.
    Collective: every rank of the group, with the same arguments.
    Raises: ConfigError if there is none of this name, ranks ask for different ones, or the named
        one cannot keep `nccl_max_ctas`;
        CommunicatorUnavailable if it cannot work on every rank; TransferError if a rank does not
        come in time.
    """
    asked = backend or "auto"
    check_name(asked)
    check_max_ctas(asked, nccl_max_ctas)
    entries = _find_entries()
    timeout_s = (
        group_coordinator.timeout.total_seconds()
        if isinstance(group_coordinator, RankGroup)
        else _DEFAULT_TIMEOUT_S
    )
    group = group_coordinator.cpu_group
    mine = Greeting.of_this_rank(asked, group_coordinator, expert_weights, nccl_max_ctas)
    greetings = greet(group, mine, timeout_s)
    name, reason = choose(greetings)
    rank = group.rank()
    if all(greetings[other].host != greetings[rank].host for other in range(rank)):
        logger.info("communicator %s: %s", name, reason)
    options = {"max_ctas": nccl_max_ctas} if name == "pynccl" else {}
    communicator: EplbCommunicator = _load(entries[name])(
        group_coordinator, expert_weights, timeout_s, **options
    )
    communicator.reason = reason
    return communicator


def _find_entries() -> dict[str, EntryPoint]:
    # Ours are listed here, so that a tree works that was never installed; and they win.
    return {entry.name: entry for entry in (*_find_installed(*sys.path), *_OURS)}


@cache
def _find_installed(*path: str) -> tuple[EntryPoint, ...]:
    """Of packages on a path; once, as each generation asks and reading them takes its time."""
    del path  # what is found depends on it
    return tuple(entry_points(group=GROUP))


def _refuse_name(name: str, there: list[str]) -> Exception:
    choice = f"there are auto, {', '.join(there)}"
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
