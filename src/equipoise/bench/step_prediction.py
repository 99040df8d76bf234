"""What balance should be worth, from the time that experts take; and how sure measured figures are.

Axis letters: L layers, R ranks, S slots per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from equipoise.topology import FloatArray, IntArray

_NUM_DRAWS = 300


@dataclass(frozen=True)
class ExpertTime:
    """Seconds of a layer's experts on one rank: what was measured, and the plane through it.

    Attributes:
        fixed_s: of any call.
        token_s: of a row.
        slot_s: of a slot that has any.
        worst: largest relative deviation of a measured point from the plane.
    """

    fixed_s: float
    token_s: float
    slot_s: float
    worst: float

    def predict(self, rank_tokens: IntArray, occupied: IntArray) -> FloatArray:
        """Seconds for so many rows in so many slots, of the shape of both. Collective: none."""
        return self.fixed_s + self.token_s * rank_tokens + self.slot_s * occupied


@dataclass(frozen=True)
class TimedExperts:
    """What experts take where nobody waits for another, with loads that came to them.

    Attributes:
        planes: of each rank, through the times of its own loads.
        off_s: [steps, L, R] float64, seconds with the very loads of some steps as they came.
        on_s: the same, balanced.
    """

    planes: tuple[ExpertTime, ...]
    off_s: FloatArray
    on_s: FloatArray


def fit_plane(slot_count: IntArray, seconds: FloatArray) -> ExpertTime:
    """Lay the plane of least squares through measured times.

    Args:
        slot_count: [n, S], rows that came to the slots of a rank, n times.
        seconds: [n] float64, that its experts took for them.
    Collective: none.
    """
    design = np.stack(
        [np.ones(len(seconds)), slot_count.sum(axis=1), (slot_count > 0).sum(axis=1)], axis=1
    )
    plane = np.linalg.lstsq(design, seconds, rcond=None)[0]
    fixed_s, token_s, slot_s = plane.tolist()
    worst = float((np.abs(design @ plane - seconds) / seconds).max())
    return ExpertTime(fixed_s, token_s, slot_s, worst)


def predict_experts(
    planes: Sequence[ExpertTime], rank_tokens: IntArray, occupied: IntArray, num_devices: int
) -> float:
    """Seconds of all layers' experts in a step, by planes; as `sum_slowest`.

    Args:
        planes: of each rank.
        rank_tokens: [steps, L, R], rows that came to each rank.
        occupied: [steps, L, R], its slots that had any.
        num_devices: as `sum_slowest` wants it.
    Collective: none.
    """
    seconds = [
        plane.predict(rank_tokens[:, :, rank], occupied[:, :, rank])
        for rank, plane in enumerate(planes)
    ]
    return sum_slowest(np.stack(seconds, axis=2), num_devices)


def sum_slowest(seconds: FloatArray, num_devices: int) -> float:
    """Seconds of all layers on the slowest device of each, mean over steps.

    Args:
        seconds: [steps, L, R] float64.
        num_devices: that the ranks take turns over; those of one compute one after the other.
    Collective: none.
    """
    by_device = [seconds[:, :, first::num_devices].sum(axis=2) for first in range(num_devices)]
    return float(np.max(by_device, axis=0).sum(axis=1).mean())


def find_centre(values: FloatArray) -> tuple[float, float]:
    """What values lie around, whatever a few of them do; and its standard error, were they normal.

    Collective: none.
    Source: Hodges and Lehmann, Estimates of location based on rank tests (1963): the median of the
        means of all pairs; it needs two thirds of the values that a median needs.
    """
    means = np.add.outer(values, values)[np.triu_indices(len(values))] / 2
    spread = float(np.subtract(*np.percentile(values, (75, 25))))
    return float(np.median(means)), 0.76 * spread / len(values) ** 0.5


def find_p99_ratio_error(off_s: FloatArray, on_s: FloatArray, block_steps: int) -> float:
    """Standard error of on's 99th percentile over off's: slow steps come in swarms.

    Args:
        off_s: [steps] float64, whole blocks of steps.
        on_s: [steps] float64, as many.
        block_steps: of a block.
    Collective: none.
    Source: Kuensch, The jackknife and the bootstrap for general stationary observations (1989):
        blocks are drawn again and again.
    """
    random = np.random.default_rng(0)
    off, on = off_s.reshape(-1, block_steps), on_s.reshape(-1, block_steps)
    drawn = random.integers(0, len(off), (_NUM_DRAWS, 2, len(off)))
    ratios = [np.percentile(on[b], 99) / np.percentile(off[a], 99) for a, b in drawn]
    return float(np.std(ratios))
