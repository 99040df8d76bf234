"""The kernel that copies many spans of a GPU's memory in one launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from equipoise.comm.span_copies import split_programs
from equipoise.comm.spans import Spans

_ALIGNMENT = 16
_WORD_BYTES = 8
_BLOCK = 4096
# Wide programs take few multiprocessors: NCCL's kernels begin on none that a copy runs on, since
# they need more of its memory as shared than copies leave, and would wait for a copy to end.
_NUM_WARPS = 16
# Programs that share a span: enough to fill a GPU when a few experts move.
_NUM_LANES = 8
# At a time, where a wire reads and writes the same memory: copies that take all of its bandwidth
# slow the wire down by more than they gain. Each copies 28 to 40 GB/s.
_GENTLE_PROGRAMS = 16
# That each of them copies of a span, about: with fewer most of the time would go by between spans,
# with more whoever got the longest span would be waited for.
_BLOCKS_A_LANE = 8


@triton.jit(do_not_specialize=["num_spans", "first_span", "last_span"])
def _copy_words(table, num_spans, first_span, last_span, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    for span in range(first_span + tl.program_id(0), last_span, tl.num_programs(0)):
        source = tl.load(table + span).to(tl.pointer_type(tl.int64))
        destination = tl.load(table + num_spans + span).to(tl.pointer_type(tl.int64))
        # Sixteen bytes at a time, as the host has made sure of.
        source = tl.multiple_of(source, 16)
        destination = tl.multiple_of(destination, 16)
        num_words = tl.multiple_of(tl.load(table + 2 * num_spans + span), 2)
        first = tl.program_id(1).to(tl.int64) * BLOCK
        for start in range(first, num_words, tl.num_programs(1) * BLOCK):
            words = start + tl.arange(0, BLOCK)
            inside = words < num_words
            tl.store(destination + words, tl.load(source + words, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["num_spans", "first_span", "last_span"])
def _copy_bytes(table, num_spans, first_span, last_span, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    for span in range(first_span + tl.program_id(0), last_span, tl.num_programs(0)):
        source = tl.load(table + span).to(tl.pointer_type(tl.uint8))
        destination = tl.load(table + num_spans + span).to(tl.pointer_type(tl.uint8))
        num_bytes = tl.load(table + 2 * num_spans + span)
        first = tl.program_id(1).to(tl.int64) * BLOCK
        for start in range(first, num_bytes, tl.num_programs(1) * BLOCK):
            words = start + tl.arange(0, BLOCK)
            inside = words < num_bytes
            tl.store(destination + words, tl.load(source + words, mask=inside), mask=inside)


@cache
def _compile(kernel: Any, device: torch.device) -> Any:
    """For a GPU, once: a launch that looks for it takes several times as long."""
    with torch.cuda.device(device):
        # As aligned as every table is.
        like = torch.empty(2, dtype=torch.int64, device=device)
        return kernel.warmup(like, 1, 0, 1, BLOCK=_BLOCK, num_warps=_NUM_WARPS, grid=(1, 1, 1))


class KernelTable:
    """Copies as the kernels read them: addresses and lengths, on the device.

    Args:
        sources: where from.
        destinations: where to; span by span as long.
        device: of both.
        edges: where the spans of each part begin, and the last ends.
    """

    def __init__(
        self, sources: Spans, destinations: Spans, device: torch.device, edges: Sequence[int]
    ) -> None:
        aligned = (sources.address | destinations.address) % _ALIGNMENT == 0
        in_words = np.where(aligned, sources.num_bytes // _ALIGNMENT * _ALIGNMENT, 0)
        rest = sources.num_bytes - in_words
        words = (sources.address, destinations.address, in_words // _WORD_BYTES)
        ends = (sources.address + in_words, destinations.address + in_words, rest)
        tables, all_starts, all_sums = [], [], []
        for columns in (words, ends):
            kept = columns[2] > 0
            tables.append(np.stack([column[kept] for column in columns]))
            all_starts.append(np.concatenate(([0], np.cumsum(kept)))[list(edges)].tolist())
            all_sums.append(np.concatenate(([0], np.cumsum(columns[2])))[list(edges)].tolist())
        # Both aligned alike: for another alignment Triton would compile, beside a forward pass.
        wide = tables[0].size + tables[0].size % 2
        table = np.zeros(wide + tables[1].size, dtype=np.int64)
        table[: tables[0].size], table[wide:] = tables[0].ravel(), tables[1].ravel()
        self._table: Tensor = torch.from_numpy(table).pin_memory().to(device, non_blocking=True)
        parts = self._table[: tables[0].size], self._table[wide:]
        # Compiled kernels are found once: it takes long in a launch.
        self._launches = [
            (_compile(kernel, device), columns.data_ptr(), len(columns) // 3, starts, sums)
            for kernel, columns, starts, sums in zip(
                (_copy_words, _copy_bytes), parts, all_starts, all_sums, strict=True
            )
        ]
        # Whoever launches may do so on another stream, and sooner than this one has brought it.
        self._brought = torch.cuda.current_stream(device).record_event()

    def launch(self, part: int, *, gently: float) -> None:
        """Enqueue the copies of a part on the current stream; `gently` as for `SpanCopies.run`."""
        device = self._table.device
        stream = torch.cuda.current_stream(device)
        stream.wait_event(self._brought)
        # Another stream may have made it: it must outlive this one's use of it.
        self._table.record_stream(stream)
        # To enter a device costs as much as a launch.
        is_current = torch.cuda.current_device() == device.index
        with contextlib.nullcontext() if is_current else torch.cuda.device(device):
            for kernel, columns, num_spans, starts, sums in self._launches:
                if part + 1 < len(starts) and (count := starts[part + 1] - starts[part]):
                    grid = count, _NUM_LANES
                    if gently:
                        num_blocks = (sums[part + 1] - sums[part]) // _BLOCK
                        most = int(gently * _GENTLE_PROGRAMS)
                        grid = split_programs(most, count, num_blocks // _BLOCKS_A_LANE)
                    numbers = num_spans, starts[part], starts[part + 1]
                    kernel[(*grid, 1)](columns, *numbers, _BLOCK, stream=stream.cuda_stream)

    def bind(self, part: int) -> Callable[[], None]:
        """A part's launches with all that they need, for a thread that has no time to spare.

        Returns:
            Enqueues the copies on the current stream; as for `SpanCopies.bind`.
        """
        device, launches = self._table.device, []
        for kernel, columns, num_spans, starts, _ in self._launches:
            if part + 1 < len(starts) and (count := starts[part + 1] - starts[part]):
                numbers = num_spans, starts[part], starts[part + 1]
                enqueue = kernel[(count, _NUM_LANES, 1)]
                launches.append(partial(enqueue, columns, *numbers, _BLOCK))

        def launch() -> None:
            stream = torch.cuda.current_stream(device).cuda_stream
            is_current = torch.cuda.current_device() == device.index
            with contextlib.nullcontext() if is_current else torch.cuda.device(device):
                for enqueue in launches:
                    enqueue(stream=stream)

        return launch

    def outlive_stream(self) -> None:
        """Keep the table until the current stream, which is not its own, has used it."""
        self._table.record_stream(torch.cuda.current_stream(self._table.device))
