"""What a step and a rebalance cost in seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from equipoise.errors import ConfigError
from equipoise.load.trace import LoadTrace
from equipoise.plan.transfer_plan import TransferPlan
from equipoise.topology import FloatArray

ASSUMED_STEP_S = 0.020
ASSUMED_EXPERT_SHARE = 0.4
"""Of a step's time, when all ranks are balanced, what grows with the slowest rank's tokens."""


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """A layer takes `layer_s`, and `token_s` for each token of the rank that has most.

    A rebalance stops serving: for `stall_s`, and while the busiest rank's experts are on its link.

    Attributes:
        layer_s: seconds.
        token_s: seconds per token of one layer's slowest rank.
        expert_bytes: bytes of one expert of one layer.
        link_gb_per_s: 10^9 bytes per second that a rank receives, and sends, at once.
        stall_s: seconds that each rebalance takes beside the transfer.
    Raises: ConfigError if one cannot be, naming it.
    """

    layer_s: float
    token_s: float
    expert_bytes: int = 44_040_192
    link_gb_per_s: float = 50.0
    stall_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("layer_s", "token_s", "stall_s"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ConfigError(f"{name} must be 0 or more seconds, got {value}")
        if self.layer_s + self.token_s == 0.0:
            raise ConfigError("layer_s and token_s cannot both be 0: then no step takes any time")
        if self.expert_bytes < 1:
            raise ConfigError(f"expert_bytes must be at least 1, got {self.expert_bytes}")
        if not 0.0 < self.link_gb_per_s < math.inf:
            raise ConfigError(f"link_gb_per_s must be above 0, got {self.link_gb_per_s}")

    def step_s(self, most: FloatArray) -> FloatArray:
        """Seconds of steps.

        Args:
            most: [N, L], tokens of the slowest rank in each layer.
        Returns:
            [N] float64; 0 for a step without tokens.
        Collective: none.
        """
        seconds = np.where(most > 0, self.layer_s + self.token_s * most, 0.0)
        return np.asarray(seconds.sum(axis=1), dtype=np.float64)

    def transfer_s(self, plan: TransferPlan) -> float:
        """Seconds until the busiest rank has received, and sent, what the plan says.

        Collective: none.
        """
        travels = ~plan.is_local
        ranks = plan.old.topology.num_ranks
        busiest = max(
            np.bincount(rank[travels], minlength=ranks).max()
            for rank in (plan.dst_rank, plan.src_rank)
        )
        return float(busiest * self.expert_bytes / (self.link_gb_per_s * 1e9))


def fit_times(tokens: npt.ArrayLike, seconds: npt.ArrayLike) -> tuple[float, float]:
    """Fit a line to measured times of one layer.

    Args:
        tokens: [M], of the rank that was measured, at least two different numbers.
        seconds: [M], that its experts took.
    Returns:
        layer_s and token_s of least squares; a line that would begin below 0 begins at 0.
    Collective: none.
    Raises: ConfigError if that is no measurement, or time does not grow with tokens.
    """
    load = np.asarray(tokens, dtype=np.float64)
    times = np.asarray(seconds, dtype=np.float64)
    if load.ndim != 1 or load.shape != times.shape or len(np.unique(load)) < 2:
        raise ConfigError(
            "measurements must be as many seconds as tokens, of at least two different loads"
        )
    if not (np.isfinite(load).all() and np.isfinite(times).all() and load.min() >= 0):
        raise ConfigError("measurements must be finite, and tokens 0 or more")
    spread = load - load.mean()
    token_s = float(spread @ (times - times.mean()) / (spread @ spread))
    layer_s = float(times.mean() - token_s * load.mean())
    if layer_s < 0.0:
        layer_s, token_s = 0.0, float(load @ times / (load @ load))
    if token_s <= 0.0:
        raise ConfigError(f"measured seconds do not grow with tokens: {token_s:.3g} s per token")
    return layer_s, token_s


def share_times(
    trace: LoadTrace, num_ranks: int, step_s: float, expert_share: float
) -> tuple[float, float]:
    """Split a known time of a step into what balance can change, and what it cannot.

    Args:
        trace: whose mean step takes that time when its ranks are balanced.
        num_ranks: R.
        step_s: seconds of a balanced step.
        expert_share: fraction of it that grows with the slowest rank's tokens.
    Returns:
        layer_s and token_s.
    Collective: none.
    Raises: ConfigError if one cannot be, naming it.
    """
    if not 0.0 < step_s < math.inf:
        raise ConfigError(f"step_s must be above 0 seconds, got {step_s}")
    if not 0.0 < expert_share <= 1.0:
        raise ConfigError(f"expert_share must be above 0 and at most 1, got {expert_share}")
    busy = int(np.count_nonzero(trace.counts.any(axis=(1, 2))))
    tokens_of_rank = float(trace.counts.sum()) / (busy * num_ranks)
    return step_s * (1.0 - expert_share) / trace.num_layers, step_s * expert_share / tokens_of_rank
