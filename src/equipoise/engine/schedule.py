"""Which sequences run, in which rows of the cache, and what a step does for each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from equipoise.engine.attention import Chunk
from equipoise.engine.detokenizer import TextStream
from equipoise.engine.requests import FinishReason, Request


@dataclass(eq=False)
class Sequence:
    """A request while it is in an engine.

    Attributes:
        request: whose tokens are those of its prompt and those generated.
        stream: its text, where stop strings are looked for.
        num_cached: tokens, from the first on, whose keys and values are in its row.
        finish_reason: why it has ended.
    """

    request: Request
    stream: TextStream | None = None
    num_cached: int = 0
    finish_reason: FinishReason | None = None

    @property
    def num_pending(self) -> int:
        """Tokens that the model has not seen: one while it decodes."""
        return len(self.request.tokens) + len(self.request.generated) - self.num_cached

    def list_pending(self, num: int) -> list[int]:
        """The first of these tokens."""
        behind = max(0, self.num_cached - len(self.request.tokens))
        generated = self.request.generated[behind : behind + num]
        return [*self.request.tokens[self.num_cached :], *generated][:num]


@dataclass(frozen=True)
class Work:
    """What one step does, sequence by sequence, in the order of its tokens.

    Attributes:
        parts: sequences, and what of them.
        num_decoding: the first ones, in the first rows, a token each.
    """

    parts: tuple[tuple[Sequence, Chunk], ...]
    num_decoding: int

    @property
    def num_tokens(self) -> int:
        """Of the step, on this rank."""
        return sum(chunk.length for _, chunk in self.parts)


class Schedule:
    """First come, first served.

    A sequence is begun where the step's budget still has tokens for it, so that no more than one,
    the last, is ever part of the way through its prompt. Rows in use are the first ones, decoding
    sequences before the one that is not; `move` copies the first tokens of one to another.
    """

    def __init__(
        self, num_rows: int, prefill_chunk: int, move: Callable[[int, int, int], None]
    ) -> None:
        self._num_rows, self._prefill_chunk, self._move = num_rows, prefill_chunk, move
        self._queue: deque[Sequence] = deque()
        self._rows: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._rows) + len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._rows
        yield from self._queue

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self._queue.append(sequence)

    def plan(self) -> Work:
        """Give the next step its work; what is begun stays in its row, also if the step fails."""
        parts: list[tuple[Sequence, Chunk]] = []
        for row, sequence in enumerate(self._rows):
            if sequence.num_pending > 1:
                break
            parts.append((sequence, Chunk(row, sequence.num_cached, 1)))
        num_decoding, budget = len(parts), self._prefill_chunk
        while budget and (len(parts) < len(self._rows) or self._admit()):
            sequence = self._rows[len(parts)]
            length = min(sequence.num_pending, budget)
            parts.append((sequence, Chunk(len(parts), sequence.num_cached, length)))
            budget -= length
        return Work(tuple(parts), num_decoding)

    def advance(self, work: Work) -> None:
        """The step has been done: its tokens are cached, and sequences that ended leave."""
        for sequence, chunk in work.parts:
            sequence.num_cached += chunk.length
        for row in reversed(range(len(self._rows))):
            if self._rows[row].finish_reason is not None:
                self._free(row)

    def remove(self, request_ids: set[str] | None) -> list[Sequence]:
        """Take sequences out, running ones first; None takes all."""
        gone = [one for one in self if request_ids is None or one.request.id in request_ids]
        for row in reversed(range(len(self._rows))):
            if self._rows[row] in gone:
                self._free(row)
        self._queue = deque(one for one in self._queue if one not in gone)
        for sequence in gone:
            sequence.num_cached = 0
        return gone

    def _admit(self) -> bool:
        if not self._queue or len(self._rows) == self._num_rows:
            return False
        self._rows.append(self._queue.popleft())
        return True

    def _free(self, row: int) -> None:
        """Fill a row with the last decoding sequence, and that one's with the one behind it."""
        last = len(self._rows) - 1
        sources = (last - 1, last) if self._rows[last].num_pending > 1 else (last,)
        for source in sources:
            if row < source:
                self._rows[row] = self._rows[source]
                self._move(source, row, self._rows[row].num_cached)
                row = source
        self._rows.pop()
