"""Bytes of files on their way to a device, read ahead by several threads, in the order asked for.

On a GPU each thread reads into page-locked memory, out of which the device copies by itself while
the thread reads on: neither the page cache nor the copy is waited for, and the host holds a few
chunks whatever the size of the weights.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import ModelError

NUM_THREADS = 8
CHUNK_BYTES = 8 << 20
AHEAD_BYTES = 512 << 20


@dataclass(frozen=True)
class Span:
    """Consecutive bytes of a file.

    Attributes:
        file: which.
        begin: first byte.
        num_bytes: how many.
    """

    file: Path
    begin: int
    num_bytes: int

    @property
    def end(self) -> int:
        """Behind the last byte."""
        return self.begin + self.num_bytes


def join_spans(spans: Iterable[Span], most_bytes: int) -> Generator[tuple[Span, list[Span]]]:
    """Join spans that follow each other in a file, so that they are read at once.

    Args:
        spans: in any order, which is kept.
        most_bytes: of several that are joined.
    Returns:
        One after the other, what is read and what it is joined of.
    Collective: none.
    """
    joined: list[Span] = []
    num_bytes = 0
    for span in spans:
        follows = joined and joined[-1].file == span.file and joined[-1].end == span.begin
        if joined and (not follows or num_bytes + span.num_bytes > most_bytes):
            yield Span(joined[0].file, joined[0].begin, num_bytes), joined
            joined, num_bytes = [], 0
        joined.append(span)
        num_bytes += span.num_bytes
    if joined:
        yield Span(joined[0].file, joined[0].begin, num_bytes), joined


@dataclass
class _Staging:
    """Page-locked memory and what still copies out of it. Owner: the thread that took it."""

    memory: Tensor | None = None
    stream: Any = None
    copied: Any = None


@dataclass(frozen=True)
class _Reading:
    """A span on its way: where to, what it is divided into, and its chunks."""

    target: Tensor
    sizes: list[int]
    chunks: list[Future[Any]]


class FileReader:
    """Reads whole spans, from any thread; files stay open until it is closed."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def fill(self, span: Span, into: Tensor) -> None:
        """Read a span.

        Args:
            span: what to read.
            into: [num_bytes] uint8 on the CPU.
        Collective: none.
        Raises: ModelError, naming the file, if it cannot be read or ends too early.
        """
        data: Any = into.numpy()
        target, done = memoryview(data), 0
        try:
            file = self._open(span.file)
            while done < span.num_bytes:
                count = os.preadv(file, [target[done : span.num_bytes]], span.begin + done)
                if count == 0:
                    raise ModelError(
                        f"{span.file}: is truncated: it ends at byte {span.begin + done} since its "
                        "header was read"
                    )
                done += count
        except OSError as error:
            raise ModelError(f"{span.file}: cannot be read: {error.strerror}") from error

    def close(self) -> None:
        """Close the files, when nothing is read; twice is fine. They open again when needed."""
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[path]


class ReadAhead:
    """Reads spans in order, ahead of whoever takes them.

    Args:
        device: where bytes go.
        num_threads: that read at once.
        chunk_bytes: most that a thread reads at once.
        ahead_bytes: most that is read or on its way and not yet taken, or one span.

    Spans that are joined share memory, an eighth of `ahead_bytes` at most.
    """

    def __init__(
        self,
        device: torch.device,
        num_threads: int = NUM_THREADS,
        chunk_bytes: int = CHUNK_BYTES,
        ahead_bytes: int = AHEAD_BYTES,
    ) -> None:
        self._device, self._chunk_bytes = device, chunk_bytes
        self._ahead_bytes, self._joined_bytes = ahead_bytes, ahead_bytes // 8
        self._files = FileReader()
        self._threads = ThreadPoolExecutor(num_threads, "equipoise-read")
        self._free: SimpleQueue[_Staging] = SimpleQueue()
        # Two for each thread: one is read into while the device copies out of the other.
        for _ in range(2 * num_threads if device.type == "cuda" else 0):
            self._free.put(_Staging())

    def read(self, spans: Iterable[Span]) -> Generator[Tensor]:
        """Read spans; those that follow each other in a file at once.

        Args:
            spans: what to read.
        Returns:
            One after the other, [num_bytes] uint8 on the device; on a GPU ready in the order of
            the stream that is current where they are taken.
        Collective: none.
        Raises: ModelError, naming the file, if one cannot be read or ends too early.
        """
        waiting: deque[_Reading] = deque()
        num_ahead = 0
        try:
            for span, parts in join_spans(spans, self._joined_bytes):
                while waiting and num_ahead + span.num_bytes > self._ahead_bytes:
                    yield from self._finish(waiting[0])
                    num_ahead -= waiting.popleft().target.numel()
                waiting.append(self._start(span, parts))
                num_ahead += span.num_bytes
            while waiting:
                yield from self._finish(waiting[0])
                waiting.popleft()
        finally:
            self._give_up(waiting)

    def close(self) -> None:
        """End the threads and close the files; nothing may be taken any more."""
        self._threads.shutdown()
        self._files.close()

    def _start(self, span: Span, parts: list[Span]) -> _Reading:
        # Other threads write to it, which an inference tensor would not allow.
        with torch.inference_mode(False):
            target = torch.empty(span.num_bytes, dtype=torch.uint8, device=self._device)
        ready = None
        if self._device.type == "cuda":
            # The memory may be in use still by what was launched before it was given back.
            ready = torch.cuda.current_stream(self._device).record_event()
        chunks = []
        for begin in range(0, span.num_bytes, self._chunk_bytes):
            part = target[begin : begin + self._chunk_bytes]
            chunk = Span(span.file, span.begin + begin, part.numel())
            chunks.append(self._threads.submit(self._read_chunk, chunk, part, ready))
        return _Reading(target, [part.num_bytes for part in parts], chunks)

    def _read_chunk(self, chunk: Span, target: Tensor, ready: Any) -> Any:
        if ready is None:
            self._files.fill(chunk, target)
            return None
        staging = self._free.get()
        try:
            if staging.memory is None:
                # Locking pages takes a while: others read meanwhile.
                staging.memory = torch.empty(self._chunk_bytes, dtype=torch.uint8, pin_memory=True)
                staging.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            if staging.copied is not None:
                staging.copied.synchronize()
            filled = staging.memory[: chunk.num_bytes]
            self._files.fill(chunk, filled)
            with torch.cuda.stream(staging.stream):
                staging.stream.wait_event(ready)
                target.copy_(filled, non_blocking=True)
                staging.copied = staging.stream.record_event()
            return staging.copied
        finally:
            self._free.put(staging)

    def _finish(self, reading: _Reading) -> Iterable[Tensor]:
        for chunk in reading.chunks:
            copied = chunk.result()
            if copied is not None:
                torch.cuda.current_stream(self._device).wait_event(copied)
        return torch.split(reading.target, reading.sizes)

    def _give_up(self, waiting: Iterable[_Reading]) -> None:
        """Wait for what is on its way, so that nothing is written to memory that others get."""
        chunks = [chunk for reading in waiting for chunk in reading.chunks]
        for chunk in chunks:
            if not chunk.cancel():
                chunk.exception()
        if chunks and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
