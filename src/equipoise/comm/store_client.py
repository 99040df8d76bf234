"""Clients of a store, each for a thread of its own."""

from __future__ import annotations

import socket
import time
from datetime import timedelta

from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

_TRY_S = 1.0
"""How long one call for a store may take before it is looked whether anybody listens."""


def clone_store(store: Store) -> Store:
    """Another client of the same store, with the same prefix and timeout.

    Where nobody listens any more it says so soon: torch by itself would call again and again, for
    up to three times the store's timeout.

    Args:
        store: any; of a TCP store, one that a client is connected to or a server.
    Collective: none.
    Raises: RuntimeError if the store does not answer.
    """
    origin = store
    while isinstance(origin, PrefixStore):
        origin = origin.underlying_store
    if isinstance(origin, TCPStore):
        client = _call(origin)
        if store is origin:
            return client
    # Its process was there a moment ago.
    cloned: Store = store.clone()  # type: ignore[attr-defined]
    return cloned


def _call(origin: TCPStore) -> TCPStore:
    """A client of the same store, without a prefix."""
    timeout: timedelta = origin.timeout  # type: ignore[attr-defined]
    deadline = time.monotonic() + timeout.total_seconds()
    address = (origin.host, origin.port)
    while True:
        left = max(deadline - time.monotonic(), 0.001)
        try:
            socket.create_connection(address, left).close()
        except OSError as error:
            raise DistNetworkError(
                f"no store answers at {origin.host}:{origin.port}: {error}"
            ) from error
        try:
            # A process that is about to end may still take a call and answer nothing.
            client = TCPStore(*address, timeout=timedelta(seconds=min(left, _TRY_S)))
        except RuntimeError:
            if time.monotonic() >= deadline:
                raise
            continue
        client.set_timeout(timeout)
        return client
