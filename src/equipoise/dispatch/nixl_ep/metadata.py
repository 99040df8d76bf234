"""Metadata of buffers through a generation's store, with deadlines that hold."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from equipoise.errors import MembershipError


class GenerationMetadata:
    """What a NIXL-EP buffer takes for its TCPStore while it connects ranks.

    NIXL-EP goes on, once it has its peers' metadata, with an exchange that has no deadline. So
    it gets them only when all who connect have them: then nobody is left to wait for but a rank
    that dies in the middle.

    Args:
        store: the generation's.
        prefix: of this round of connecting; the same on all ranks, used once.
        own: this rank's index in the buffer.
        timeout: longest wait for the others.
    """

    def __init__(self, store: Store, prefix: str, own: int, timeout: timedelta) -> None:
        self._store = store
        self._prefix = prefix
        self._own = own
        self._deadline = time.monotonic() + timeout.total_seconds()
        self._seconds = timeout.total_seconds()

    def set(self, key: str, value: bytes) -> None:
        """Publish this rank's."""
        self._store.set(f"{self._prefix}/{key}", value)  # type: ignore[arg-type] # bytes will do

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:  # noqa: ARG002 - 300 s
        """Until all are there, by this round's deadline.

        Raises: MembershipError that names the indices that did not come.
        """
        self._await([f"{self._prefix}/{key}" for key in keys], "its metadata")

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Get all, and wait until those whose they are have theirs.

        Raises: MembershipError as `wait`.
        """
        found = [bytes(self._store.get(f"{self._prefix}/{key}")) for key in keys]
        peers = [key.rsplit("/", 1)[-1] for key in keys]
        for peer in peers:
            self._store.set(f"{self._prefix}/read/{self._own}/{peer}", "yes")
        self._await(
            [f"{self._prefix}/read/{peer}/{self._own}" for peer in peers], "that it has ours"
        )
        return found

    def delete_key(self, key: str) -> bool:  # noqa: ARG002 - keys go with their generation
        """Nothing: a later reader must find it."""
        return True

    def _await(self, keys: list[str], what: str) -> None:
        left = timedelta(seconds=max(self._deadline - time.monotonic(), 0.001))
        try:
            self._store.wait(keys, left)
        except RuntimeError as error:
            missing = [key for key in keys if not self._store.check([key])] or keys[-1:]
            raise MembershipError(
                f"index {self._own} of the NIXL-EP buffer waited {self._seconds:.1f} s for a peer "
                f"to say {what}: {', '.join(missing)} did not come"
            ) from error
