"""Many copies on one device, enqueued together."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from equipoise.comm.spans import Spans
from equipoise.topology import IntArray

if TYPE_CHECKING:
    from equipoise.comm.copy_kernel import KernelTable


class SpanCopies:
    """Copies of spans of memory to other spans, all of one device; made ready once, run once.

    On the CPU they are done when `run` returns. On a GPU `run` launches one kernel, or two where
    some bytes are not aligned to 16; nobody waits for it.

    Args:
        sources: where from.
        destinations: where to; as long, span by span; none overlaps another, or a source.
        device: of both.
        keep: what owns the memory; kept until this is forgotten.
        part: [n] int64, from 0, which part each span belongs to; None for a single one. Parts are
            run on their own.
    """

    def __init__(
        self,
        sources: Spans,
        destinations: Spans,
        device: torch.device,
        keep: object,
        part: IntArray | None = None,
    ) -> None:
        self._keep = keep
        self._copies: list[tuple[int, int, int]] = []
        self._table: KernelTable | None = None
        if not len(sources.address):
            self._edges = [0]
            return
        if part is None:
            part = np.zeros(len(sources.address), dtype=np.int64)
        # The longest first: whoever shares them out in turns gives everyone about as much.
        order = np.lexsort((-sources.num_bytes, part))
        self._edges = np.searchsorted(part[order], np.arange(part.max(initial=0) + 2)).tolist()
        sources, destinations = (
            Spans(spans.address[order], spans.num_bytes[order]) for spans in (sources, destinations)
        )
        if device.type == "cuda" and len(sources.address):
            # Not at the top: Triton takes seconds to import, and is not there without CUDA.
            from equipoise.comm.copy_kernel import KernelTable

            self._table = KernelTable(sources, destinations, device, self._edges)
            return
        columns = (destinations.address, sources.address, sources.num_bytes)
        self._copies = list(zip(*(column.tolist() for column in columns), strict=True))

    def run(self, part: int = 0, *, gently: float = 0.0) -> None:
        """Do the copies of a part, or enqueue them on the current stream; none behind the last.

        Args:
            part: which.
            gently: on a GPU, how many times as fast as a wire brings bytes, about, so that most of
                its memory's bandwidth is left to that; 0 for as fast as it can.
        Collective: none.
        """
        if self._table is not None:
            self._table.launch(part, gently=gently)
        elif part + 1 < len(self._edges):
            for copy in self._copies[self._edges[part] : self._edges[part + 1]]:
                ctypes.memmove(*copy)

    def bind(self, part: int = 0) -> Callable[[], None]:
        """The copies of a part, for a thread that has no time to spare.

        Returns:
            As `run`, but waits for nothing and keeps nothing: on a GPU, it is called on the stream
            that this was made on, or what was enqueued there before is over by then, and this
            outlives the copies.
        Collective: none.
        """
        return partial(self.run, part) if self._table is None else self._table.bind(part)

    def outlive_stream(self) -> None:
        """Let go of this only behind what the current stream was given. Collective: none."""
        if self._table is not None:
            self._table.outlive_stream()


def split_programs(most: int, num_spans: int, num_shares: int) -> tuple[int, int]:
    """How programs of a GPU share spans out: groups that take them in turns, each with lanes.

    Args:
        most: programs; at least 1.
        num_spans: at least 1.
        num_shares: of all spans together, in what a program should get of one at least.
    Returns:
        How many groups, and lanes of each that copy a span side by side; no more than `most`.
    Collective: none.
    """
    wanted = max(1, num_shares // num_spans)
    num_groups = min(num_spans, max(1, most // wanted))
    return num_groups, max(1, most // num_groups)


def shift(spans: Spans, start: int) -> Spans:
    """One behind the other from an address on: where a packed copy of them is.

    Args:
        spans: of which only the bytes count.
        start: address.
    """
    ends = np.cumsum(spans.num_bytes)
    return Spans(start + ends - spans.num_bytes, spans.num_bytes)


def warm_up(device: torch.device | None) -> None:
    """Have the kernels compiled for a GPU now, rather than beside its first forward pass.

    Collective: none.
    """
    memory = torch.zeros(128, dtype=torch.uint8, device=device)
    start = memory.data_ptr()
    sources = Spans.of([(start, 32), (start + 35, 3)])
    destinations = Spans.of([(start + 64, 32), (start + 99, 3)])
    SpanCopies(sources, destinations, memory.device, memory).run()
