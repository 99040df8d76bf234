"""The store that a controller keeps for its ranks.

It ends with its controller. A generation that serves needs it for balancing alone, as its groups
are connected; a controller that takes over has one of its own, and generations from then on are
made through that.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from equipoise.errors import MembershipError


def open_store(interface: str, timeout_s: float) -> TCPStore:
    """A store that listens on one interface, at a free port.

    Args:
        interface: address of it; torch by itself would listen on all of them.
        timeout_s: longest wait of a client of this process.
    Returns:
        its master; ranks connect to its `port`.
    Collective: none.
    Raises: OSError if the interface cannot be listened on.
    """
    listening = socket.create_server((interface, 0))
    port = listening.getsockname()[1]
    # The store takes the file descriptor over.
    return TCPStore(
        interface,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listening.detach(),
    )


def connect_store(address: Sequence[object], timeout_s: float) -> TCPStore:
    """A rank's client of a controller's store.

    Args:
        address: host and port.
        timeout_s: longest wait of the client.
    Collective: none.
    Raises: MembershipError if nobody answers there.
    """
    host, port = address
    timeout = timedelta(seconds=timeout_s)
    try:
        return TCPStore(str(host), int(str(port)), is_master=False, timeout=timeout)
    except RuntimeError as error:
        raise MembershipError(f"no store answers at {host}:{port}: {error}") from error
