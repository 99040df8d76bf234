"""Tokens go by the host while wires on the device are connected, or closed, beside them.

To connect a group over NCCL, and to close one, may wait for the device. Where that waits for a
peer's tokens, and the peer's device for this rank's, all would wait for good. So tokens of the
ranks that serve take a detour meanwhile: from one step on, and to another, which they settle in the
meeting before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.dispatch.base import TokenDispatcher
from equipoise.elastic.generation import NextGeneration
from equipoise.elastic.verdict import Word


class Detour:
    """What must end before this rank's tokens go straight again. Owner: the forward thread."""

    def __init__(self) -> None:
        self._changes: list[NextGeneration] = []

    @property
    def word(self) -> Word:
        """What to tell in the meeting before a step while no change is under way."""
        is_over = bool(self._changes) and all(one.is_over for one in self._changes)
        return Word.BACK if is_over else Word.OPEN

    def note(self, change: NextGeneration) -> None:
        """A change has switched, or was dropped; it may have had tokens take a detour."""
        if change.has_detour:
            self._changes.append(change)

    def end(self, dispatchers: Sequence[TokenDispatcher]) -> None:
        """All were heard to say BACK.

        Collective: every rank that serves, between the same two steps; waits for the device.
        Raises: TransferError if the device is not through with earlier work in time.
        """
        for dispatcher in dispatchers:
            dispatcher.detour(False)
        self._changes.clear()
