"""Which slot of its rank an expert gets: the one that it has, wherever it stays."""

from __future__ import annotations

import numpy as np

from equipoise.placement import Placement
from equipoise.topology import IntArray


def keep_slots(standing: Placement, target: Placement) -> Placement:
    """Reorder each rank's slots so that what stays on a rank stays where it is.

    The same experts are on the same ranks, so balance is the same; what moves within a rank, and
    is staged and copied for nothing, moves no more.

    Args:
        standing: in force.
        target: of the same layers, experts and topology.
    Returns:
        `target`, its slots in another order within each rank.
    Collective: none; the same on every rank for the same input.
    """
    shape = (standing.num_layers, standing.topology.num_ranks, -1)
    old, new = (each.slot_to_expert.reshape(shape) for each in (standing, target))
    old_names, new_names = (_name_copies(table, standing.num_experts) for table in (old, new))
    stays = np.isin(old_names, new_names)
    comes = ~np.isin(new_names, old_names)
    table = old.copy()
    # As many leave a rank as come to it: in order, one takes the slot of the other.
    table[~stays] = new[comes]
    flat = table.reshape(standing.num_layers, -1)
    return Placement(flat, target.num_experts, target.topology)


def _name_copies(table: IntArray, num_experts: int) -> IntArray:
    """[L, R, S] int64, a number for each copy of an expert on a rank: the first, the second ..."""
    num_slots = table.shape[2]
    order = np.argsort(table, axis=2, kind="stable")
    ordered = np.take_along_axis(table, order, axis=2)
    place = np.broadcast_to(np.arange(num_slots), table.shape)
    is_first = np.ones(table.shape, dtype=bool)
    is_first[:, :, 1:] = ordered[:, :, 1:] != ordered[:, :, :-1]
    first = np.maximum.accumulate(np.where(is_first, place, 0), axis=2)
    copies = np.empty(table.shape, dtype=np.int64)
    np.put_along_axis(copies, order, place - first, axis=2)
    rank = np.arange(table.shape[0] * table.shape[1]).reshape(*table.shape[:2], 1)
    named: IntArray = ((rank * (num_experts + 1) + table + 1) * num_slots) + copies
    return named
