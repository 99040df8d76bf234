"""Chunks on their way through staging: one travels while the one before it is committed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from equipoise.comm.span_copies import SpanCopies
from equipoise.transfer.budget import settle
from equipoise.transfer.mover import ChunkMover
from equipoise.transfer.staging import ChunkShare


class Pipeline:
    """Starts chunks as early as there is a half for them, and brings them to slots in order.

    A chunk that travels writes to its half; slots of its layers are read by peers until every rank
    has received it, and filled after that. Chunks have no layer in common, so what fills slots
    of one never meets what reads slots of another.

    Args:
        mover: of the plan.
        shares: this rank's, of all chunks in order.
        halves: one or two buffers, each large enough for every chunk.
    """

    def __init__(
        self, mover: ChunkMover, shares: Sequence[ChunkShare], halves: Sequence[Tensor]
    ) -> None:
        self._mover = mover
        self._shares = shares
        self._halves = halves
        self._freed: list[torch.cuda.Event | None] = [None] * len(halves)
        self._num_started = 0
        self._problem: Exception | None = None
        self._copies: SpanCopies | None = None
        device = halves[0].device
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Have the wire know the halves."""
        with contextlib.ExitStack() as stack:
            for half in self._halves:
                stack.enter_context(self._mover.communicator.register(half))
            yield

    def find_half(self, number: int) -> Tensor:
        """Where a chunk is staged. Collective: none."""
        return self._halves[number % len(self._halves)]

    def receive(self, number: int) -> Exception | None:
        """Return when a chunk is staged here, and the next one travels if there is room for it.

        Args:
            number: the chunk's; each once, in order.
        Returns:
            What went wrong, if anything, with this chunk or the next.
        Collective: every rank of the group.
        """
        last = min(number + len(self._halves), len(self._shares))
        try:
            if self._problem is None:
                with self._beside():
                    while self._num_started < last:
                        self._start(self._num_started)
                        self._num_started += 1
                    self._mover.communicator.finish()
                    self._copies = self._mover.prepare(self._shares[number], self.find_half(number))
                    settle(self._device)
        except Exception as error:
            # Raised by the caller, once the others know.
            self._problem = error
        return self._problem

    def fill(self, number: int) -> None:
        """Fill slots from a chunk that is received, on the current stream.

        Collective: every rank, once the chunk is committed.
        """
        assert self._copies is not None, "what was not received is not committed"
        self._copies.run()
        if self._stream is not None:
            index = number % len(self._halves)
            self._freed[index] = torch.cuda.current_stream(self._device).record_event()

    def _start(self, number: int) -> None:
        event = self._freed[number % len(self._halves)]
        if event is not None:
            event.synchronize()
        self._mover.start(self._shares[number], self.find_half(number))

    def _beside(self) -> contextlib.AbstractContextManager[object]:
        """A stream of its own, so that staging does not wait for slots that are being filled."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
