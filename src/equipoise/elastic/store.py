"""The store that a controller keeps for its ranks."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]


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
