"""From whom each expert is fetched: senders spread within a layer and over layers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.placement import Placement
from equipoise.topology import IntArray

MAX_ROUNDS = 24


class Holders(NamedTuple):
    """Ranks that hold each expert, one entry per (layer, expert, rank), sorted so.

    Attributes:
        key: [H] int64, (layer * E + expert) * R + rank; ascending.
        rank: [H] int64.
        slot: [H] int64, lowest global slot of the rank that holds the expert.
        edges: [L * E + 1] int64, where those of each (layer, expert) begin.
    """

    key: IntArray
    rank: IntArray
    slot: IntArray
    edges: IntArray


def find_holders(placement: Placement) -> Holders:
    """List who holds what. Collective: none."""
    layer, slot = np.nonzero(placement.slot_to_expert >= 0)
    ranks = placement.topology.num_ranks
    pair = layer * placement.num_experts + placement.slot_to_expert[layer, slot]
    key, at = np.unique(pair * ranks + placement.topology.rank_of_slot(slot), return_index=True)
    pair, rank = np.divmod(key, ranks)
    counts = np.bincount(pair, minlength=placement.num_layers * placement.num_experts)
    return Holders(key, rank, slot[at], np.concatenate(([0], np.cumsum(counts))))


def spread_sources(
    holder_rank: IntArray, first: IntArray, end: IntArray, layer: IntArray, num_ranks: int
) -> IntArray:
    """Choose a holder for each receive so that senders share the work.

    Starts from turns within each group of receives that have the same choice, then shifts
    receives, many at a time, from ranks that send more in a layer to ones that send less; where
    the layer does not care, from ranks that send more over all layers.

    Args:
        holder_rank: [H] int64, rank of each holder.
        first: [M] int64, first holder that a receive may choose.
        end: [M] int64, one past its last; above `first`.
        layer: [M] int64; ascending.
        num_ranks: R.
    Returns:
        [M] int64, index of the chosen holder; first <= it < end.
    Collective: none; the same on every rank for the same input.
    """
    count = end - first
    chosen = first.copy()
    free = np.flatnonzero(count > 1)
    if not free.size:
        return chosen
    chosen[free] += (_ordinal(first[free]) + first[free]) % count[free]
    num_layers = int(layer[-1]) + 1
    column = np.arange(count.max())
    index = np.minimum(first[free, None] + column, end[free, None] - 1)
    candidates = holder_rank[index]
    at = layer[free]
    pinned = np.flatnonzero(count == 1)
    base = np.bincount(
        layer[pinned] * num_ranks + holder_rank[chosen[pinned]], minlength=num_layers * num_ranks
    )
    pick = chosen[free] - first[free]
    rows = np.arange(free.size)
    for _ in range(MAX_ROUNDS):
        source = candidates[rows, pick]
        sends = base + np.bincount(at * num_ranks + source, minlength=num_layers * num_ranks)
        shifted, to = _shift(sends.reshape(num_layers, num_ranks), at, source, candidates)
        if not shifted.size:
            break
        pick[shifted] = to
    chosen[free] = first[free] + pick
    return chosen


def _shift(
    sends: IntArray, layer: IntArray, source: IntArray, candidates: IntArray
) -> tuple[IntArray, IntArray]:
    """Receives that shall change their source, and the candidate column that they change to.

    A rank gives and takes at most one receive of a layer, and for the sake of the totals never
    crosses their mean, so that simultaneous changes cannot overshoot.
    """
    num_ranks = sends.shape[1]
    total = sends.sum(axis=0)
    score = sends * (int(total.max()) + 1) + total
    column = score[layer[:, None], candidates].argmin(axis=1)
    target = candidates[np.arange(len(column)), column]
    gap = sends[layer, source] - sends[layer, target]
    mean = int(total.sum()) // num_ranks
    within = gap >= 2
    across = (gap == 1) & (total[source] > mean) & (total[target] < mean)
    rows = np.flatnonzero(within | across)
    rows = rows[_find_first(layer[rows] * num_ranks + source[rows], sends.size)]
    rows = rows[_find_first(layer[rows] * num_ranks + target[rows], sends.size)]
    tied = rows[across[rows]]
    tied = tied[_ordinal(source[tied]) < total[source[tied]] - mean]
    tied = tied[_ordinal(target[tied]) < mean - total[target[tied]]]
    rows = np.concatenate([rows[within[rows]], tied])
    return rows, column[rows]


def _find_first(group: IntArray, num_groups: int) -> IntArray:
    """The first entry of each group that has any, ascending; group: [M] int64, from 0."""
    entry = np.arange(len(group))
    first = np.full(num_groups, len(group))
    np.minimum.at(first, group, entry)
    return np.flatnonzero(first[group] == entry)


def _ordinal(group: IntArray) -> IntArray:
    """[M] int64, how many earlier entries are of the same group."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    begins = np.ones(len(order), dtype=np.bool_)
    begins[1:] = ordered[1:] != ordered[:-1]
    ordinal = np.empty_like(order)
    ordinal[order] = np.arange(len(order)) - np.flatnonzero(begins)[np.cumsum(begins) - 1]
    return ordinal
