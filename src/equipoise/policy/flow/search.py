"""Local search: relieve the busiest rank, one change after the other, and keep the log.

A change swaps two slots of two ranks, gives a slot to another expert, empties one, or passes
experts on around a ring of ranks. It is made only where every rank that it makes busier stays
below what the busiest was: so the sorted busy times fall in lexicographic order, and it ends.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from equipoise.policy.flow.bounds import WIDTH, Bounds, Log
from equipoise.policy.flow.compiled import kernel
from equipoise.topology import FloatArray, IntArray


class _State(NamedTuple):
    """One layer while it is searched."""

    load: FloatArray  # [E]
    table: IntArray  # [P]
    share: FloatArray  # [E] load / counts
    counts: IntArray  # [E]
    ranks: IntArray  # [E, R] ranks that hold an expert, the first counts[e] of a row
    busy: FloatArray  # [R] tokens x slowness
    held: npt.NDArray[np.bool_]  # [E, R] at the start
    on_node: IntArray  # [E, N] replicas
    home: IntArray  # [E]
    leaving: FloatArray  # [2] tokens served off their expert's home, and how many may be


@kernel
def _holds(state: _State, rank: int, expert: int) -> bool:
    held = False
    for i in range(state.counts[expert]):
        held = held or state.ranks[expert, i] == rank
    return held


@kernel
def _weigh(state: _State, bounds: Bounds, rank: int) -> None:
    # Summed anew in slot order, so that rounding does not depend on the way here.
    slots_per_rank = state.table.size // state.busy.size
    tokens = 0.0
    for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
        if state.table[slot] >= 0:
            tokens += state.share[state.table[slot]]
    state.busy[rank] = tokens * bounds.slowness[rank]


@kernel
def _away(state: _State, expert: int) -> float:
    home = state.home[expert]
    if home < 0:
        return 0.0
    return float(state.share[expert] * (state.counts[expert] - state.on_node[expert, home]))


@kernel
def _start(state: _State, bounds: Bounds, standing: IntArray, leaving: float) -> int:
    """Fill in what follows from load and table; returns what ranks do not hold yet.

    Second replicas on one rank are emptied.
    """
    slots_per_rank = state.table.size // state.busy.size
    for expert in range(state.load.size):
        state.counts[expert] = 0
        for rank in range(state.held.shape[1]):
            state.held[expert, rank] = False
        for node in range(state.on_node.shape[1]):
            state.on_node[expert, node] = 0
    for slot in range(state.table.size):
        rank, expert = slot // slots_per_rank, standing[slot]
        if bounds.frugal and expert >= 0:
            state.held[expert, rank] = True
        expert = state.table[slot]
        if expert < 0:
            continue
        if _holds(state, rank, expert):
            state.table[slot] = -1
            continue
        state.ranks[expert, state.counts[expert]] = rank
        state.counts[expert] += 1
        if bounds.by_node:
            state.on_node[expert, bounds.node_of_rank[rank]] += 1
    for expert in range(state.load.size):
        state.share[expert] = state.load[expert] / state.counts[expert]
    for rank in range(state.busy.size):
        _weigh(state, bounds, rank)
    state.leaving[0], state.leaving[1] = 0.0, leaving * state.load.sum()
    if bounds.by_node:
        for expert in range(state.load.size):
            state.leaving[0] += _away(state, expert)
    received = 0
    if bounds.frugal:
        for slot in range(state.table.size):
            expert = state.table[slot]
            if expert >= 0 and not state.held[expert, slot // slots_per_rank]:
                received += 1
    return received


@kernel
def _count(state: _State, bounds: Bounds, expert: int, rank: int, step: int) -> int:
    """Add (step 1) or take (-1) a replica; returns the change of experts received."""
    if expert < 0:
        return 0
    if bounds.by_node:
        state.leaving[0] -= _away(state, expert)
        state.on_node[expert, bounds.node_of_rank[rank]] += step
    count = state.counts[expert]
    if step > 0:
        state.ranks[expert, count] = rank
    else:
        at = 0
        while state.ranks[expert, at] != rank:
            at += 1
        state.ranks[expert, at] = state.ranks[expert, count - 1]
    state.counts[expert] = count + step
    if count + step > 0:
        state.share[expert] = state.load[expert] / (count + step)
    if bounds.by_node:
        state.leaving[0] += _away(state, expert)
    return step if bounds.frugal and not state.held[expert, rank] else 0


@kernel
def _may_shift(state: _State, bounds: Bounds, expert: int, source: int, target: int) -> float:
    """Tokens more that leave home if a replica goes from one rank to another; inf if it may not.

    Source -1 adds a replica, target -1 takes one away.
    """
    if expert < 0:
        return 0.0
    from_node = bounds.node_of_rank[source] if source >= 0 else -1
    to_node = bounds.node_of_rank[target] if target >= 0 else -1
    if from_node == to_node:
        return 0.0
    if bounds.spread > 1 and from_node >= 0 and state.on_node[expert, from_node] == 1:
        nodes = -1
        for node in range(state.on_node.shape[1]):
            if state.on_node[expert, node] > 0 or node == to_node:
                nodes += 1
        if nodes < bounds.spread:
            return np.inf
    home = state.home[expert]
    if home < 0:
        return 0.0
    count = state.counts[expert] + (1 if source < 0 else 0) - (1 if target < 0 else 0)
    at_home = state.on_node[expert, home]
    at_home += (1 if to_node == home else 0) - (1 if from_node == home else 0)
    if at_home < 1:
        return np.inf
    return float(state.load[expert] * (count - at_home) / count - _away(state, expert))


@kernel
def _raised_peak(state: _State, bounds: Bounds, expert: int, without: int, top: int) -> float:
    """Busy time of the busiest holder once `without` drops the expert, `top` left out."""
    count = state.counts[expert]
    more = state.load[expert] / (count - 1) - state.share[expert]
    peak = 0.0
    for i in range(count):
        rank = state.ranks[expert, i]
        if rank not in (without, top):
            peak = max(peak, state.busy[rank] + more * bounds.slowness[rank])
    return peak


@kernel
def _price(state: _State, bounds: Bounds, rank: int, added: int, dropped: int) -> int:
    """Experts that a rank must receive more if one slot changes so."""
    price = 0
    if bounds.frugal:
        if added >= 0 and not state.held[added, rank]:
            price += 1
        if dropped >= 0 and not state.held[dropped, rank]:
            price -= 1
    return price


@kernel
def _least_busy(state: _State, seen: npt.NDArray[np.bool_]) -> int:
    least = -1
    for rank in range(state.busy.size):
        if not seen[rank] and (least < 0 or state.busy[rank] < state.busy[least]):
            least = rank
    return least


@kernel
def _find_swap(
    state: _State, bounds: Bounds, top: int, goal: float, change: IntArray
) -> tuple[float, int]:
    """Best exchange of a slot of the busiest rank with one of another: worth, looked at."""
    num_ranks = state.busy.size
    slots_per_rank = state.table.size // num_ranks
    peak, slow = state.busy[top], bounds.slowness[top]
    best, looked = 0.0, 0
    seen = np.zeros(num_ranks, dtype=np.bool_)
    for turn in range(num_ranks):
        rank = turn if bounds.frugal else _least_busy(state, seen)
        seen[rank] = True
        gap = peak - state.busy[rank]
        if gap <= 0.0:
            continue
        other_slow = bounds.slowness[rank]
        for slot in range(top * slots_per_rank, (top + 1) * slots_per_rank):
            expert = state.table[slot]
            if expert < 0 or _holds(state, rank, expert):
                continue
            looked += slots_per_rank
            for other in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
                swapped = state.table[other]
                shift = state.share[expert]
                if swapped >= 0:
                    shift -= state.share[swapped]
                gain = min(shift * slow, gap - shift * other_slow)
                if gain <= 0.0 or gain * 4.0 <= best:
                    continue
                worth = gain
                if bounds.frugal:
                    over = max(state.busy[rank] + shift * other_slow - goal, 0.0)
                    over -= max(state.busy[rank] - goal, 0.0)
                    relief = min(shift * slow, peak - goal)
                    gain = min(gain, max(relief - over, 0.0) + 0.05 * gain)
                    price = _price(state, bounds, rank, expert, swapped)
                    price += _price(state, bounds, top, swapped, expert)
                    worth = gain / max(float(price), 0.25)
                if worth <= best or (swapped >= 0 and _holds(state, top, swapped)):
                    continue
                if bounds.by_node:
                    away = _may_shift(state, bounds, expert, top, rank)
                    away += _may_shift(state, bounds, swapped, rank, top)
                    if away > 0.0 and state.leaving[0] + away > state.leaving[1]:
                        continue
                best = worth
                change[0], change[1], change[2], change[3] = slot, swapped, other, expert
        if not bounds.frugal and peak - best <= goal:
            break
    return best, looked


@kernel
def _relieve_others(
    state: _State, bounds: Bounds, top: int, goal: float, expert: int, dropped: int, rank: int
) -> float:
    """What ranks other than the busiest have less above the goal once a rank's slot changes."""
    share = state.load[expert] / (state.counts[expert] + 1)
    relief = max(state.busy[rank] - goal, 0.0)
    for i in range(state.counts[expert]):
        holder = state.ranks[expert, i]
        if holder != top:
            less = (state.share[expert] - share) * bounds.slowness[holder]
            relief += min(max(state.busy[holder] - goal, 0.0), less)
    freed = 0.0
    if dropped >= 0:
        freed = state.share[dropped]
        more = state.load[dropped] / (state.counts[dropped] - 1) - freed
        for i in range(state.counts[dropped]):
            holder = state.ranks[dropped, i]
            if holder not in (top, rank):
                busy = state.busy[holder]
                relief += max(busy - goal, 0.0)
                relief -= max(busy + more * bounds.slowness[holder] - goal, 0.0)
    after = state.busy[rank] + (share - freed) * bounds.slowness[rank]
    return float(relief - max(after - goal, 0.0))


@kernel
def _find_replica(
    state: _State, bounds: Bounds, top: int, goal: float, best: float, change: IntArray
) -> tuple[float, int]:
    """Best slot elsewhere to give to an expert of the busiest rank: worth, looked at."""
    num_ranks = state.busy.size
    slots_per_rank = state.table.size // num_ranks
    peak, slow = state.busy[top], bounds.slowness[top]
    looked = 0
    for slot in range(state.table.size):
        dropped = state.table[slot]
        if dropped >= 0 and state.counts[dropped] <= bounds.least:
            continue
        rank = slot // slots_per_rank
        if rank == top:
            continue
        freed, back, room = 0.0, 0.0, peak
        if dropped >= 0:
            freed = state.share[dropped]
            room = peak - _raised_peak(state, bounds, dropped, rank, top)
            if _holds(state, top, dropped):
                back = state.load[dropped] / (state.counts[dropped] - 1) - freed
        looked += slots_per_rank
        for own in range(top * slots_per_rank, (top + 1) * slots_per_rank):
            expert = state.table[own]
            if expert < 0 or expert == dropped or state.counts[expert] >= bounds.most:
                continue
            share = state.load[expert] / (state.counts[expert] + 1)
            gain = min(room, (state.share[expert] - share - back) * slow)
            gain = min(gain, peak - state.busy[rank] - (share - freed) * bounds.slowness[rank])
            if gain <= 0.0:
                continue
            price = _price(state, bounds, rank, expert, dropped)
            if bounds.frugal:
                relief = min((state.share[expert] - share - back) * slow, peak - goal)
                relief += _relieve_others(state, bounds, top, goal, expert, dropped, rank)
                gain = max(relief, 0.0) + 0.05 * gain
            worth = gain / max(float(price), 0.25) if bounds.frugal else gain
            if worth <= best or _holds(state, rank, expert):
                continue
            if bounds.by_node:
                away = _may_shift(state, bounds, expert, -1, rank)
                away += _may_shift(state, bounds, dropped, rank, -1)
                if away > 0.0 and state.leaving[0] + away > state.leaving[1]:
                    continue
            best = worth
            change[0], change[1], change[2], change[3] = slot, expert, -1, -1
    return best, looked


@kernel
def _find_chain(
    state: _State, bounds: Bounds, top: int, level: float, change: IntArray
) -> tuple[float, int]:
    """Shortest ring of slots that brings the busiest rank below a level; every step of it lighter.

    The busiest rank gives `hand` away; each rank on the way takes what the one before gave, and
    gives the lightest that leaves it below the level, until what is given fits where the busiest
    rank takes its own replacement from.
    """
    slots_per_rank = state.table.size // state.busy.size
    looked = 0
    best = 0.0
    links = change.size // 2 - 1
    chain = np.empty(links, dtype=np.int64)
    for slot in range(top * slots_per_rank, (top + 1) * slots_per_rank):
        if state.table[slot] < 0:
            continue
        chain[0], length = slot, 1
        while length < links:
            hand = state.table[chain[length - 1]]
            lightest, link = state.share[hand], -1
            for other in range(state.table.size):
                rank, expert = other // slots_per_rank, state.table[other]
                if rank == top or expert < 0 or state.share[expert] >= lightest:
                    continue
                after = state.busy[rank]
                after += (state.share[hand] - state.share[expert]) * bounds.slowness[rank]
                if after < level and not _holds(state, rank, hand):
                    lightest, link = state.share[expert], other
            looked += state.table.size
            if link < 0:
                break
            chain[length] = link
            length += 1
        for other in range(state.table.size):
            rank, expert = other // slots_per_rank, state.table[other]
            taken = state.share[expert] if expert >= 0 else 0.0
            after = (
                state.busy[top] - (state.share[state.table[slot]] - taken) * bounds.slowness[top]
            )
            if rank == top or after >= level or (expert >= 0 and _holds(state, top, expert)):
                continue
            for last in range(1, length):
                hand = state.table[chain[last]]
                if chain[last] // slots_per_rank == rank:
                    break
                more = (state.share[hand] - taken) * bounds.slowness[rank]
                if state.busy[rank] + more >= level or _holds(state, rank, hand):
                    continue
                worth = 1.0 / (last + 2) + (1.0 - after / state.busy[top]) * 1e-3
                if worth > best:
                    best = worth
                    change[:] = -1
                    change[0], change[1] = slot, expert
                    for i in range(1, last + 1):
                        change[2 * i], change[2 * i + 1] = chain[i], state.table[chain[i - 1]]
                    change[2 * last + 2], change[2 * last + 3] = other, hand
                break
    return best, looked


@kernel
def _apply(state: _State, bounds: Bounds, change: IntArray) -> int:
    """Make a change; returns the change of experts received."""
    slots_per_rank = state.table.size // state.busy.size
    received = 0
    touched = np.full(change.size, -1, dtype=np.int64)
    for i in range(0, change.size, 2):
        slot = change[i]
        if slot >= 0:
            touched[i], touched[i + 1] = state.table[slot], change[i + 1]
            received += _count(state, bounds, touched[i], slot // slots_per_rank, -1)
            state.table[slot] = -1
    for i in range(0, change.size, 2):
        if change[i] >= 0:
            state.table[change[i]] = change[i + 1]
            received += _count(state, bounds, change[i + 1], change[i] // slots_per_rank, 1)
    if change[2] < 0:  # replicas came or went: their other holders' loads change too
        for expert in touched:
            if expert >= 0:
                for i in range(state.counts[expert]):
                    _weigh(state, bounds, state.ranks[expert, i])
    for i in range(0, change.size, 2):
        if change[i] >= 0:
            _weigh(state, bounds, change[i] // slots_per_rank)
    return received


@kernel
def _find(
    state: _State, bounds: Bounds, top: int, goal: float, change: IntArray
) -> tuple[float, int]:
    change[:] = -1
    best, looked = _find_swap(state, bounds, top, goal, change)
    if not bounds.frugal and best > 0.0 and state.busy[top] - best <= goal:
        return best, looked
    best, more = _find_replica(state, bounds, top, goal, best, change)
    looked += more
    peak = state.busy[top]
    for level in (goal, 0.5 * (goal + peak), peak):
        if best <= 0.0 and not bounds.by_node:
            best, more = _find_chain(state, bounds, top, level, change)
            looked += more
    return best, looked


@kernel
def _search_layer(state: _State, standing: IntArray, bounds: Bounds, log: Log, layer: int) -> None:
    received = _start(state, bounds, standing, bounds.leaving[layer])
    goal = bounds.goal[layer]
    change = np.full(WIDTH, -1, dtype=np.int64)
    looked, step = 0, 0
    log.peak[layer, 0] = state.busy.max()
    log.received[layer, 0] = received
    while step < bounds.max_steps and looked < bounds.max_looks:
        top = int(np.argmax(state.busy))
        if state.busy[top] <= goal:
            break
        best, more = _find(state, bounds, top, goal, change)
        looked += more
        if best <= 0.0:
            break
        received += _apply(state, bounds, change)
        step += 1
        if bounds.frugal:
            log.slots[layer, step] = change[::2]
            log.experts[layer, step] = change[1::2]
            log.received[layer, step] = received
            log.peak[layer, step] = state.busy.max()
    log.num_steps[layer] = step + 1


@kernel
def improve(load: FloatArray, table: IntArray, standing: IntArray, bounds: Bounds) -> Log:
    """Search every layer from where it stands.

    Args:
        load: [L, E] float64, tokens per expert.
        table: [L, P] int64, slot_to_expert; changed in place to what the last step leaves.
            Second replicas on one rank are emptied at once.
        standing: [L, P] int64, what ranks hold already.
        bounds: what to keep to.
    Returns:
        What was done, if frugal, so that a caller may take the first steps only.
    Collective: none.
    """
    num_layers, num_experts = load.shape
    num_ranks = bounds.slowness.size
    logged = bounds.max_steps + 1 if bounds.frugal else 1
    log = Log(
        np.full((num_layers, logged, WIDTH // 2), -1, dtype=np.int64),
        np.full((num_layers, logged, WIDTH // 2), -1, dtype=np.int64),
        np.zeros((num_layers, logged), dtype=np.int64),
        np.zeros((num_layers, logged)),
        np.ones(num_layers, dtype=np.int64),
    )
    counts = np.empty(num_experts, dtype=np.int64)
    share, busy = np.empty(num_experts), np.empty(num_ranks)
    ranks = np.empty((num_experts, num_ranks), dtype=np.int64)
    held = np.zeros((num_experts, num_ranks if bounds.frugal else 0), dtype=np.bool_)
    num_nodes = bounds.node_of_rank[-1] + 1 if bounds.by_node else 0
    on_node = np.zeros((num_experts, num_nodes), dtype=np.int64)
    leaving = np.zeros(2)
    for layer in range(num_layers):
        state = _State(
            load[layer], table[layer], share, counts, ranks, busy, held, on_node,
            bounds.home[layer], leaving,
        )  # fmt: skip
        _search_layer(state, standing[layer], bounds, log, layer)
    return log
