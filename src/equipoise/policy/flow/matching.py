"""Which new rank is which old one: the names of ranks that let most experts stay."""

from __future__ import annotations

import numpy as np

from equipoise.policy.flow.compiled import kernel
from equipoise.topology import FloatArray, IntArray

MOST_EXACT = 160
"""Ranks up to which names are assigned exactly; above, greedily, since exact is cubic."""


@kernel
def _assign(gain: FloatArray) -> IntArray:
    """Column of each row so that the gains sum to the most; [n, n] -> [n].

    Source: shortest augmenting paths with potentials; R. Jonker, A. Volgenant, "A shortest
    augmenting path algorithm for dense and sparse linear assignment problems", 1987.
    """
    size = gain.shape[0]
    row_price, column_price = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.zeros(size + 1, dtype=np.int64)  # 1-based; 0 is none
    came_from = np.zeros(size + 1, dtype=np.int64)
    for row in range(1, size + 1):
        row_of[0] = row
        column = 0
        slack = np.full(size + 1, np.inf)
        done = np.zeros(size + 1, dtype=np.bool_)
        while row_of[column] != 0:
            done[column] = True
            at, step, nearest = row_of[column], np.inf, 0
            for other in range(1, size + 1):
                if done[other]:
                    continue
                reduced = -gain[at - 1, other - 1] - row_price[at] - column_price[other]
                if reduced < slack[other]:
                    slack[other], came_from[other] = reduced, column
                if slack[other] < step:
                    step, nearest = slack[other], other
            for other in range(size + 1):
                if done[other]:
                    row_price[row_of[other]] += step
                    column_price[other] -= step
                else:
                    slack[other] -= step
            column = nearest
        while column != 0:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    result = np.empty(size, dtype=np.int64)
    for column in range(1, size + 1):
        result[row_of[column] - 1] = column - 1
    return result


@kernel
def _assign_greedily(gain: FloatArray) -> IntArray:
    size = gain.shape[0]
    result = np.full(size, -1, dtype=np.int64)
    taken = np.zeros(size, dtype=np.bool_)
    for level in range(int(gain.max()), -1, -1):
        for row in range(size):
            for column in range(size):
                if result[row] < 0 and not taken[column] and gain[row, column] >= level:
                    result[row] = column
                    taken[column] = True
    return result


@kernel
def _count_shared(old: IntArray, new: IntArray, num_experts: int) -> FloatArray:
    """[G, H] x [B, H] slots of groups -> [B, G] experts that both hold."""
    shared = np.zeros((new.shape[0], old.shape[0]))
    holds = np.zeros((num_experts, old.shape[0]), dtype=np.bool_)
    for group in range(old.shape[0]):
        for expert in old[group]:
            if expert >= 0:
                holds[expert, group] = True
    for group in range(new.shape[0]):
        for expert in new[group]:
            if expert >= 0:
                for other in range(old.shape[0]):
                    if holds[expert, other]:
                        shared[group, other] += 1.0
    return shared


@kernel
def rename_groups(
    standing: IntArray, table: IntArray, kinds: IntArray, num_experts: int, most_exact: int
) -> IntArray:
    """Reorder groups of slots, ranks or nodes, so that most experts are where they were.

    Args:
        standing: [L, G, H] int64, experts by group and slot, -1 for empty.
        table: [L, G, H] int64, a plan to be reordered.
        kinds: [G] int64 from 0 on; only groups of one kind may exchange their names.
        num_experts: E.
        most_exact: groups up to which the assignment is exact.
    Returns:
        [L, G] int64, the group of `table` that comes in each place.
    Collective: none.
    """
    num_layers, num_groups = table.shape[:2]
    order = np.empty((num_layers, num_groups), dtype=np.int64)
    for layer in range(num_layers):
        for kind in range(kinds.max() + 1):
            members = np.nonzero(kinds == kind)[0]
            shared = _count_shared(standing[layer][members], table[layer][members], num_experts)
            exact = members.size <= most_exact
            place = _assign(shared) if exact else _assign_greedily(shared)
            for i in range(members.size):
                order[layer, members[place[i]]] = members[i]
    return order


@kernel
def keep_slots(standing: IntArray, table: IntArray, slots_per_rank: int) -> None:
    """Within each rank, put experts that stay into the slots where they stand.

    Args:
        standing: [L, P] int64.
        table: [L, P] int64, changed in place.
        slots_per_rank: S.
    Collective: none.
    """
    planned = np.empty(slots_per_rank, dtype=np.int64)
    for layer in range(table.shape[0]):
        for start in range(0, table.shape[1], slots_per_rank):
            end = start + slots_per_rank
            planned[:] = table[layer, start:end]
            table[layer, start:end] = -1
            for slot in range(start, end):
                for i in range(slots_per_rank):
                    if planned[i] >= 0 and planned[i] == standing[layer, slot]:
                        table[layer, slot], planned[i] = planned[i], -1
                        break
            free = start
            for i in range(slots_per_rank):
                if planned[i] >= 0:
                    while table[layer, free] >= 0:
                        free += 1
                    table[layer, free] = planned[i]


@kernel
def drop_doubles(table: IntArray, slots_per_rank: int) -> None:
    """Empty the slots that hold what an earlier slot of their rank holds.

    Args:
        table: [L, P] int64, changed in place.
        slots_per_rank: S.
    Collective: none.
    """
    for layer in range(table.shape[0]):
        for slot in range(table.shape[1]):
            for other in range(slot - slot % slots_per_rank, slot):
                if table[layer, other] == table[layer, slot]:
                    table[layer, slot] = -1


def match_ranks(
    standing: IntArray,
    table: IntArray,
    num_experts: int,
    kinds: IntArray,
    num_nodes: int = 1,
    most_exact: int = MOST_EXACT,
) -> IntArray:
    """Name the ranks of a plan so that most experts stay, in the slots where they stand.

    Args:
        standing: [L, P] int64, slot_to_expert in force.
        table: [L, P] int64, slot_to_expert planned.
        num_experts: E.
        kinds: [R] int64 from 0 on; only ranks of one kind may exchange their names.
        num_nodes: N to exchange whole nodes first, which must be alike; 1 not to.
        most_exact: ranks up to which the assignment is exact.
    Returns:
        [L, P] int64, the plan renamed.
    Collective: none.
    """
    layers, num_slots = table.shape
    for num_groups, kind in ((num_nodes, np.zeros(num_nodes, dtype=np.int64)), (kinds.size, kinds)):
        if num_groups > 1:
            grouped = np.ascontiguousarray(table).reshape(layers, num_groups, -1)
            old = np.ascontiguousarray(standing).reshape(layers, num_groups, -1)
            order = rename_groups(old, grouped, kind, num_experts, most_exact)
            table = np.take_along_axis(grouped, order[:, :, None], axis=1).reshape(layers, -1)
    table = np.ascontiguousarray(table).copy()
    keep_slots(np.ascontiguousarray(standing), table, num_slots // kinds.size)
    return table
