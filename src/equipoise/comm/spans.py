"""Runs of bytes in memory, as arrays: what a READ, and a copy on a GPU, is made of."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from equipoise.topology import IntArray


# Not frozen: that takes three times as long to make, and there are thousands.
@dataclass(eq=False)
class Spans:
    """Spans of memory that follow each other on the wire.

    Attributes:
        address: [n] int64, where each begins.
        num_bytes: [n] int64, how long each is; more than 0.
    """

    address: IntArray
    num_bytes: IntArray

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> Spans:
        """From (address, bytes); those of no bytes are left out."""
        kept = [pair for pair in pairs if pair[1]]
        address, num_bytes = zip(*kept, strict=True) if kept else ((), ())
        return cls(np.array(address, dtype=np.int64), np.array(num_bytes, dtype=np.int64))

    @classmethod
    def of_one(cls, address: int, num_bytes: int) -> Spans:
        """A single one; none if it has no bytes."""
        return cls(np.array([address]), np.array([num_bytes])) if num_bytes else NO_SPANS

    @classmethod
    def join(cls, parts: Sequence[Spans]) -> Spans:
        """One behind the other."""
        if not parts:
            return cls.of(())
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.address for part in parts]),
            np.concatenate([part.num_bytes for part in parts]),
        )

    @property
    def total_bytes(self) -> int:
        """Of all of them."""
        return int(self.num_bytes.sum())

    def cut(self, first: int, last: int) -> Spans:
        """Those from number `first` to before number `last`."""
        return Spans(self.address[first:last], self.num_bytes[first:last])

    def between(self, start: int, stop: int) -> Spans:
        """Bytes start..stop of what they hold together."""
        ends = np.cumsum(self.num_bytes)
        if start == 0 and len(ends) and stop == ends[-1]:
            return self
        inside = ends[(ends > start) & (ends < stop)]
        return self._cut(np.array([start, *inside, stop], dtype=np.int64), ends)

    def _cut(self, edges: IntArray, ends: IntArray) -> Spans:
        """From each edge to the next; no edge may be missing inside, none may be equal."""
        starts = edges[:-1]
        index = np.searchsorted(ends, starts, side="right")
        address = self.address[index] + starts - (ends[index] - self.num_bytes[index])
        return Spans(address, np.diff(edges))


NO_SPANS = Spans.of(())


def align(first: Spans, second: Spans) -> tuple[Spans, Spans]:
    """Cut two lists of the same total bytes so that span k of one is as long as k of the other."""
    if np.array_equal(first.num_bytes, second.num_bytes):
        return first, second
    ends = np.cumsum(first.num_bytes), np.cumsum(second.num_bytes)
    if len(first.num_bytes) == 1 < len(second.num_bytes):
        return Spans(first.address + ends[1] - second.num_bytes, second.num_bytes), second
    edges = np.union1d(np.union1d(*ends), np.zeros(1, dtype=np.int64))
    return first._cut(edges, ends[0]), second._cut(edges, ends[1])


def span_of(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of a contiguous tensor."""
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


class Regions:
    """Registered memory, to look addresses up in.

    Args:
        spans: regions that do not overlap.
    """

    def __init__(self, spans: Spans) -> None:
        order = np.argsort(spans.address)
        self._starts: list[int] = spans.address[order].tolist()
        self._ends: list[int] = (spans.address + spans.num_bytes)[order].tolist()

    def contain(self, address: int, num_bytes: int) -> bool:
        """Whether one region has all of these bytes."""
        index = bisect.bisect_right(self._starts, address) - 1
        return index >= 0 and address + num_bytes <= self._ends[index]
