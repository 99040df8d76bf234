"""Load over time, as files and tools have it: tokens per step, layer and expert."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equipoise.errors import TraceError
from equipoise.topology import IntArray

TRACE_VERSION = 1


@dataclass(frozen=True, eq=False)
class LoadTrace:
    """Tokens that each expert got in each step of a time.

    Attributes:
        counts: [N, L, E] int64; read-only. A step has tokens in every layer, or in none.
        is_sum: whether a step is not one of the model's but the sum of unknown ones.
        phases: what was served in each step, N words, or empty where that is not known.
    Raises: TraceError if the counts are not that, naming step, layer and expert.
    """

    counts: IntArray
    is_sum: bool = False
    phases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = check_counts(self.counts, "counts")
        if counts.ndim != 3:
            raise TraceError(f"counts must be [steps, layers, experts], got {list(counts.shape)}")
        if counts is self.counts:
            counts = counts.copy()
        counts.setflags(write=False)
        object.__setattr__(self, "counts", counts)
        if self.phases and len(self.phases) != self.num_steps:
            raise TraceError(f"phases has {len(self.phases)} entries for {self.num_steps} steps")
        _check_layers(counts)

    @property
    def num_steps(self) -> int:
        """N."""
        return int(self.counts.shape[0])

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.counts.shape[1])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.counts.shape[2])

    def total(self) -> IntArray:
        """[L, E] int64, tokens per expert over all steps."""
        return np.asarray(self.counts.sum(axis=0), dtype=np.int64)


def check_counts(given: object, field: str) -> IntArray:
    """Refuse what are no counts of tokens.

    Args:
        given: an array or nested lists, [L, E] or [N, L, E].
        field: what the message shall call it.
    Returns:
        int64, the same shape; the array itself where it is that already.
    Collective: none.
    Raises: TraceError naming the field, and the first entry that is wrong.
    """
    shapes = f"{field} must be [layers, experts] or [steps, layers, experts]"
    try:
        array = np.asarray(given)
    except (ValueError, TypeError, OverflowError) as error:
        raise TraceError(f"{shapes}, with rows of one length") from error
    if array.ndim not in (2, 3) or array.size == 0:
        raise TraceError(f"{shapes}, got {list(array.shape)}")
    if array.dtype.kind not in "iuf":
        raise TraceError(f"{field} must be whole numbers of tokens, got {array.dtype}")
    # Written so that NaN is caught too.
    right = (array >= 0) & (array < 2**62)
    if array.dtype.kind == "f":
        right &= array == np.floor(array)
    if not right.all():
        at = np.argwhere(~right)[0]
        names = ("step", "layer", "expert")[-array.ndim :]
        where = ", ".join(f"{name} {index}" for name, index in zip(names, at, strict=True))
        raise TraceError(
            f"{field}: {where} has {array[tuple(at)]}: it must be a whole number of tokens, "
            "0 or more"
        )
    if array.sum(dtype=np.float64) >= 2**62:
        raise TraceError(f"{field}: the sum of all tokens is beyond 64 bits")
    return array.astype(np.int64, copy=False)


def join_traces(traces: Sequence[LoadTrace], names: Sequence[str]) -> LoadTrace:
    """Play traces one after another.

    Args:
        traces: at least one, of the same layers and experts.
        names: what each is called; the phase of its steps where it names none.
    Returns:
        One trace; its steps are sums if any trace's are.
    Collective: none.
    Raises: TraceError if layers or experts differ, naming the trace.
    """
    first = traces[0]
    if len(traces) == 1:
        return first
    phases: list[str] = []
    for trace, name in zip(traces, names, strict=True):
        if trace.counts.shape[1:] != first.counts.shape[1:]:
            raise TraceError(
                f"{name}: {trace.num_layers} layers x {trace.num_experts} experts, but {names[0]} "
                f"has {first.num_layers} x {first.num_experts}; give traces of one model"
            )
        phases += trace.phases or [name] * trace.num_steps
    return LoadTrace(
        np.concatenate([trace.counts for trace in traces]),
        any(trace.is_sum for trace in traces),
        tuple(phases),
    )


def write_trace(trace: LoadTrace, path: Path) -> None:
    """Write a trace in our own format; the file is there whole or not at all.

    Args:
        trace: what to write.
        path: replaced if it exists; an npz file by whatever name.
    Collective: none; one rank writes.
    Raises: OSError if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("xb") as file:
            np.savez_compressed(
                file,
                format_version=np.int64(TRACE_VERSION),
                counts=trace.counts,
                is_sum=np.bool_(trace.is_sum),
                phases=np.array(trace.phases, dtype=np.str_),
            )
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _check_layers(counts: IntArray) -> None:
    """Every token passes every layer, so a layer without tokens is one that is missing."""
    served = counts.sum(axis=2) > 0
    silent = np.flatnonzero(~served.any(axis=0))
    if silent.size == counts.shape[1]:
        raise TraceError("counts: no tokens at all")
    leading = int(np.argmax(served.any(axis=0)))
    busy = served.any(axis=1, keepdims=True)
    if silent.size and silent.size == leading:
        raise TraceError(
            f"counts: layers 0 to {leading - 1} have no tokens: if they are dense, leave them out "
            f"with first layer {leading}"
        )
    missing = np.argwhere(busy & ~served)
    if missing.size:
        step, layer = missing[0]
        raise TraceError(
            f"counts: layer {layer} has no tokens in step {step}, where other layers do: every "
            "token passes every layer"
        )
