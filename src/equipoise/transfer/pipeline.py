"""Chunks on their way through staging: some travel while the one before them is committed."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from equipoise.comm.exchange import deadline_in
from equipoise.comm.span_copies import SpanCopies
from equipoise.errors import TransferError
from equipoise.transfer.chunk_list import ChunkList
from equipoise.transfer.mover import ChunkMover
from equipoise.transfer.staging import ChunkShare

_MOST_PACE = 4.0
_PACE_UNLESS_HELD = 1.5
# With two buffers the wire waits for what fills slots from one as soon as the other is full.
_PACE_OF_TWO = 4.0
# For the peers' word on the first chunk: nothing travels meanwhile that work could go beside.
_FIRST_WORD_S = 2e-3
# Between two looks at what has come, while a buffer is waited for.
_LOOK_S = 2e-4
# Between two looks at whether slots are filled.
_PAUSE_S = 2e-5


@dataclass
class _Chunk:
    """A chunk on its way; the transfer's thread has it until it is received, then the caller's.

    Attributes:
        number: from 0.
        share: this rank's.
        is_free: whether its buffer is.
        own: what stages this rank's own experts; None before it is made ready, and once it was run.
        copies: what fills its slots, as its part says.
        staged: recorded behind `own`; None on the CPU.
    """

    number: int
    share: ChunkShare
    is_free: bool = False
    own: SpanCopies | None = None
    copies: SpanCopies = field(init=False)
    part: int = 0
    staged: torch.cuda.Event | None = None


class Pipeline:
    """Stages chunk after chunk, as early as there is a buffer for them.

    With one buffer on the caller's thread, since nothing fills slots meanwhile; with more on one of
    its own.

    On a GPU, where the wire can hold what has come so far, a chunk is started before its buffer is
    free: all that precedes its bytes is done beside those of the chunk before it.

    Two threads then: the transfer's, which is given the first chunk once that was started, alone
    uses the communicator; the caller's asks for received chunks in order, agrees on them with the
    other ranks, and fills slots. What goes from one to the other goes through a queue, and back as
    a count under a lock. Chunks have no layer in common, so what fills slots of one never meets
    what reads slots of another; a buffer is used again when what fills slots from it is over, as
    its event says.

    Args:
        mover: of the plan.
        shares: this rank's, of all chunks in order.
        staging: [buffers, bytes] uint8, each large enough for every chunk; used in turns.
    """

    def __init__(self, mover: ChunkMover, shares: Sequence[ChunkShare], staging: Tensor) -> None:
        self._mover = mover
        self._shares = shares
        self._cut = cache(shares.__getitem__)
        self._staging = staging
        self._buffers = buffers = staging.unbind()
        self._device = staging.device
        wire = mover.communicator
        self._holds = wire.can_hold and self._device.type == "cuda"
        self._num_ahead = wire.num_ahead if self._holds else min(wire.num_ahead, len(buffers) - 1)
        self._received: queue.SimpleQueue[_Chunk | Exception] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._num_filled = 0
        self._is_stopped = False
        self._freed: list[torch.cuda.Event | None] = [None] * len(buffers)
        self._last: _Chunk | None = None
        # What fills slots from it, if there was time to make that ready.
        self._fill_last: Callable[[], None] | None = None
        self._list = ChunkList(mover, self._cut, buffers, len(shares))
        self._course: Iterator[_Chunk] = iter(())
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def open(self, patience_s: float) -> Iterator[None]:
        """Begin with the first chunk; run the transfer's thread, if any, while the context lasts.

        Args:
            patience_s: longest wait for it at the end, and for a chunk; its own waits are shorter.
        Raises: TransferError if it does not end.
        """
        self._patience_s = patience_s
        with self._mover.communicator.register(self._staging):
            self._start_first()
            try:
                yield
            finally:
                self._stop()

    def find_buffer(self, number: int) -> Tensor:
        """Where a chunk is staged. Collective: none."""
        return self._buffers[number % len(self._buffers)]

    def find_share(self, number: int) -> ChunkShare:
        """This rank's share of a chunk. Collective: none."""
        return self._cut(number)

    def receive(self) -> Exception | None:
        """Return when the next chunk is staged here.

        Returns:
            What went wrong, if anything, with this chunk or one behind it.
        Collective: every rank, in this thread or the transfer's.
        """
        received = self._take_next()
        if isinstance(received, Exception):
            return received
        self._last = received
        if received.staged is not None:
            torch.cuda.current_stream(self._device).wait_event(received.staged)
        return None

    def look_ahead(self) -> None:
        """Make the next chunk ready while ranks agree on this one; what goes wrong shows with it.

        Collective: none; between `receive` and `fill`.
        """
        # Where there is another thread, the communicator is its.
        if self._thread is not None or self._last is None or not self._received.empty():
            return
        try:
            self._mover.communicator.advance()
            self._fill_last = self._last.copies.bind(self._last.part)
        except Exception as error:
            self._received.put(error)

    def fill(self) -> None:
        """Fill slots from the chunk that was received last, on the current stream.

        Collective: none; every rank, once the chunk is committed.
        """
        assert self._last is not None, "what was not received is not committed"
        if self._fill_last is not None:
            self._fill_last()
            self._fill_last = None
        else:
            self._last.copies.run(self._last.part, gently=self._find_pace_of_last(self._last.share))
        with self._changed:
            if self._device.type == "cuda":
                stream = torch.cuda.current_stream(self._device)
                self._freed[self._num_filled % len(self._buffers)] = stream.record_event()
            self._num_filled += 1
            self._changed.notify_all()

    def _find_pace_of_last(self, share: ChunkShare) -> float:
        match len(self._shares) - self._num_filled:
            case 1:
                return 0.0
            case 2 if len(self._buffers) > 1:
                # What fills the last chunk's slots comes behind.
                return _MOST_PACE
            case _:
                return self._find_pace(share, share.num_bytes)

    def _take_next(self) -> _Chunk | Exception:
        if self._thread is None and self._received.empty():
            try:
                return next(self._course)
            except Exception as error:
                return error
        try:
            return self._received.get(timeout=self._patience_s)
        except queue.Empty:
            rank = self._mover.group.rank
            return TransferError(f"rank {rank}: the transfer's thread does not answer", rank=rank)

    def _start_first(self) -> None:
        """Start the first chunk from this thread: another takes its time to come to life."""
        try:
            first = self._start(0)
            if self._device.type == "cuda":
                self._mover.communicator.advance(_FIRST_WORD_S)
        except Exception as error:
            # Raised once the other ranks know.
            self._received.put(error)
            return
        self._course = self._go(first)
        self._mover.communicator.is_alone = len(self._buffers) == 1
        if len(self._buffers) > 1:
            self._thread = threading.Thread(
                target=self._run, name="equipoise-transfer", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        try:
            with self._own_stream():
                for chunk in self._course:
                    self._received.put(chunk)
        except BaseException as error:
            # Raised by the other thread, once the other ranks know.
            problem = error if isinstance(error, Exception) else RuntimeError(repr(error))
            self._received.put(problem)

    def _go(self, first: _Chunk) -> Iterator[_Chunk]:
        """Each chunk, once it was received."""
        started: deque[_Chunk] = deque()
        for number in range(len(self._shares)):
            # A chunk that is held waits for the one before it: that has the wire first.
            landing = number - 1 if self._holds else number
            if not self._await_buffer(landing):
                return
            self._mover.communicator.advance()
            started.append(self._start(number) if number else first)
            if len(started) > self._num_ahead > 0:
                yield self._finish(started.popleft())
            # Not before: another chunk may have come, and ranks wait for each other's.
            self._prepare_own(started[-1])
            if not self._num_ahead:
                yield self._finish(started.popleft())
        for left in started:
            yield self._finish(left)

    def _finish(self, chunk: _Chunk) -> _Chunk:
        """Make ready what fills its slots, once the next is on its way, and receive it."""
        chunk.copies, chunk.part = self._list.take_copies(chunk.number)
        self._list.look_ahead()
        # All ranks agree on it before any slot is filled, and so before what was sent changes.
        self._mover.communicator.finish(may_be_read=True)
        return chunk

    def _await_buffer(self, number: int) -> bool:
        """Whether there is a buffer for a chunk, rather than an end."""
        if number < 0:
            return True
        # Where nothing travels ahead, what is not committed yet may never be followed.
        needed = number + 1 - (len(self._buffers) if self._num_ahead else 1)
        while not self._await_filled(needed):
            # What peers say of a chunk that is held is heard before there is room for it.
            self._mover.communicator.advance()
        with self._changed:
            if self._is_stopped:
                return False
            event = self._freed[number % len(self._buffers)]
        if event is not None and not event.query():  # type: ignore[no-untyped-call]
            # A time in which nothing else can be done: what the next chunk's bytes need, is.
            self._mover.communicator.advance()
            self._await_copies(event)
        return True

    def _await_copies(self, event: torch.cuda.Event) -> None:
        """Wait for what fills slots from a buffer; to be woken takes longer than to ask."""
        deadline = deadline_in(self._patience_s)
        while not event.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > deadline:
                rank = self._mover.group.rank
                raise TransferError(
                    f"rank {rank}: slots are still being filled after {self._patience_s:.1f} s",
                    rank=rank,
                )
            # The caller's thread wants the interpreter, where this is another.
            time.sleep(_PAUSE_S if self._thread is not None else 0.0)

    def _await_filled(self, needed: int) -> bool:
        """Whether so many chunks are committed, or there is an end; False after a while."""
        look_s = _LOOK_S if self._holds else None
        with self._changed:
            return self._changed.wait_for(
                lambda: self._is_stopped or self._num_filled >= needed, look_s
            )

    def _is_free(self, number: int) -> bool:
        """Whether a chunk's buffer is free, now."""
        with self._changed:
            if self._num_filled < number + 1 - len(self._buffers):
                return False
            event = self._freed[number % len(self._buffers)]
        return event is None or bool(event.query())  # type: ignore[no-untyped-call]

    def _start(self, number: int) -> _Chunk:
        moves = self._list.take_moves(number)
        chunk = _Chunk(number, self._cut(number), is_free=not self._holds)
        may_land = partial(self._land, number, chunk) if self._holds else None
        self._mover.start(moves, may_land)
        return chunk

    def _prepare_own(self, chunk: _Chunk) -> None:
        mover = self._mover
        if chunk.share.remote_bytes < chunk.share.num_bytes:
            chunk.own = mover.prepare_own(chunk.share, self.find_buffer(chunk.number))
            self._stage_own(chunk)
        # By now what the peers have to say may have come.
        mover.communicator.advance()

    def _land(self, number: int, chunk: _Chunk) -> bool:
        if not self._is_free(number):
            return False
        chunk.is_free = True
        self._stage_own(chunk)
        return True

    def _stage_own(self, chunk: _Chunk) -> None:
        """Once both are there: what stages this rank's own experts, and room for them.

        Behind the start, which waits for what stands on the stream.
        """
        own = chunk.own
        if own is None or not chunk.is_free:
            return
        chunk.own = None
        share = chunk.share
        own.run(gently=self._find_pace(share, share.num_bytes - share.remote_bytes))
        if self._device.type == "cuda":
            chunk.staged = torch.cuda.current_stream(self._device).record_event()

    def _find_pace(self, share: ChunkShare, num_bytes: int) -> float:
        """How fast to copy, in what a wire brings: as long as the chunk's own bytes travel.

        Where there is no other buffer, nothing travels beside what fills slots.
        """
        if len(self._buffers) == 1 or not num_bytes:
            return 0.0
        # A wire that cannot hold waits for the buffer before it begins.
        least = 1.0 if self._holds else _PACE_UNLESS_HELD
        if len(self._buffers) == 2:
            least = _PACE_OF_TWO
        return min(max(least, num_bytes / max(1, share.remote_bytes)), _MOST_PACE)

    def _stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        if self._num_filled < len(self._shares):
            self._mover.communicator.interrupt()
        self._mover.communicator.is_alone = False
        # It holds this, and with it the staging, until somebody collects garbage.
        self._course = iter(())
        if self._thread is not None:
            self._thread.join(self._patience_s)
            if self._thread.is_alive():
                rank = self._mover.group.rank
                raise TransferError(f"rank {rank}: the transfer's thread does not end", rank=rank)

    def _own_stream(self) -> contextlib.AbstractContextManager[object]:
        """So that staging does not wait for slots that are being filled."""
        if self._device.type != "cuda":
            return contextlib.nullcontext()
        torch.cuda.set_device(self._device)
        return torch.cuda.stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]
