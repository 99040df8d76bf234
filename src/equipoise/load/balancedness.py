"""How balanced a placement would have been over steps that were really run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from equipoise.placement import Placement, spread_load
from equipoise.topology import FloatArray


def weigh_balancedness(logical_counts: npt.ArrayLike, placement: Placement) -> float:
    """Sum of mean rank loads over sum of largest, over steps and layers.

    Ranks wait for the slowest in every layer of every step, so busy steps weigh more than idle
    ones, and loads of different steps do not cancel out.

    Args:
        logical_counts: [N, L, E], tokens per expert in each of N steps.
        placement: where experts are taken to be in all of them.
    Returns:
        In (0, 1]; 1.0 is perfect, and what no load at all counts as.
    Collective: none.
    """
    mean, most = _sum_loads(logical_counts, placement)
    return float(mean.sum() / most.sum()) if most.sum() > 0 else 1.0


def weigh_balancedness_per_layer(logical_counts: npt.ArrayLike, placement: Placement) -> FloatArray:
    """[L] float64, `weigh_balancedness` of each layer by itself. Collective: none."""
    mean, most = _sum_loads(logical_counts, placement)
    return np.divide(mean, most, out=np.ones_like(mean), where=most > 0)


def _sum_loads(
    logical_counts: npt.ArrayLike, placement: Placement
) -> tuple[FloatArray, FloatArray]:
    rank_load = spread_load(logical_counts, placement)
    return rank_load.mean(axis=-1).sum(axis=0), rank_load.max(axis=-1).sum(axis=0)
