"""What balancing has done so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from equipoise.balancer.outcome import RebalanceOutcome


@dataclass(frozen=True)
class ModelStats:
    """Sums over one model's rebalances, the same on every rank.

    Attributes:
        rebalances: plans that were carried out.
        moves: experts that a rank received from another.
        bytes: that travelled between ranks.
        plan_s: seconds of planning, on the slowest rank of each.
        transfer_s: seconds of moving and committing, on the slowest rank of each.
        balancedness_before: mean over layers of the placement that stood before the last
            rebalance, on that window's load; None before the first.
        balancedness_after: the same of the placement that followed it.
        balancedness_realised: mean over layers of the last measured rebalance's placement, on the
            load of the steps after it; None before the first.
    """

    rebalances: int = 0
    moves: int = 0
    bytes: int = 0
    plan_s: float = 0.0
    transfer_s: float = 0.0
    balancedness_before: float | None = None
    balancedness_after: float | None = None
    balancedness_realised: float | None = None

    def add(self, outcome: RebalanceOutcome) -> ModelStats:
        """These figures and one more rebalance."""
        return ModelStats(
            self.rebalances + 1,
            self.moves + outcome.moves,
            self.bytes + outcome.bytes,
            self.plan_s + outcome.plan_s,
            self.transfer_s + outcome.transfer_s,
            float(outcome.balancedness_before.mean()),
            float(outcome.balancedness_after.mean()),
            self.balancedness_realised,
        )

    def note_realised(self, outcome: RebalanceOutcome) -> ModelStats:
        """These figures, once it is known what the last rebalance has brought."""
        realised = outcome.balancedness_realised
        return self if realised is None else replace(self, balancedness_realised=realised.mean())


@dataclass(frozen=True)
class EplbStats:
    """One moment's figures of an `EplbState`.

    Attributes:
        steps: forward passes of this rank that were closed, dummy ones included.
        models: by name.
        failure: why balancing has ended while serving goes on; None while it has not.
    """

    steps: int
    models: Mapping[str, ModelStats]
    failure: str | None = None
