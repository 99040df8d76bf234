"""What a prefix of the search's log leaves, and who receives what for it."""

from __future__ import annotations

import numpy as np

from equipoise.policy.flow.bounds import Log
from equipoise.policy.flow.compiled import kernel
from equipoise.topology import IntArray


@kernel
def replay(table: IntArray, log: Log, layers: IntArray, steps: IntArray) -> None:
    """Make the first steps of a log.

    Args:
        table: [L, P] int64, where the log starts; the layers named are changed in place.
        log: of the search.
        layers: [X] int64.
        steps: [X] int64, steps to make in each of them, the start counting as none.
    Collective: none.
    """
    for i in range(layers.size):
        layer = layers[i]
        for step in range(1, steps[i] + 1):
            for change in range(log.slots.shape[2]):
                if log.slots[layer, step, change] >= 0:
                    table[layer, log.slots[layer, step, change]] = log.experts[layer, step, change]


@kernel
def receive_by_rank(
    standing: IntArray, table: IntArray, log: Log, num_ranks: int, num_experts: int
) -> IntArray:
    """Experts that each rank must receive, after every step of a log.

    Args:
        standing: [L, P] int64, what ranks hold.
        table: [L, P] int64, where the log starts.
        log: of the search.
        num_ranks: R.
        num_experts: E.
    Returns:
        [L, M, R] int64; 0 beyond a layer's last step.
    Collective: none.
    """
    num_layers, num_steps = log.peak.shape
    slots_per_rank = table.shape[1] // num_ranks
    received = np.zeros((num_layers, num_steps, num_ranks), dtype=np.int64)
    for layer in range(num_layers):
        row = table[layer].copy()
        held = np.zeros((num_experts + 1, num_ranks), dtype=np.bool_)
        held[num_experts] = True  # an empty slot costs nothing
        for slot in range(row.size):
            held[standing[layer, slot] % (num_experts + 1), slot // slots_per_rank] = True
        for slot in range(row.size):
            if not held[row[slot] % (num_experts + 1), slot // slots_per_rank]:
                received[layer, 0, slot // slots_per_rank] += 1
        for step in range(1, log.num_steps[layer]):
            received[layer, step] = received[layer, step - 1]
            for change in range(log.slots.shape[2]):
                slot = log.slots[layer, step, change]
                if slot >= 0:
                    rank = slot // slots_per_rank
                    if not held[row[slot] % (num_experts + 1), rank]:
                        received[layer, step, rank] -= 1
                    row[slot] = log.experts[layer, step, change]
                    if not held[row[slot] % (num_experts + 1), rank]:
                        received[layer, step, rank] += 1
    return received
