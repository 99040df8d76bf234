"""Steps out of the records that SGLang's recorder makes of each forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from equipoise.errors import TraceError
from equipoise.topology import IntArray

AXES = {"topk_ids_of_layer": 3, "global_physical_count": 2}


def count_records(
    records: Sequence[Any], slot_to_expert: Any | None, num_experts: int | None
) -> IntArray:
    """Count the tokens of each expert in each forward pass.

    Args:
        records: objects with `forward_pass_id` and either `topk_ids_of_layer` [L, T, K], -1
            padded, or `global_physical_count` [L, P]. Those of one pass are added up.
        slot_to_expert: [L, P], the expert of each slot that the records name; None where they
            name experts.
        num_experts: E; None for the highest that occurs, and those before it.
    Returns:
        [N, L, E] int64, in the order of the passes.
    Collective: none.
    Raises: TraceError, naming record and field.
    """
    table = None if slot_to_expert is None else _check_table(slot_to_expert)
    passes: dict[int, IntArray] = {}
    for at, record in enumerate(records):
        if not isinstance(record, dict):
            raise TraceError(f"records: record {at} is no object")
        number = int(record.get("forward_pass_id", at))
        counts = _count(record, at, table)
        before = passes.get(number)
        if before is not None and len(before) != len(counts):
            raise TraceError(f"records: record {at} has {len(counts)} layers, not {len(before)}")
        passes[number] = counts if before is None else _add(before, counts)
    busy = [one for one in passes.values() if one.any()]
    if not busy:
        raise TraceError("records: no tokens at all")
    highest = max(int(np.flatnonzero(one.any(axis=0))[-1]) for one in busy)
    most = highest + 1 if num_experts is None else num_experts
    if highest >= most:
        raise TraceError(f"records: expert {highest} occurs: experts are 0 to {most - 1}")
    ordered = [passes[number] for number in sorted(passes)]
    if len({len(one) for one in ordered}) != 1:
        raise TraceError("records: forward passes differ in layers")
    return np.stack([_widen(one, most)[:, :most] for one in ordered])


def _count(record: dict[Any, Any], at: int, table: IntArray | None) -> IntArray:
    """[L, E] of one record, E as wide as needed."""
    field = next((name for name in AXES if name in record), None)
    if field is None:
        raise TraceError(f"records: record {at} has neither {' nor '.join(AXES)}")
    given = np.asarray(record[field])
    where = f"records: {field} of record {at}"
    if given.ndim != AXES[field] or given.size == 0 or given.dtype.kind not in "iu":
        raise TraceError(f"{where} must have {AXES[field]} axes of whole numbers")
    values = given.astype(np.int64)
    num_layers = len(values)
    if table is not None and len(table) != num_layers:
        raise TraceError(f"{where} has {num_layers} layers, the map of slots {len(table)}")
    layer, entry = np.divmod(np.arange(values.size), values[0].size)
    if values.ndim == 3:
        ids, tokens = values.reshape(-1), np.ones(values.size, dtype=np.int64)
        if ids.min() < -1:
            raise TraceError(f"{where} has {ids.min()}: experts are 0 or more, and -1 is none")
        layer, ids, tokens = layer[ids >= 0], ids[ids >= 0], tokens[ids >= 0]
    else:
        ids, tokens = entry, values.reshape(-1)
        if tokens.min() < 0:
            raise TraceError(f"{where} has {tokens.min()}: it must be 0 or more")
    if table is not None:
        if ids.size and ids.max() >= table.shape[1]:
            raise TraceError(
                f"{where} has {ids.max()}: slots are 0 to {table.shape[1] - 1} by "
                "last_physical_to_logical_map"
            )
        ids = table[layer, ids]
    width = int(ids.max(initial=0)) + 1
    counts = np.zeros((num_layers, width), dtype=np.int64)
    np.add.at(counts, (layer, ids), tokens)
    return counts


def _check_table(given: Any) -> IntArray:
    table = np.asarray(given)
    if table.ndim != 2 or table.dtype.kind not in "iu" or table.size == 0 or table.min() < 0:
        raise TraceError("last_physical_to_logical_map must be [layers, slots] experts, 0 or more")
    return table.astype(np.int64)


def _add(one: IntArray, other: IntArray) -> IntArray:
    width = max(one.shape[1], other.shape[1])
    return _widen(one, width) + _widen(other, width)


def _widen(counts: IntArray, width: int) -> IntArray:
    return np.pad(counts, ((0, 0), (0, max(0, width - counts.shape[1]))))
