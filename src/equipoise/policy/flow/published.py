"""The published layout, compiled: what a plan is never below."""

from __future__ import annotations

import numpy as np

from equipoise.policy.flow.compiled import kernel
from equipoise.topology import FloatArray, IntArray


@kernel
def _sink(heap: IntArray, size: int, at: int, keys: FloatArray) -> None:
    """Restore the heap below a place: smallest key first, then smallest index."""
    item = heap[at]
    key = keys[item]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size:
            left, right = keys[heap[child]], keys[heap[child + 1]]
            if right < left or (right == left and heap[child + 1] < heap[child]):
                child += 1
        least = keys[heap[child]]
        if least > key or (least == key and heap[child] > item):
            break
        heap[at] = heap[child]
        at = child
    heap[at] = item


@kernel
def replicate(load: FloatArray, num_slots: int) -> IntArray:
    """Expert of each slot, [X, P]: first every expert, then whose replicas carry most.

    Args:
        load: [X, n] float64, whole tokens.
        num_slots: P, n or more.
    Collective: none.
    """
    num_rows, num_experts = load.shape
    experts = np.empty((num_rows, num_slots), dtype=np.int64)
    counts = np.empty(num_experts, dtype=np.int64)
    keys, heap = np.empty(num_experts), np.empty(num_experts, dtype=np.int64)
    for row in range(num_rows):
        for expert in range(num_experts):
            experts[row, expert] = heap[expert] = expert
            counts[expert] = 1
            keys[expert] = -load[row, expert]
        for at in range(num_experts // 2 - 1, -1, -1):
            _sink(heap, num_experts, at, keys)
        for slot in range(num_experts, num_slots):
            expert = heap[0]
            experts[row, slot] = expert
            counts[expert] += 1
            keys[expert] = -load[row, expert] / counts[expert]
            _sink(heap, num_experts, 0, keys)
    return experts


@kernel
def pack(weight: FloatArray, order: IntArray, num_packs: int) -> IntArray:
    """Pack items in the order given, each into the lightest pack that has room.

    Args:
        weight: [X, n] float64.
        order: [X, n] int64, items by falling weight, ties by index.
        num_packs: packs of n / num_packs items each.
    Returns:
        [X, n] int64, the items, pack by pack.
    Collective: none.
    """
    num_rows, num_items = weight.shape
    capacity = num_items // num_packs
    packed = np.empty((num_rows, num_items), dtype=np.int64)
    carried, heap = np.empty(num_packs), np.empty(num_packs, dtype=np.int64)
    filled = np.empty(num_packs, dtype=np.int64)
    for row in range(num_rows):
        for at in range(num_packs):
            carried[at], filled[at], heap[at] = 0.0, 0, at
        size = num_packs
        for item in order[row]:
            chosen = heap[0]
            packed[row, chosen * capacity + filled[chosen]] = item
            filled[chosen] += 1
            carried[chosen] += weight[row, item]
            if filled[chosen] == capacity:
                size -= 1
                heap[0] = heap[size]
            if size > 0:
                _sink(heap, size, 0, carried)
    return packed


def pack_heaviest_first(weight: FloatArray, num_packs: int) -> IntArray:
    """Pack items, heaviest first; packs of one item take them as they come.

    Args:
        weight: [X, n] float64.
        num_packs: packs of n / num_packs items each.
    Returns:
        [X, n] int64, the items, pack by pack.
    Collective: none.
    """
    if weight.shape[1] == num_packs:
        return np.tile(np.arange(num_packs), (weight.shape[0], 1))
    return pack(weight, np.argsort(-weight, axis=1, kind="stable"), num_packs)


def publish(load: FloatArray, num_slots: int, num_ranks: int) -> IntArray:
    """slot_to_expert [L, P] as `deepseek` plans it without groups, to the last slot.

    Args:
        load: [L, E] float64, whole tokens.
        num_slots: P.
        num_ranks: R.
    Collective: none.
    Source: DeepSeek-AI, "Expert Parallelism Load Balancer (EPLB)", 2025.
    """
    experts = replicate(load, num_slots)
    rows = np.arange(load.shape[0])[:, None]
    flat = (experts + rows * load.shape[1]).reshape(-1)
    counts = np.bincount(flat, minlength=load.size).reshape(load.shape)
    share = np.take_along_axis(load / counts, experts, axis=1)
    return np.take_along_axis(experts, pack_heaviest_first(share, num_ranks), axis=1)
