"""Lists what chunks exchange, and makes ready what fills their slots: ahead, and in small steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from equipoise.comm.base import ExpertMoves
from equipoise.comm.span_copies import SpanCopies
from equipoise.transfer.mover import ChunkMover
from equipoise.transfer.staging import ChunkShare

# Of one thread, which does a step beside each READ; another can take its time.
_MOST_ALONE, _MOST_AT_ONCE = 4, 8


class ChunkList:
    """What the wire, and what fills slots, need of each chunk; in order.

    Several chunks take little longer than one, so they are done together; but no longer than a READ
    goes beside it, so in three steps: find, list, make ready. The wire waits for the first chunk,
    which is therefore alone; then each time there are twice as many. One thread's, without a lock.

    Args:
        mover: of the plan.
        cut: this rank's share of a chunk, by number.
        buffers: [bytes] uint8 each, in which chunks are staged by turns.
        num_chunks: how many there are.
    """

    def __init__(
        self,
        mover: ChunkMover,
        cut: Callable[[int], ChunkShare],
        buffers: Sequence[Tensor],
        num_chunks: int,
    ) -> None:
        self._mover = mover
        self._cut = cut
        self._buffers = buffers
        self._num_chunks = num_chunks
        self._most = _MOST_ALONE if len(buffers) == 1 else _MOST_AT_ONCE
        self._batch = range(min(1, num_chunks))
        self._found: list[ExpertMoves] = []
        self._moves: dict[int, ExpertMoves] = {}
        self._copies: dict[int, tuple[SpanCopies, int]] = {}
        self._steps_done = 0

    def take_moves(self, number: int) -> ExpertMoves:
        """What a chunk exchanges, listed by the communicator; once. Collective: none."""
        while number not in self._moves:
            self._step()
        return self._moves.pop(number)

    def take_copies(self, number: int) -> tuple[SpanCopies, int]:
        """What fills a chunk's slots, and which part of it does; once. Collective: none."""
        while number not in self._copies:
            self._step()
        return self._copies.pop(number)

    def look_ahead(self) -> None:
        """One step, unless enough is ready for now. Collective: none."""
        if self._batch and len(self._moves) < self._most:
            self._step()

    def _step(self) -> None:
        batch = self._batch
        match self._steps_done:
            case 0:
                find = self._mover.find_moves
                self._found = [find(self._cut(each), self._buffer(each)) for each in batch]
            case 1:
                self._mover.communicator.foresee(self._found)
                self._moves.update(zip(batch, self._found, strict=True))
            case _:
                shares, buffers = map(self._cut, batch), map(self._buffer, batch)
                copies = self._mover.prepare_many(list(shares), list(buffers))
                self._copies.update({each: (copies, part) for part, each in enumerate(batch)})
                first, num = batch.stop, min(2 * len(batch), self._most)
                self._batch = range(first, min(first + num, self._num_chunks))
        self._steps_done = (self._steps_done + 1) % 3

    def _buffer(self, number: int) -> Tensor:
        return self._buffers[number % len(self._buffers)]
