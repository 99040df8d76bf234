"""The staging of a rank's worker, kept from one rebalance to the next."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from equipoise.comm.base import EplbCommunicator


class StagingHalves:
    """Buffers that all rebalances of one worker stage experts in, known to its wires.

    Taken when they are first needed and again only where more is needed: to allocate device memory
    and to make it known to a wire may hold up the forward thread's launches. Owner: the worker
    thread.

    Args:
        communicators: of all models.
        device: of the weights.
    """

    def __init__(self, communicators: Sequence[EplbCommunicator], device: torch.device) -> None:
        self._communicators = tuple(communicators)
        self._device = device
        self._known = contextlib.ExitStack()
        self._held: list[Tensor] = []

    def take(self, num_bytes: int, count: int) -> list[Tensor]:
        """Buffers for a rebalance; nothing reads what the one before has staged.

        Args:
            num_bytes: of the largest chunk.
            count: how many at a time.
        Returns:
            `count` tensors [num_bytes or more] uint8.
        Collective: none.
        """
        if len(self._held) < count or any(half.numel() < num_bytes for half in self._held):
            self.release()
            for _ in range(count):
                half = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
                self._held.append(half)
                for communicator in self._communicators:
                    self._known.enter_context(communicator.register(half))
        return self._held[:count]

    def release(self) -> None:
        """Let go of them; twice is fine. Collective: none."""
        self._known.close()
        self._held = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
