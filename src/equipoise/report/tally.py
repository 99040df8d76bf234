"""Rank loads of the same steps under two placements, summed for the figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.topology import FloatArray


@dataclass(frozen=True)
class BeforeAfter:
    """One figure on the initial placement, and on those in force, over the same steps."""

    before: float
    after: float


class LoadTally:
    """Sums over steps of what the initial placement, and the one in force, give the ranks.

    Ranks wait for the slowest of them in every layer of every step, so balancedness is the sum
    of mean rank loads over the sum of largest ones: busy steps weigh more than idle ones.

    Attributes:
        num_steps: steps summed.
        before: [L, R] float64, tokens per rank on the initial placement.
        after: [L, R] float64, tokens per rank on the placements in force.
    """

    def __init__(self, num_layers: int, num_ranks: int) -> None:
        self.num_steps = 0
        self.before: FloatArray = np.zeros((num_layers, num_ranks))
        self.after: FloatArray = np.zeros((num_layers, num_ranks))
        self._mean: FloatArray = np.zeros(num_layers)
        self._most_before: FloatArray = np.zeros(num_layers)
        self._most_after: FloatArray = np.zeros(num_layers)

    def add(self, before: FloatArray, after: FloatArray) -> None:
        """Count one step.

        Args:
            before: [L, R], its tokens per rank on the initial placement.
            after: [L, R], the same tokens on the placement in force.
        """
        self.num_steps += 1
        self.before += before
        self.after += after
        self._mean += before.mean(axis=1)
        self._most_before += before.max(axis=1)
        self._most_after += after.max(axis=1)

    def balancedness(self) -> BeforeAfter:
        """Over all layers; 1.0 is perfect."""
        mean = self._mean.sum()
        return BeforeAfter(
            _ratio(mean, self._most_before.sum()), _ratio(mean, self._most_after.sum())
        )

    def balancedness_per_layer(self) -> tuple[BeforeAfter, ...]:
        """Of each layer by itself."""
        return tuple(
            BeforeAfter(_ratio(mean, before), _ratio(mean, after))
            for mean, before, after in zip(
                self._mean, self._most_before, self._most_after, strict=True
            )
        )


def weigh_step(rank_load: FloatArray) -> float:
    """Balancedness of one step over its layers, [L, R] tokens; 1.0 if there are none."""
    return _ratio(rank_load.mean(axis=1).sum(), rank_load.max(axis=1).sum())


def _ratio(mean: float, most: float) -> float:
    return float(mean / most) if most > 0 else 1.0
