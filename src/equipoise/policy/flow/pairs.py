"""Two slots per rank: ranks are pairs of slots, and only replica counts are left to search.

For given counts the best pairs are known: the largest slot with the smallest, the second largest
with the second smallest, and so on. So the search changes counts and looks at the sorted slots.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.policy.flow.compiled import kernel
from equipoise.topology import FloatArray, IntArray


class _Slots(NamedTuple):
    """All slots of a layer, heaviest first."""

    share: FloatArray  # [P]
    expert: IntArray  # [P] E for an empty slot


@kernel
def _order(keys: FloatArray) -> IntArray:
    """Indices by rising key, ties by index."""
    return np.argsort(keys, kind="mergesort")


@kernel
def _sort(load: FloatArray, counts: IntArray, slots: _Slots) -> None:
    share = np.zeros(load.size)
    for expert in range(load.size):
        if counts[expert] > 0:
            share[expert] = load[expert] / counts[expert]
    at = 0
    for expert in _order(-share):
        for _ in range(counts[expert]):
            slots.share[at], slots.expert[at] = share[expert], expert
            at += 1


@kernel
def _score(slots: _Slots, scale: float, goal: float) -> tuple[float, float]:
    """What to lower: the heaviest pair, then all heavy ones; with a goal, what exceeds it."""
    num_slots = slots.share.size
    most, rest = 0.0, 0.0
    if goal > 0.0:
        for i in range(num_slots // 2):
            rest += max((slots.share[i] + slots.share[num_slots - 1 - i]) * scale - goal, 0.0)
        return rest, 0.0
    for i in range(num_slots // 2):
        pair = (slots.share[i] + slots.share[num_slots - 1 - i]) * scale
        most = max(most, pair)
        pair *= pair
        pair *= pair
        pair *= pair
        rest += pair * pair
    return most, rest


@kernel
def _find_worst(slots: _Slots) -> int:
    num_slots = slots.share.size
    worst, most = 0, -1.0
    for i in range(num_slots // 2):
        pair = slots.share[i] + slots.share[num_slots - 1 - i]
        if pair > most:
            worst, most = i, pair
    return worst


@kernel
def _transfer(
    load: FloatArray, counts: IntArray, slots: _Slots, gives: int, takes: int, into: _Slots
) -> None:
    """The sorted slots once one expert has given a replica to another."""
    first, num_first = gives, counts[gives] - 1
    second, num_second = takes, counts[takes] + 1
    first_share = load[gives] / max(num_first, 1)
    second_share = load[takes] / num_second
    if first_share < second_share:
        first, second = second, first
        num_first, num_second = num_second, num_first
        first_share, second_share = second_share, first_share
    at, i, num_slots = 0, 0, slots.share.size
    while i < num_slots and slots.share[i] >= first_share:
        if slots.expert[i] not in (gives, takes):
            into.share[at], into.expert[at] = slots.share[i], slots.expert[i]
            at += 1
        i += 1
    for _ in range(num_first):
        into.share[at], into.expert[at] = first_share, first
        at += 1
    while i < num_slots and slots.share[i] >= second_share:
        if slots.expert[i] not in (gives, takes):
            into.share[at], into.expert[at] = slots.share[i], slots.expert[i]
            at += 1
        i += 1
    for _ in range(num_second):
        into.share[at], into.expert[at] = second_share, second
        at += 1
    while i < num_slots:
        if slots.expert[i] not in (gives, takes):
            into.share[at], into.expert[at] = slots.share[i], slots.expert[i]
            at += 1
        i += 1


@kernel
def weigh_pairs(load: FloatArray, counts: IntArray) -> FloatArray:
    """How heavy pairs are when the largest slot meets the smallest, and so on.

    Args:
        load: [L, E + 1] float64, the last being 0, for empty slots.
        counts: [L, E + 1] int64, summing to P.
    Returns:
        [L, 2] float64: the heaviest pair over the mean, and the sum of all pairs' fourth powers.
    Collective: none.
    """
    num_layers, num_slots = load.shape[0], counts[:1].sum()
    slots = _Slots(np.empty(num_slots), np.empty(num_slots, dtype=np.int64))
    weight = np.zeros((num_layers, 2))
    for layer in range(num_layers):
        _sort(load[layer], counts[layer], slots)
        scale = num_slots / 2 / max(load[layer].sum(), 1.0)
        for i in range(num_slots // 2):
            pair = (slots.share[i] + slots.share[num_slots - 1 - i]) * scale
            weight[layer, 0] = max(weight[layer, 0], pair)
            weight[layer, 1] += pair * pair * pair * pair
    return weight


@kernel
def tune_counts(
    load: FloatArray,
    counts: IntArray,
    least: int,
    most: int,
    goal: FloatArray,
    enough: float,
    max_looks: int,
) -> IntArray:
    """Search the counts whose sorted pairs weigh least.

    The expert that gets a replica is mostly the heavy one of the worst pair, the one that gives
    it any other; both are drawn from a fixed sequence, so that every run does the same.

    Args:
        load: [L, E + 1] float64, tokens per expert; the last stands for empty slots and is 0.
        counts: [L, E + 1] int64, to start from; they sum to P.
        least: replicas that no expert falls below.
        most: replicas that no expert exceeds.
        goal: [L] float64, heaviest pair over the mean at which a layer is good enough and below
            which pairs do not matter; 0 to lower the heaviest pair as far as the budget goes.
        enough: heaviest pair over the mean at which a layer without a goal is left alone.
        max_looks: slots looked at per layer.
    Returns:
        [L, E + 1] int64 counts.
    Collective: none.
    """
    num_layers, num_slots = load.shape[0], counts[:1].sum()
    empty = load.shape[1] - 1
    tuned = counts.copy()
    one = _Slots(np.empty(num_slots), np.empty(num_slots, dtype=np.int64))
    other = _Slots(np.empty(num_slots), np.empty(num_slots, dtype=np.int64))
    for layer in range(num_layers):
        now, then = one, other
        _sort(load[layer], tuned[layer], now)
        scale = num_slots / 2 / max(load[layer].sum(), 1.0)
        score, rest = _score(now, scale, goal[layer])
        random = np.uint64(0x9E3779B97F4A7C15)
        worst = _find_worst(now)
        for _ in range(max_looks // num_slots):
            if score <= (0.0 if goal[layer] > 0.0 else enough):
                break
            # A linear congruential sequence (Knuth's MMIX constants).
            random = random * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            first = np.int64(random >> np.uint64(33))
            random = random * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            gives = now.expert[np.int64(random >> np.uint64(33)) % num_slots]
            takes = now.expert[worst]
            if first % 8 >= 5:
                takes = now.expert[first // 8 % (worst + 1 if first % 8 < 7 else num_slots)]
            floor = 0 if gives == empty else least
            if gives == takes or takes == empty:
                continue
            if tuned[layer, gives] <= floor or tuned[layer, takes] >= most:
                continue
            _transfer(load[layer], tuned[layer], now, gives, takes, then)
            new_score, new_rest = _score(then, scale, goal[layer])
            if new_score < score or (new_score == score and new_rest < rest):
                score, rest = new_score, new_rest
                tuned[layer, gives] -= 1
                tuned[layer, takes] += 1
                now, then = then, now
                worst = _find_worst(now)
    return tuned


@kernel
def pair_up(load: FloatArray, counts: IntArray) -> IntArray:
    """Pair the largest slot with the smallest, and so on inwards.

    Only the expert in the middle of the order can meet itself. Such a pair exchanges a slot with
    the nearest pair that has neither, or leaves its second slot empty: where there is no such
    pair, or the expert has no third replica, so that nothing changes but a wasted slot.

    Args:
        load: [L, E + 1] float64, the last being 0, for empty slots.
        counts: [L, E + 1] int64, summing to P.
    Returns:
        slot_to_expert [L, P] int64.
    Collective: none.
    """
    num_layers, num_slots = load.shape[0], counts[:1].sum()
    empty = load.shape[1] - 1
    table = np.empty((num_layers, num_slots), dtype=np.int64)
    slots = _Slots(np.empty(num_slots), np.empty(num_slots, dtype=np.int64))
    for layer in range(num_layers):
        _sort(load[layer], counts[layer], slots)
        row = table[layer]
        for i in range(num_slots // 2):
            row[2 * i], row[2 * i + 1] = slots.expert[i], slots.expert[num_slots - 1 - i]
        for i in range(num_slots // 2 - 1, -1, -1):
            if row[2 * i] != row[2 * i + 1] or row[2 * i] == empty:
                continue
            mate = i - 1 if counts[layer, row[2 * i]] > 2 else -1
            while mate >= 0 and (row[2 * mate] == row[2 * i] or row[2 * mate + 1] == row[2 * i]):
                mate -= 1
            if mate >= 0:
                row[2 * i + 1], row[2 * mate + 1] = row[2 * mate + 1], row[2 * i + 1]
            else:
                row[2 * i + 1] = empty
        for slot in range(num_slots):
            if row[slot] == empty:
                row[slot] = -1
    return table


@kernel
def recount(load: FloatArray, table: IntArray, counts: IntArray) -> None:
    """Change a table to new counts in the fewest slots.

    Args:
        load: [L, E + 1] float64, the last being 0, for empty slots.
        table: [L, P] int64, slot_to_expert, P = 2 R; changed in place.
        counts: [L, E + 1] int64 wanted; what a rank cannot take, it leaves empty.
    Collective: none.
    """
    num_slots = table.shape[1]
    empty = load.shape[1] - 1
    for layer in range(load.shape[0]):
        row, wanted = table[layer], counts[layer]
        share = load[layer] / np.maximum(wanted, 1)
        surplus = -wanted
        for slot in range(num_slots):
            surplus[row[slot] if row[slot] >= 0 else empty] += 1
        # Where a replica goes, the partner that is heaviest loses it.
        partner = np.zeros(num_slots)
        for slot in range(num_slots):
            if row[slot ^ 1] >= 0:
                partner[slot] = share[row[slot ^ 1]]
        for slot in _order(-partner):
            if row[slot] >= 0 and surplus[row[slot]] > 0:
                surplus[row[slot]] -= 1
                row[slot] = -1
        # The heaviest new replica goes beside the lightest partner.
        for slot in range(num_slots):
            partner[slot] = share[row[slot ^ 1]] if row[slot ^ 1] >= 0 else 0.0
        order = _order(partner)
        for expert in _order(-share):
            if expert == empty:
                continue
            for slot in order:
                if surplus[expert] >= 0:
                    break
                if row[slot] < 0 and row[slot ^ 1] != expert:
                    row[slot] = expert
                    surplus[expert] += 1
