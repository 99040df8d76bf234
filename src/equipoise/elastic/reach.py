"""Which ranks of the next generation reach each other, found out before anything is built on it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from equipoise.elastic.change_store import ChangeStore
from equipoise.errors import ConfigError, MembershipError

STORE = "the store"
"""Stands for it where ranks say whom they do not reach."""

TRY_S = 3.0
"""Longest that a connection may take; on one network it takes less than a millisecond."""


class Unreachable(MembershipError):  # noqa: N818 - says what is the matter
    """Some participants of a change do not reach others.

    Attributes:
        missed: by name, whom it does not reach; of those that miss somebody.
    """

    def __init__(self, missed: dict[str, list[str]]) -> None:
        self.missed = missed
        parts = [f"{name} does not reach {', '.join(others)}" for name, others in missed.items()]
        super().__init__("; ".join(parts))


def meet_peers(store: ChangeStore, name: str, names: Sequence[str], deadline: float) -> None:
    """See whether this rank reaches the others over the network that gloo is told to use.

    Args:
        store: of the change.
        name: of this rank.
        names: of all that must reach each other, this one included.
        deadline: on the clock of time.monotonic.
    Collective: all of them.
    Raises: Unreachable; whatever `ChangeStore.hear` raises.
    """
    with socket.create_server((_find_own_address(), 0)) as listening:
        host, port = listening.getsockname()
        store.tell(f"at/{name}", f"{host}:{port}")
        told = store.hear_all("at", names, deadline)
        others = [(other, at) for other, at in told.items() if other != name]
        # Nobody need accept: a connection stands as soon as it has reached the other's host.
        with ThreadPoolExecutor(max(1, len(others))) as pool:
            reached = list(pool.map(_can_reach, [at for _, at in others]))
        missed = [other for (other, _), can in zip(others, reached, strict=True) if not can]
        store.tell(f"reached/{name}", ",".join(missed))
        # Nobody stops listening while another may still try.
        everybody = store.hear_all("reached", names, deadline)
    all_missed = {other: said.split(",") for other, said in everybody.items() if said}
    if all_missed:
        raise Unreachable(all_missed)


def choose_cut_off(missed: Mapping[str, Collection[str]]) -> list[str]:
    """Which ranks to give up, so that all others reach each other.

    Args:
        missed: by name, whom a rank does not reach; one direction is enough.
    Returns:
        Names: each time the rank that has most such pairs, of several the last by name.
    Collective: none.
    """
    pairs = {frozenset((name, other)) for name, others in missed.items() for other in others}
    given_up = []
    while pairs:
        counts = {name: sum(name in pair for pair in pairs) for pair in pairs for name in pair}
        worst = max(counts, key=lambda name: (counts[name], len(name), name))
        given_up.append(worst)
        pairs = {pair for pair in pairs if worst not in pair}
    return given_up


def _find_own_address() -> str:
    """That gloo listens on: of the interface that GLOO_SOCKET_IFNAME names, else the host's."""
    from equipoise.elastic.interface import find_address

    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if interface:
        with contextlib.suppress(ConfigError):
            return find_address(interface)
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return "127.0.0.1"


def _can_reach(at: str) -> bool:
    host, _, port = at.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), TRY_S):
        return True
    return False
