"""What a budget of received experts is best spent on, across layers."""

from __future__ import annotations

import numpy as np

from equipoise.policy.flow.compiled import kernel
from equipoise.topology import FloatArray, IntArray


@kernel
def choose_points(
    received: IntArray,
    balance: FloatArray,
    by_rank: IntArray,
    prices: FloatArray,
    budget: float,
    rank_budget: float,
    least_gain: float,
) -> IntArray:
    """Take every layer from its point 0 to the point that the budget is best spent on.

    Again and again the layer whose next point gains most balancedness per unit of budget moves
    on; what does not fit is left, and a smaller step taken where there is one.

    Args:
        received: [L, Q] int64, experts that a layer receives in all at each of its points.
        balance: [L, Q] float64, balancedness there.
        by_rank: [L, Q, R] int64, `received` by rank; R = 0 where there is no rank budget.
        prices: [L] float64, of one expert of a layer.
        budget: for all layers.
        rank_budget: for each rank.
        least_gain: balancedness of one layer per expert that must be gained to go on.
    Returns:
        [L] int64, the point of each layer.
    Collective: none.
    """
    num_layers = received.shape[0]
    chosen = np.zeros(num_layers, dtype=np.int64)
    used = np.zeros(by_rank.shape[2])
    spent = 0.0
    slope, goes_to = np.zeros(num_layers), np.full(num_layers, -2, dtype=np.int64)
    while True:
        best = -1
        for layer in range(num_layers):
            at = chosen[layer]
            # A point found earlier may not fit any more: what is left has shrunk.
            if goes_to[layer] >= 0 and not _fits(
                received, by_rank, prices, layer, at, goes_to[layer],
                budget - spent, used, rank_budget,
            ):  # fmt: skip
                goes_to[layer] = -2
            if goes_to[layer] == -2:
                goes_to[layer], slope[layer] = _find_steepest(
                    received, balance, by_rank, prices, layer, at,
                    budget - spent, used, rank_budget, least_gain,
                )  # fmt: skip
            if goes_to[layer] >= 0 and (best < 0 or slope[layer] > slope[best]):
                best = layer
        if best < 0:
            return chosen
        at, point = chosen[best], goes_to[best]
        spent += (received[best, point] - received[best, at]) * prices[best]
        for rank in range(used.size):
            used[rank] += (by_rank[best, point, rank] - by_rank[best, at, rank]) * prices[best]
        chosen[best], goes_to[best] = point, -2


@kernel
def _find_steepest(
    received: IntArray,
    balance: FloatArray,
    by_rank: IntArray,
    prices: FloatArray,
    layer: int,
    at: int,
    left: float,
    used: FloatArray,
    rank_budget: float,
    least_gain: float,
) -> tuple[int, float]:
    """The point that gains a layer most per unit of budget, -1 for none, and how much."""
    goes_to, slope = -1, 0.0
    for point in range(received.shape[1]):
        gain = balance[layer, point] - balance[layer, at]
        more = received[layer, point] - received[layer, at]
        if gain <= 0.0 or gain < least_gain * more:
            continue
        steep = gain / (max(float(more), 0.25) * prices[layer])
        if steep > slope and _fits(
            received, by_rank, prices, layer, at, point, left, used, rank_budget
        ):
            goes_to, slope = point, steep
    return goes_to, slope


@kernel
def _fits(
    received: IntArray,
    by_rank: IntArray,
    prices: FloatArray,
    layer: int,
    at: int,
    point: int,
    left: float,
    used: FloatArray,
    rank_budget: float,
) -> bool:
    if (received[layer, point] - received[layer, at]) * prices[layer] > left:
        return False
    for rank in range(used.size):
        more = (by_rank[layer, point, rank] - by_rank[layer, at, rank]) * prices[layer]
        if more > 0.0 and used[rank] + more > rank_budget:
            return False
    return True
