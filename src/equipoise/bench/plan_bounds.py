"""What no placement can beat: lower bounds of the busiest rank's tokens."""

from __future__ import annotations

import numpy as np

from equipoise.policy.flow.compiled import kernel
from equipoise.policy.flow.packing import count_replicas
from equipoise.topology import FloatArray, IntArray, Topology

NUM_BISECTIONS = 12
"""Halvings of the interval that the pairing bound is sought in."""
NUM_STEPS = 24
"""Places of the step in the weights that a rank cannot hold more than 1 of."""
NUM_SHARES = 4
"""Parts in which step, slope and constant share a weight."""


def bound_peak(load: IntArray, topology: Topology) -> FloatArray:
    """The largest of mean load, least possible largest slot and, for pairs of slots, pairing bound.

    Args:
        load: [L, E] int64, tokens per expert.
        topology: ranks and slots.
    Returns:
        [L] float64, tokens that the busiest rank has at least.
    Collective: none.
    """
    tokens = load.astype(np.float64)
    mean = tokens.sum(axis=1) / topology.num_ranks
    peak = np.maximum(mean, _bound_slot(tokens, topology.num_slots, topology.num_ranks))
    if topology.slots_per_rank == 2:
        peak = bound_pairs(tokens, topology.num_ranks, peak)
    return np.asarray(peak)


def bound_peak_in_groups(load: IntArray, topology: Topology, num_groups: int) -> FloatArray:
    """The same where each group stays on one node: over all ways to give nodes their groups.

    Args:
        load: [L, E] int64, tokens per expert.
        topology: ranks, nodes and slots; the nodes divide the groups.
        num_groups: equal groups that consecutive experts form; 16 at most, for time's sake.
    Returns:
        [L] float64, tokens that the busiest rank has at least.
    Collective: none.
    """
    layers, nodes = load.shape[0], topology.num_nodes
    on_node = num_groups // nodes
    node = Topology(topology.ranks_per_node, topology.slots_per_rank)
    tokens = load.reshape(layers, num_groups, -1)
    full = 1 << num_groups
    alone = {
        subset: bound_peak(
            tokens[:, [g for g in range(num_groups) if subset >> g & 1]].reshape(layers, -1), node
        )
        for subset in range(full)
        if subset.bit_count() == on_node
    }
    # best[subset]: least possible peak of the nodes that hold these groups.
    best = {0: np.zeros(layers)}
    for subset in range(1, full):
        if subset.bit_count() % on_node == 0:
            lowest = subset & -subset
            best[subset] = np.min(
                [
                    np.maximum(peak, best[subset ^ part])
                    for part, peak in alone.items()
                    if part & lowest and part & subset == part
                ],
                axis=0,
            )
    return np.asarray(best[full - 1])


def _bound_slot(tokens: FloatArray, num_slots: int, num_ranks: int) -> FloatArray:
    counts = count_replicas(tokens, num_slots, 1, num_ranks, 0.0)
    return np.asarray((tokens / counts).max(axis=1))


@kernel
def bound_pairs(load: FloatArray, num_ranks: int, peak: FloatArray) -> FloatArray:
    """Lower bound of the heaviest pair of slots, by dual feasible functions.

    Let f give slots weights such that two that fit below T weigh 1 at most together. If every
    choice of replicas makes the slots weigh more than R, no placement stays below T. Tried are
    mixtures of a half, x / T, and a step: 0 below t, 1 above T - t, a half between.

    Args:
        load: [L, E] float64.
        num_ranks: R, of two slots each.
        peak: [L] float64, a bound that is known.
    Returns:
        [L] float64, `peak` or more.
    Collective: none.
    Source: S. P. Fekete, J. Schepers, "New classes of fast lower bounds for bin packing
        problems", 2001, for the functions.
    """
    raised = peak.copy()
    for layer in range(load.shape[0]):
        low, high = peak[layer], 2.0 * peak[layer]
        for halving in range(NUM_BISECTIONS):
            # Mostly nothing is to be raised: a look just above what is known ends it.
            middle = low * (1.0 + 1e-4) if halving == 0 else 0.5 * (low + high)
            if _cannot_pair(load[layer], num_ranks, middle):
                low = middle
            else:
                high = middle
                if halving == 0:
                    break
        raised[layer] = low
    return raised


@kernel
def _cannot_pair(load: FloatArray, num_ranks: int, most: float) -> bool:
    mean = load.sum() / most
    for step in range(NUM_STEPS + 1):
        below = 0.5 * most * step / NUM_STEPS
        for slope in range(NUM_SHARES + 1):
            for steep in range(NUM_SHARES + 1 - slope):
                half, jump = 0.5 * (NUM_SHARES - slope), 0.5 * steep
                weight = 0.0
                for tokens in load:
                    weight += _least_weight(tokens, most, below, half, jump)
                if weight + slope * mean > num_ranks * NUM_SHARES * (1.0 + 1e-12):
                    return True
    return False


@kernel
def _least_weight(tokens: float, most: float, below: float, half: float, jump: float) -> float:
    """Least weight, over replica counts, of an expert's slots, the part in proportion left out."""
    if tokens <= 0.0:
        return half - jump
    count = np.ceil(tokens / most)
    share = tokens / count
    best = count * (half + (jump if share > most - below else 0.0))
    if share < below:
        best = count * (half - jump)
    count = np.ceil(tokens / (most - below))
    best = min(best, count * (half - jump if tokens / count < below else half))
    if below > 0.0:
        count = np.floor(tokens / below) + 1.0
        best = min(best, count * (half - jump))
    return float(best)
