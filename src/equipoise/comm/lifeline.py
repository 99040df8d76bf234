"""Which peers of this host have died, as its kernel tells without anybody asking them."""

from __future__ import annotations

import hashlib
import os
import select
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from equipoise.comm.byte_views import view_bytes
from equipoise.comm.exchange import Exchange, deadline_in, explain
from equipoise.errors import TransferError

_TAG_LIFELINE = 9


class Lifeline:
    """Holds on to the processes of the peers on this host.

    A peer elsewhere, or in another PID namespace, is not seen to die; whoever waits for it has a
    deadline besides.

    Args:
        group: with a gloo backend; its ranks tell each other who they are.
        timeout_s: longest wait for a peer.
    Collective: every rank of the group.
    Raises: TransferError if a rank does not come in time.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float) -> None:
        host = hashlib.blake2b(_read_host(), digest_size=8).digest()
        word = int.from_bytes(host, "little", signed=True)
        mine = torch.tensor([word, os.getpid()], dtype=torch.int64)
        peers = [peer for peer in range(group.size()) if peer != group.rank()]
        heard = {peer: torch.zeros(2, dtype=torch.int64) for peer in peers}
        exchange = Exchange(group, _TAG_LIFELINE)
        for peer in peers:
            exchange.recv(view_bytes(heard[peer]), peer)
        for peer in peers:
            exchange.send(view_bytes(mine), peer)
        failures = exchange.wait(deadline_in(timeout_s))
        if failures:
            what, peer, cause = explain(failures, timeout_s)
            raise TransferError(
                f"rank {group.rank()}: no communicator: {what}", rank=group.rank(), peer=peer
            ) from cause
        self._poll = select.poll()
        self._peer_of: dict[int, int] = {}
        for peer, (theirs, pid) in heard.items():
            if int(theirs) == word and (held := _hold(int(pid))) is not None:
                self._peer_of[held] = peer
                self._poll.register(held, select.POLLIN)

    def find_dead(self) -> list[int]:
        """Ranks whose processes have ended. Collective: none; waits for nothing."""
        return sorted(self._peer_of[held] for held, _ in self._poll.poll(0))

    def close(self) -> None:
        """Let go of the processes; twice is fine. Collective: none."""
        for held in self._peer_of:
            os.close(held)
        self._peer_of = {}
        self._poll = select.poll()


def _read_host() -> bytes:
    """What tells this host, and this PID namespace on it, from others."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    return f"{socket.gethostname()}/{space}".encode()


def _hold(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        # Not to be seen from here, or a kernel that cannot.
        return None
