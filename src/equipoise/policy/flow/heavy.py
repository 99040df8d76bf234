"""Experts so heavy that two of their slots overfill a rank: their counts decide how all packs.

The counts with the smallest largest slot are then not the ones that pack best: 6, 3 and 2
replicas may leave ranks uneven where 5, 3 and 3 do not, and no single change of a finished
packing leads from one to the other. So counts are changed here, and all is packed anew.
"""

from __future__ import annotations

import numpy as np

from equipoise.policy.flow.compiled import kernel
from equipoise.policy.flow.packing import pack_slots
from equipoise.topology import FloatArray, IntArray

NUM_HEAVY = 3
"""Experts, heaviest first, that exchange replicas."""


@kernel
def _exceed(
    load: FloatArray, counts: IntArray, slots_per_rank: int, slowness: FloatArray, goal: float
) -> float:
    """Tokens above the goal, over all ranks, once one layer is packed: [1, E] each."""
    share = load / counts
    order = np.argsort(-share[0], kind="mergesort").reshape(1, -1)
    row = pack_slots(share, order, counts, slots_per_rank, slowness)[0]
    placed = np.zeros(load.shape[1])
    for expert in row:
        if expert >= 0:
            placed[expert] += 1.0
    over = 0.0
    for rank in range(slowness.size):
        tokens = 0.0
        for expert in row[rank * slots_per_rank : (rank + 1) * slots_per_rank]:
            if expert >= 0:
                tokens += load[0, expert] / placed[expert]
        over += max(tokens * slowness[rank] - goal, 0.0)
    return over


@kernel
def _exchange(
    load: FloatArray,
    counts: IntArray,
    slots_per_rank: int,
    slowness: FloatArray,
    least: int,
    most: int,
    goal: float,
    over: float,
) -> float:
    """Make the best change of one layer's counts, if one is better; returns what then exceeds.

    One of the heaviest gives one replica to another of them, or two to one or two others.
    """
    heavy = np.argsort(-load[0], kind="mergesort")[:NUM_HEAVY]
    best, best_over = counts.copy(), over
    for gives in heavy:
        for first in range(heavy.size):
            for second in range(-1, first + 1):  # -1: one replica alone
                trial = counts.copy()
                trial[0, gives] -= 1 if second < 0 else 2
                trial[0, heavy[first]] += 1
                if second >= 0:
                    trial[0, heavy[second]] += 1
                to_itself = heavy[first] == gives or (second >= 0 and heavy[second] == gives)
                if to_itself or trial[0, gives] < least or trial[0, heavy].max() > most:
                    continue
                if best_over > 0.0:
                    trial_over = _exceed(load, trial, slots_per_rank, slowness, goal)
                    if trial_over < best_over * (1.0 - 1e-9):
                        best, best_over = trial, trial_over
    counts[:] = best
    return best_over


@kernel
def recount_heavy(
    load: FloatArray,
    counts: IntArray,
    slots_per_rank: int,
    slowness: FloatArray,
    least: int,
    most: int,
    goal: FloatArray,
    max_rounds: int,
) -> IntArray:
    """Let the heaviest experts exchange replicas until what they leave packs evenly.

    Args:
        load: [L, E] float64, tokens per expert.
        counts: [L, E] int64, replicas to start from.
        slots_per_rank: S.
        slowness: [R] float64, mean rank speed over the rank's.
        least: replicas that no expert falls below.
        most: replicas that no expert exceeds.
        goal: [L] float64, busy time below which a rank does not matter.
        max_rounds: changes per layer, at most.
    Returns:
        [L, E] int64 counts.
    Collective: none.
    """
    changed = counts.copy()
    for layer in range(load.shape[0]):
        one, now = load[layer : layer + 1], changed[layer : layer + 1]
        over = _exceed(one, now, slots_per_rank, slowness, goal[layer])
        for _ in range(max_rounds):
            if over <= 0.0:
                break
            fewer = _exchange(one, now, slots_per_rank, slowness, least, most, goal[layer], over)
            if fewer >= over:
                break
            over = fewer
    return changed
