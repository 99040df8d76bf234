"""From nothing: how many replicas each expert gets, and which rank holds them."""

from __future__ import annotations

import numpy as np

from equipoise.policy.flow.compiled import kernel
from equipoise.topology import FloatArray, IntArray


@kernel
def _comes_before(
    keys: FloatArray, counts: IntArray, first: int, second: int
) -> bool:  # larger key, then fewer replicas, then lower index
    if keys[first] != keys[second]:
        return bool(keys[first] > keys[second])
    if counts[first] != counts[second]:
        return bool(counts[first] < counts[second])
    return first < second


@kernel
def _sink_expert(heap: IntArray, size: int, at: int, keys: FloatArray, counts: IntArray) -> None:
    item = heap[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and _comes_before(keys, counts, heap[child + 1], heap[child]):
            child += 1
        if not _comes_before(keys, counts, heap[child], item):
            break
        heap[at] = heap[child]
        at = child
    heap[at] = item


@kernel
def _grant_most(
    load: FloatArray, counts: IntArray, num_slots: int, least: int, most: int, delta: float
) -> int:
    """Give nearly all slots at once; returns how many are left.

    An expert gets what a price per slot earns it, at a price that is bisected from above.
    """
    low, high = 0.0, load.sum()
    for _ in range(12):
        price = 0.5 * (low + high)
        if price <= 0.0:
            break
        given = 0
        for tokens in load:
            given += min(max(int(tokens / price - delta) + 1, least), most)
        if given > num_slots:
            low = price
        else:
            high = price
    high *= 1.0 + 1e-9  # so that rounding never gives a slot too many
    if high > 0.0:
        for expert in range(load.size):
            granted = int(load[expert] / high - delta) + 1
            counts[expert] = min(max(granted, least), most)
    left: int = num_slots - counts.sum()
    return left


@kernel
def count_replicas(
    load: FloatArray, num_slots: int, least: int, most: int, delta: float
) -> IntArray:
    """Share slots among experts by a divisor rule: the next goes where load / (c + delta) is most.

    With delta 0 the largest slot load is the least possible one; a larger delta favours experts
    that have replicas already less, which leaves more even slots.

    Args:
        load: [L, E] float64, tokens per expert.
        num_slots: P.
        least: replicas that every expert gets; least * E <= P.
        most: replicas that no expert exceeds; where P > most * E, slots stay empty.
        delta: 0 to 1.
    Returns:
        [L, E] int64 replica counts.
    Collective: none.
    """
    num_layers, num_experts = load.shape
    counts = np.full((num_layers, num_experts), least, dtype=np.int64)
    if least >= most:
        return counts
    keys = np.empty(num_experts, dtype=np.float64)
    heap = np.empty(num_experts, dtype=np.int64)
    for layer in range(num_layers):
        left = num_slots - least * num_experts
        if left > num_experts:
            left = _grant_most(load[layer], counts[layer], num_slots, least, most, delta)
        size = 0
        for expert in range(num_experts):
            keys[expert] = load[layer, expert] / (counts[layer, expert] + delta)
            if counts[layer, expert] < most:
                heap[size] = expert
                size += 1
        for at in range(size // 2 - 1, -1, -1):
            _sink_expert(heap, size, at, keys, counts[layer])
        for _ in range(left):
            if size == 0:
                break
            expert = heap[0]
            counts[layer, expert] += 1
            keys[expert] = load[layer, expert] / (counts[layer, expert] + delta)
            if counts[layer, expert] >= most:
                size -= 1
                heap[0] = heap[size]
            _sink_expert(heap, size, 0, keys, counts[layer])
    return counts


@kernel
def pack_slots(
    share: FloatArray, order: IntArray, counts: IntArray, slots_per_rank: int, slowness: FloatArray
) -> IntArray:
    """Put the largest slots first, each on the rank that is least busy and has room.

    Replicas of one expert come to different ranks; where too few ranks have room, the expert
    keeps fewer replicas and slots stay empty.

    Args:
        share: [L, E] float64, tokens of one replica.
        order: [L, E] int64, experts by falling share.
        counts: [L, E] int64, replicas wanted, 1 to R each, at most R * S together.
        slots_per_rank: S.
        slowness: [R] float64, mean rank speed over the rank's.
    Returns:
        slot_to_expert [L, R * S] int64, -1 where a slot is empty.
    Collective: none.
    """
    num_layers, num_experts = share.shape
    num_ranks = slowness.size
    table = np.full((num_layers, num_ranks * slots_per_rank), -1, dtype=np.int64)
    # A rank's key is its busy time in fixed point with its index in the low bits: the least key
    # is then found without branches, and ties go to the lowest index.
    bits = 1
    while 1 << bits < num_ranks:
        bits += 1
    full = np.int64(2**62)
    keys = np.empty(num_ranks, dtype=np.int64)
    used = np.empty(num_ranks, dtype=np.int64)
    taken = np.empty(num_ranks, dtype=np.int64)
    kept = np.empty(num_ranks, dtype=np.int64)
    for layer in range(num_layers):
        total = 0.0
        for expert in range(num_experts):
            total += share[layer, expert] * counts[layer, expert]
        scale = 2.0 ** (60 - bits) / (max(total, 1.0) * slowness.max())
        for rank in range(num_ranks):
            keys[rank] = rank
            used[rank] = 0
        for expert in order[layer]:
            num_taken = 0
            while num_taken < counts[layer, expert]:
                least = full
                for rank in range(num_ranks):
                    least = min(least, keys[rank])
                if least == full:
                    break
                rank = int(least & ((1 << bits) - 1))
                taken[num_taken], kept[num_taken] = rank, keys[rank]
                keys[rank] = full
                num_taken += 1
            tokens = share[layer, expert] * counts[layer, expert] / max(num_taken, 1) * scale
            for i in range(num_taken):
                rank = taken[i]
                table[layer, rank * slots_per_rank + used[rank]] = expert
                used[rank] += 1
                if used[rank] < slots_per_rank:
                    keys[rank] = kept[i] + (np.int64(tokens * slowness[rank]) << bits)
    return table


@kernel
def pack_apart(
    order: IntArray,
    counts: IntArray,
    slots_per_rank: int,
    num_ranks: int,
    node_of_rank: IntArray,
    spread: int,
) -> IntArray:
    """Put every expert on several nodes first, then its other replicas where there is room.

    Nodes with most room come first, so that room for distinct nodes never runs out; evening out
    the load is left to the search.

    Args:
        order: [L, E] int64, experts by falling share.
        counts: [L, E] int64, replicas wanted, `spread` or more each.
        slots_per_rank: S.
        num_ranks: R.
        node_of_rank: [R] int64.
        spread: nodes that every expert must be on.
    Returns:
        slot_to_expert [L, R * S] int64, -1 where a slot is empty.
    Collective: none.
    """
    num_layers = order.shape[0]
    num_nodes = node_of_rank[-1] + 1
    table = np.full((num_layers, num_ranks * slots_per_rank), -1, dtype=np.int64)
    for layer in range(num_layers):
        used = np.zeros(num_ranks, dtype=np.int64)
        room = np.full(num_nodes, num_ranks // num_nodes * slots_per_rank)
        for apart in (True, False):
            for expert in order[layer]:
                for _ in range(spread if apart else counts[layer, expert] - spread):
                    best = -1
                    for rank in range(num_ranks):
                        if used[rank] == slots_per_rank:
                            continue
                        first = rank - rank % (num_ranks // num_nodes) if apart else rank
                        last = first + (num_ranks // num_nodes if apart else 1)
                        row = table[layer, first * slots_per_rank : last * slots_per_rank]
                        if (row == expert).any():
                            continue
                        rooms = room[node_of_rank[rank]]
                        if (
                            best < 0
                            or rooms > room[node_of_rank[best]]
                            or (rooms == room[node_of_rank[best]] and used[rank] < used[best])
                        ):
                            best = rank
                    if best >= 0:
                        table[layer, best * slots_per_rank + used[best]] = expert
                        used[best] += 1
                        room[node_of_rank[best]] -= 1
    return table


@kernel
def weigh_busiest(load: FloatArray, table: IntArray, slowness: FloatArray) -> FloatArray:
    """Busy time of the busiest rank, [L] float64, replicas of an expert sharing its load equally.

    Args:
        load: [L, E] float64.
        table: [L, P] int64, every expert at least once, -1 for an empty slot.
        slowness: [R] float64.
    Collective: none.
    """
    num_layers, num_experts = load.shape
    slots_per_rank = table.shape[1] // slowness.size
    most = np.zeros(num_layers)
    counts = np.empty(num_experts)
    for layer in range(num_layers):
        counts[:] = 0.0
        for expert in table[layer]:
            if expert >= 0:
                counts[expert] += 1.0
        for rank in range(slowness.size):
            tokens = 0.0
            for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
                expert = table[layer, slot]
                if expert >= 0:
                    tokens += load[layer, expert] / counts[expert]
            most[layer] = max(most[layer], tokens * slowness[rank])
    return most


def sort_experts(share: FloatArray) -> IntArray:
    """Experts by falling share, ties by index.

    Args:
        share: [L, E] float64, not negative.
    Returns:
        [L, E] int64.
    Collective: none.
    """
    # Floats from 0 on sort like their bits; the lowest bits hold the index instead, so a plain
    # sort is enough, and no two keys are equal.
    bits = max(1, (share.shape[1] - 1).bit_length())
    mask = (1 << bits) - 1
    keys = (~np.ascontiguousarray(share).view(np.int64) & ~mask & (2**63 - 1)) | np.arange(
        share.shape[1]
    )
    return np.asarray(np.sort(keys, axis=1) & mask)
